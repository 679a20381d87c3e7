"""What a person asks of a split."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from workers.errors import RecipeProblems
from workers.recipe import problems_by_field

Part = Literal["train", "validation", "test"]
PARTS: tuple[Part, ...] = ("train", "validation", "test")
Method = Literal["share", "count", "column"]
Together = Literal["near", "equal", "nothing"]
MAX_NAMED_VALUES = 50
MIN_PART = 2
"""Rows that a part has at least: one row has no interval."""


class SplitRequest(BaseModel):
    """How rows are divided. Sizes are shares of the usable rows or numbers of rows, as `method` says.

    Of `train` None means every row that is left; else what no part takes is left out. With the method "column" there
    are no sizes: `part_column` names the part of each row, and `part_values` says which values mean which part, where
    the usual names are not to be guessed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Method = Field("share", description="share, count, or column: a column names the part of each row.")
    train: float | None = Field(None, gt=0, description="null: every row that is left.")
    validation: float | None = Field(0.1, ge=0, description="Rows that early stopping and the best step choose on.")
    test: float | None = Field(0.1, gt=0, description="Rows that the scores are of.")
    group_column: str = Field("", max_length=200, description="Rows with the same value stay in one part.")
    stratify_column: str = Field("", max_length=200, description="Each value has its share in every part.")
    part_column: str = Field("", max_length=200)
    part_values: dict[Part, tuple[str, ...]] = Field(default_factory=dict)
    keep_together: Together = Field(
        "near", description="near: near duplicates stay in one part; equal: only rows that say the same do."
    )
    seed: int = Field(17, ge=0, le=2**31 - 1)

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Self:
        """The request in plain JSON types, without what its method does not use.

        Raises:
            RecipeProblems: a field is unknown, missing, of the wrong type or makes no sense beside the others.
        """
        kept = {key: one for key, one in value.items() if one is not None}
        if kept.get("method") == "column":
            kept = {"validation": None, "test": None, **{key: one for key, one in kept.items() if key not in _SIZES}}
        else:
            kept = {key: one for key, one in kept.items() if key not in ("part_column", "part_values")}
        try:
            found = cls.model_validate(kept)
        except ValidationError as error:
            raise RecipeProblems(problems_by_field(error)) from error
        if problems := dict(found._problems()):
            raise RecipeProblems(problems)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` gives the same request back."""
        return self.model_dump(mode="json")

    def sizes(self, num_rows: int) -> dict[Part, int | None]:
        """Rows that each part is to have of so many; None for every row that is left.

        Shares are rounded together, by largest remainder: those that add up to 1 leave no row over and ask for none too
        many.
        """
        sizes: dict[Part, float | None] = {part: getattr(self, part) for part in PARTS}
        if self.method != "share":
            return {part: None if size is None else int(size) for part, size in sizes.items()}
        exact = {part: size * num_rows for part, size in sizes.items() if size is not None}
        found = {part: int(rows + 1e-9) for part, rows in exact.items()}
        total = min(num_rows, round(sum(exact.values())))
        by_remainder = sorted(exact, key=lambda part: (found[part] - exact[part], PARTS.index(part)))
        for part in by_remainder[: total - sum(found.values())]:
            found[part] += 1
        return {part: None if size is None else found[part] for part, size in sizes.items()}

    def _problems(self) -> list[tuple[str, str]]:
        return self._problems_of_column() if self.method == "column" else self._problems_of_sizes()

    def _problems_of_column(self) -> list[tuple[str, str]]:
        found = []
        if not self.part_column:
            found.append(("part_column", "Choose the column that names the part of each row."))
        if self.stratify_column:
            sentence = "The column decides where each row goes, so there is nothing left to stratify. Leave it empty."
            found.append(("stratify_column", sentence))
        if self.group_column and self.group_column == self.part_column:
            found.append(("group_column", "A column cannot name the part and the group at once. Choose another one."))
        values = [value for part in PARTS for value in self.part_values.get(part, ())]
        if len(values) != len(set(values)):
            twice = next(value for value in values if values.count(value) > 1)
            found.append(("part_values", f"“{twice}” stands for two parts. Name each value once."))
        if len(values) > MAX_NAMED_VALUES:
            found.append(("part_values", f"{len(values)} values are named; {MAX_NAMED_VALUES} are taken at most."))
        if values and not (self.part_values.get("train") and self.part_values.get("test")):
            found.append(("part_values", "Name at least one value for train and one for test, or none at all."))
        return found

    def _problems_of_sizes(self) -> list[tuple[str, str]]:
        found: list[tuple[str, str]] = []
        given = {part: size for part in PARTS if (size := getattr(self, part)) is not None}
        for part, size in given.items():
            if self.method == "share" and size >= 1:
                found.append((part, f"A share lies between 0 and 1; {size:g} was given. Write 0.1 for a tenth."))
            elif self.method == "count" and size != int(size):
                found.append((part, f"A number of rows is whole; {size:g} was given."))
            elif self.method == "count" and 0 < size < MIN_PART:
                found.append((part, f"A part has at least {MIN_PART} rows, or none."))
        if not found and self.method == "share" and sum(given.values()) > 1 + 1e-9:
            found.append(("test", f"The shares add up to {sum(given.values()):.0%}. Lower one of them."))
        if self.group_column and self.group_column == self.stratify_column:
            sentence = "Rows of one value stay together, so they cannot be spread over the parts too. Choose another."
            found.append(("stratify_column", sentence))
        return found


_SIZES = frozenset({"train", "validation", "test", "seed"})

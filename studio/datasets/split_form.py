"""The form that asks for a split."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from django import forms

from studio.hidden_characters import visible
from workers.errors import RecipeProblems
from workers.splits.asked import PARTS, SplitRequest

METHODS = (
    ("share", "By share of the rows"),
    ("count", "By number of rows"),
    ("column", "By a column that names the part"),
)
TOGETHER = (
    ("near", "Near duplicates"),
    ("equal", "Equal rows only"),
    ("nothing", "Nothing"),
)


def _size(label: str, help_text: str = "", *, initial: str = "") -> forms.FloatField:
    return forms.FloatField(
        label=label, required=False, initial=initial, help_text=help_text,
        widget=forms.TextInput(attrs={"inputmode": "decimal"}),
        error_messages={"invalid": "Give a number, such as 0.1 for a tenth or 500 for so many rows."},
    )  # fmt: skip


class SplitForm(forms.Form):
    """What is asked of a split. Columns are those of the file's first rows."""

    name = forms.CharField(
        max_length=80, required=False, label="Name", help_text="Empty: the next “Split 1”, “Split 2”."
    )
    method = forms.ChoiceField(choices=METHODS, label="Divide", initial="share")
    train = _size("Train", "Empty: every row that is left.")
    validation = _size("Validation", "Early stopping and the best step choose on these. 0: none.", initial="0.1")
    test = _size("Test", "The scores are of these.", initial="0.1")
    part_column = forms.ChoiceField(
        required=False, label="Column of parts", help_text="Only where a column names the part of each row."
    )
    train_values = forms.CharField(
        max_length=2000, required=False, label="Values of train",
        help_text="Separated by commas; all three empty: guessed from the usual names, and shown.",
    )  # fmt: skip
    validation_values = forms.CharField(max_length=2000, required=False, label="Values of validation")
    test_values = forms.CharField(max_length=2000, required=False, label="Values of test")
    group_column = forms.ChoiceField(
        required=False, label="Group by", help_text="Rows with the same value are never in two parts."
    )
    stratify_column = forms.ChoiceField(
        required=False,
        label="Stratify by",
        help_text="Each value has its share in every part. Not with a column of parts.",
    )
    keep_together = forms.ChoiceField(
        choices=TOGETHER, label="Leak-free: keep together", initial="near",
        help_text="Rows that say the same, and those that the scan finds to have 70 % of their phrases in common, "
        "never stand in two parts.",
    )  # fmt: skip
    seed = forms.IntegerField(
        label="Seed", min_value=0, max_value=2**31 - 1, initial=17,
        help_text="The same seed gives the same parts; rows keep theirs when others are added.",
    )  # fmt: skip

    def __init__(self, *args: Any, column_names: Sequence[str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        columns = [("", "none"), *((name, visible(name)) for name in column_names)]
        for name in ("part_column", "group_column", "stratify_column"):
            self.fields[name].choices = columns  # type: ignore[attr-defined]

    def clean(self) -> dict[str, Any]:
        """Has the request itself say what makes no sense, beside the field that it is about."""
        values = super().clean() or {}
        if self.errors:
            return values
        try:
            self._request = SplitRequest.from_dict(self._asked(values))
        except RecipeProblems as error:
            for field, sentence in error.fields.items():
                name = "train_values" if field.startswith("part_values") else field
                self.add_error(name if name in self.fields else None, sentence)
        return values

    def request(self) -> SplitRequest:
        """What a valid form asks for."""
        assert self.is_valid(), "ask is_valid() first"
        return self._request

    def _asked(self, values: dict[str, Any]) -> dict[str, Any]:
        asked = {name: values[name] for name in SplitRequest.model_fields if values.get(name) not in (None, "")}
        # An empty field of a size is not the default one: nobody asked for such a part.
        if asked["method"] != "column":
            asked.setdefault("validation", 0)
            if "test" not in asked:
                raise RecipeProblems({"test": "Say how many rows are to be scored."})
        named = {part: _listed(values[f"{part}_values"]) for part in PARTS}
        return asked | {"part_values": {part: found for part, found in named.items() if found}}


def _listed(text: str) -> list[str]:
    return [value for one in text.split(",") if (value := one.strip())]

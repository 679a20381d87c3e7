"""A split as a file: JSON Lines, addressed by its sha256 and never changed.

The first line says of which dataset file it is and what was asked; then comes one line per part with the numbers of
its lines in the dataset's file, counted from 1, in ascending order. A row that stands in no part is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from workers.digests import file_sha256
from workers.errors import DatasetError
from workers.splits.asked import PARTS, Part

FIELD = "dataset.split"


@dataclass(frozen=True)
class FrozenSplit:
    """Lines of each part, in ascending order; no line stands in two."""

    dataset_sha256: str
    train: Sequence[int]
    validation: Sequence[int]
    test: Sequence[int]
    format: str = ""
    columns: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def part(self, name: Part) -> Sequence[int]:
        """The lines of the part that is called so."""
        lines: Sequence[int] = getattr(self, name)
        return lines

    def write(self, path: Path) -> None:
        """Writes the file; the same split gives the same bytes."""
        head = {
            "split_version": 1, "dataset_sha256": self.dataset_sha256, "format": self.format, "columns": self.columns,
            "settings": self.settings, "num_rows": {part: len(self.part(part)) for part in PARTS},
        }  # fmt: skip
        with path.open("wb") as file:
            file.write(orjson.dumps(head, option=orjson.OPT_SORT_KEYS) + b"\n")
            for part in PARTS:
                file.write(orjson.dumps({"part": part, "lines": list(self.part(part))}) + b"\n")

    @classmethod
    def read(cls, path: Path, *, sha256: str = "", dataset_sha256: str = "") -> FrozenSplit:
        """The split in a file.

        Args:
            sha256: what the file's must be; empty when nobody knows.
            dataset_sha256: of the dataset's file that it must be a split of; empty when nobody knows.

        Raises:
            DatasetError: the file is no split, another one than expected, or of another dataset.
        """
        try:
            found = file_sha256(path)
            if sha256 and found != sha256:
                raise _refusal(
                    f"The split's file is not the one that the recipe names: its sha256 begins with {found[:12]}, "
                    f"expected {sha256[:12]}.",
                    "Use the file that the recipe was made for.",
                )
            head, *parts = [orjson.loads(line) for line in path.read_bytes().splitlines()]
            lines = {one["part"]: one["lines"] for one in parts}
            split = cls(
                dataset_sha256=head["dataset_sha256"], format=head["format"], columns=head["columns"],
                settings=head["settings"], **{part: lines[part] for part in PARTS},
            )  # fmt: skip
            is_sound = head["split_version"] == 1 and all(_is_ascending(lines[part]) for part in PARTS)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, DatasetError):
                raise
            raise _refusal(f"{path.name} cannot be read as a split: {error}.", "Download it again.") from error
        num = sum(len(split.part(part)) for part in PARTS)
        if not is_sound or len(set().union(*(split.part(part) for part in PARTS))) != num:
            raise _refusal(f"{path.name} is no split: a line stands in it twice or out of order.", "Download it again.")
        if dataset_sha256 and split.dataset_sha256 != dataset_sha256:
            raise _refusal(
                f"The split is of another dataset: its file's sha256 begins with {split.dataset_sha256[:12]}, the "
                f"recipe's with {dataset_sha256[:12]}.",
                "Choose a split of this dataset version.",
            )
        return split


def _is_ascending(lines: list[int]) -> bool:
    return all(type(line) is int for line in lines) and all(
        one < other for one, other in zip([0, *lines], lines, strict=False)
    )


def _refusal(message: str, next_step: str) -> DatasetError:
    return DatasetError(message, next_step=next_step, field=FIELD)

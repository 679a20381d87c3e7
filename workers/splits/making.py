"""Makes a split in a process of its own: `python -m workers.splits.making FILE --format NAME --asked JSON --out FILE`.

As in an inspection there is a limit on memory, no database and no network. It writes one JSON object per line to
standard output and ends with "done" or "refused"; the split itself goes to the file that is named.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson

from workers.digests import file_sha256
from workers.limited import PROGRESS_SECONDS, add_file, emit, limited, refusals_emitted
from workers.scans.near_duplicates import NEAR
from workers.splits.asked import PARTS, Part, SplitRequest
from workers.splits.columns import check_sizes, is_borrowed, parts_of_values, without_leaks
from workers.splits.dividing import LEFT_OUT, divide
from workers.splits.frozen import FrozenSplit
from workers.splits.rows import SplitRows, Values, read_split_rows
from workers.splits.saying import saying_of
from workers.splits.together import MAX_PAIRS, Lots, find_lots

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

NAMES = (*PARTS, "left_out")
MAX_NAMED = 10
"""Strata that a sentence names."""


@dataclass(frozen=True)
class MadeSplit:
    """A split and what is to be said of it, in plain JSON types: see `_report`."""

    split: FrozenSplit
    report: dict[str, Any]


def make_split(
    path: Path, format_name: str, columns: dict[str, str], asked: SplitRequest, *, dataset_sha256: str = "",
    progress: Callable[[int], None] = lambda num_read: None,
) -> MadeSplit:  # fmt: skip
    """Divides the usable rows of a file.

    Args:
        dataset_sha256: the file's; found out when it is empty.

    Raises:
        DatasetError: the rows cannot be read, or cannot be divided so.
    """
    rows = read_split_rows(path, format_name, columns, asked, progress=progress)
    lots = find_lots(rows, asked.keep_together)
    notes: list[str] = []
    values: dict[Part, tuple[str, ...]] = {}
    if rows.parts is not None:
        part_N, values = parts_of_values(rows.parts.of_rows, rows.parts.names, asked.part_values, asked.part_column)
        part_N, lost = without_leaks(part_N, lots.firsts)
        notes += _notes_of_column(asked, values, lost)
        check_sizes(part_N, asked.part_column)
    else:
        strata_N = rows.strata.of_rows if rows.strata is not None else None
        sizes = asked.sizes(len(rows))
        part_N = divide(lots.firsts, _keys(rows), strata_N, sizes, seed=asked.seed)
        notes += _notes_of_sizes(part_N, lots, sizes)
        if rows.strata is not None:
            notes += _notes_of_strata(part_N, rows.strata)
    if asked.group_column and (num := rows.groups.count(0)):
        rows_have, each = ("One row has", "it") if num == 1 else (f"{num:,} rows have", "each")
        notes.append(f"{rows_have} nothing in “{asked.group_column}”: {each} is a group of its own.")
    lines_N = np.array(rows.lines, np.int64)
    lines = {part: lines_N[part_N == number].tolist() for number, part in enumerate(PARTS)}
    split = FrozenSplit(
        dataset_sha256=dataset_sha256 or file_sha256(path), format=format_name, columns=columns,
        settings=asked.to_dict(), **lines,
    )  # fmt: skip
    return MadeSplit(split, _report(rows, lots, part_N, values, notes))


def _keys(rows: SplitRows) -> NDArray[np.uint64]:
    """A digest of each row: that of its group where it has one, so that a group keeps its place when rows are added."""
    keys_N = np.array(rows.digests, np.uint64)
    if not len(rows.groups):
        return keys_N
    groups_N = np.array(rows.groups, np.uint64)
    return np.where(groups_N > 0, groups_N, keys_N)


def _notes_of_column(
    asked: SplitRequest, values: dict[Part, tuple[str, ...]], lost: dict[Part, int]
) -> list[str]:  # fmt: skip
    notes = []
    if not asked.part_values:
        shown = "; ".join(f"{part}: {', '.join(f'“{one}”' for one in found)}" for part, found in values.items())
        notes.append(f"What the values mean was guessed from their names. {shown}.")
        if is_borrowed(values["test"]):
            notes.append("No value means test, so the rows of validation are the test part: something must be scored.")
    why = _why_together(asked)
    for part, num in lost.items():
        rows_are = f"One row of {part} is" if num == 1 else f"{num:,} rows of {part} are"
        notes.append(
            f"{rows_are} left out because rows of a part that is measured on {why}. The column's own test rows stay."
        )
    return notes


def _why_together(asked: SplitRequest) -> str:
    alike = {"near": "say the same or nearly so", "equal": "say the same", "nothing": ""}[asked.keep_together]
    group = f"are of the same “{asked.group_column}”" if asked.group_column else ""
    return " or ".join(one for one in (alike, group) if one)


def _notes_of_sizes(part_N: NDArray[np.int8], lots: Lots, sizes: dict[Part, int | None]) -> list[str]:
    notes = []
    size_N = np.bincount(lots.firsts, minlength=len(part_N))
    largest = int(size_N.max())
    for number, part in enumerate(PARTS):
        has, size = int((part_N == number).sum()), sizes[part]
        if size is not None and has != size:
            notes.append(
                f"{part.capitalize()} has {has:,} rows instead of {size:,}: rows that stay together are not parted, "
                f"and the largest lot of them has {largest:,}."
            )
    evaluated = [size for part in ("test", "validation") if (size := sizes[part])]
    too_large = size_N[size_N > max(evaluated, default=0)]
    if len(too_large):
        lot, is_are = ("One lot", "is") if len(too_large) == 1 else (f"{len(too_large):,} lots", "are")
        where = "trained on" if sizes["train"] is None else "trained on or left out"
        notes.append(
            f"{lot} of rows that stay together, {int(too_large.sum()):,} rows in all, {is_are} larger than any part "
            f"that is measured on, and {is_are} {where} whole."
        )
    return notes


def _notes_of_strata(part_N: NDArray[np.int8], strata: Values) -> list[str]:
    counts_SP = _counts(part_N, strata)
    notes = []
    apart = 0.0
    for part in (1, 2):
        of_part_S = counts_SP[:, part]
        if not of_part_S.sum():
            continue
        apart = max(apart, np.abs(of_part_S - counts_SP.sum(axis=1) * of_part_S.sum() / len(part_N)).max())
        without = [
            f"“{strata.names[one] or 'nothing'}” ({counts_SP[one].sum():,})" for one in np.flatnonzero(of_part_S == 0)
        ]
        if without:
            more = f" and {len(without) - MAX_NAMED:,} more" if len(without) > MAX_NAMED else ""
            notes.append(
                f"Without a row in {PARTS[part]}: {', '.join(without[:MAX_NAMED])}{more}. They are too few or stay "
                "with too many others, and nothing can be said of them there."
            )
    if apart > 1:
        notes.append(
            f"Rows that stay together are not parted, so a value of “{strata.column}” has up to {math.ceil(apart):,} "
            "rows more or fewer in a part than its share."
        )
    return notes


def _counts(part_N: NDArray[np.int8], values: Values) -> NDArray[np.int64]:
    """[values of a column, parts and what is left out]."""
    num = len(values.names)
    cells = values.of_rows.astype(np.int64) * len(NAMES) + part_N
    return np.bincount(cells, minlength=num * len(NAMES)).reshape(num, len(NAMES))


def _report(
    rows: SplitRows, lots: Lots, part_N: NDArray[np.int8], values: dict[Part, tuple[str, ...]], notes: list[str]
) -> dict[str, Any]:
    """Rows and intervals of each part, rows by value of a column, and pairs of near duplicates with their part."""
    size_N = np.bincount(lots.firsts, minlength=len(part_N))
    lines, parts = rows.lines, part_N.tolist()
    table = rows.strata or rows.parts
    return {
        "num_usable": len(rows),
        "num_left_out": int((part_N == LEFT_OUT).sum()),
        "parts": {part: asdict(saying_of(int((part_N == number).sum()))) for number, part in enumerate(PARTS)},
        "part_values": {part: list(found) for part, found in values.items()},
        "strata": _table(part_N, table) if table is not None else [],
        "num_lots": int((size_N > 1).sum()),
        "largest_lot": int(size_N.max(initial=0)),
        "num_groups": len(set(rows.groups) - {0}),
        "num_equal": lots.num_equal,
        "num_near": lots.num_near,
        "near_share": NEAR,
        "max_pairs": MAX_PAIRS,
        "pairs": [
            [lines[mine], lines[other], round(share, 4), NAMES[parts[mine]], NAMES[parts[other]]]
            for mine, other, share in lots.pairs
        ],
        "notes": notes,
    }  # fmt: skip


def _table(part_N: NDArray[np.int8], values: Values) -> list[dict[str, Any]]:
    """The rows of each value of a column by part, the most frequent first."""
    counts = zip(values.names, _counts(part_N, values).tolist(), strict=True)
    ordered = sorted(counts, key=lambda one: (-sum(one[1]), one[0]))
    return [{"value": name, **dict(zip(NAMES, of_parts, strict=True))} for name, of_parts in ordered]


class _Progress:
    def __init__(self) -> None:
        self._shown_at = time.monotonic()

    def __call__(self, num_read: int) -> None:
        if time.monotonic() - self._shown_at > PROGRESS_SECONDS:
            self._shown_at = time.monotonic()
            emit("progress", num_read=num_read)


def main(arguments: Sequence[str] | None = None) -> int:
    """0 after "done" or "refused"; anything else is a fault of ours, or a limit that struck."""
    parser = argparse.ArgumentParser(prog="python -m workers.splits.making", description=__doc__.split("\n\n")[0])
    add_file(parser)
    parser.add_argument("--asked", default="{}", help="what is asked for (workers/splits/asked.py), as JSON")
    parser.add_argument("--dataset-sha256", default="", help="of the file, where it is known")
    parser.add_argument("--out", type=Path, required=True, help="takes the split")
    chosen = limited(parser, arguments)
    with refusals_emitted():
        asked = SplitRequest.from_dict(orjson.loads(chosen.asked))
        made = make_split(
            chosen.file, chosen.format, chosen.columns, asked, dataset_sha256=chosen.dataset_sha256,
            progress=_Progress(),
        )  # fmt: skip
        made.split.write(chosen.out)
        emit("done", num_rows={part: len(made.split.part(part)) for part in PARTS}, report=made.report)
    return 0


if __name__ == "__main__":
    sys.exit(main())

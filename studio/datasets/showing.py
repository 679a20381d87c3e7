"""What the dataset pages show: rows as chats, histograms, problems by rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

from django.apps import apps
from django.db.models import Model

from studio.datasets.models import DatasetVersion
from workers.examples import AnyExample, Problem
from workers.formats import get_format
from workers.inspection import CUTS, MAX_TURNS, first_examples
from workers.reading import read_head, read_rows
from workers.rules import RULES

NUM_PREVIEW = 20
WITHIN_ROWS = 2000


def preview(version: DatasetVersion, num: int = NUM_PREVIEW) -> list[AnyExample]:
    """The first usable rows of a ready version."""
    return first_examples(version.path(), version.format, version.columns, num, within=WITHIN_ROWS)


def row(version: DatasetVersion, line: int) -> AnyExample | None:
    """The row of a ready version at a line; None when that holds no usable one."""
    for example, _problems in read_rows(version.path(), version.format, version.columns, start=line):
        if example is not None and example.line >= line:
            return example if example.line == line else None
    return None


def mapped_rows(version: DatasetVersion, columns: dict[str, str]) -> list[tuple[int, AnyExample | None, list[Problem]]]:
    """The first five rows as a mapping would read them, numbered from 1."""
    parse = get_format("mapped").parse
    return [(number, *parse(row, number, columns)) for number, row in enumerate(read_head(version.path(), 5), start=1)]


def base_models() -> list[Any]:
    """Every registered base model. Named in a string: catalogue stands above datasets."""
    model: type[Model] = apps.get_model("catalogue", "BaseModel")
    return list(model._default_manager.only("name", "folder", "revision").order_by("name"))


@dataclass(frozen=True)
class Bar:
    """A bar of a drawing 100 high and BAR_WIDTH wide, and its line of the table beside it.

    `short` stands under it, `name` in the table; `mark` is the length at which a line is drawn at its right side;
    `query` is that of the page of rows which shows those that are counted, where it can.
    """

    x: int
    y: str
    height: str
    short: str
    name: str
    count: int
    mark: int | None = None
    query: str = ""


@dataclass(frozen=True)
class Drawing:
    """Bars as the SVG template draws them. `what` heads the table's first column, `counted` its second."""

    bars: list[Bar]
    width: int
    description: str
    what: str
    counted: str
    total: int


BAR_WIDTH = 20


Count = tuple[str, str, int, int | None]


def drawing(
    counts: Sequence[Count], *, what: str, counted: str, description: str, queries: Sequence[str] = ()
) -> Drawing:
    """Bars of (short name, name, count, mark), and for each the query that shows its rows."""
    highest = max((count for _, _, count, _ in counts), default=0) or 1
    bars = []
    for index, (short, name, count, mark) in enumerate(counts):
        height = 100 * count / highest
        query = queries[index] if queries else ""
        place = index * BAR_WIDTH + 1
        bars.append(Bar(place, f"{100 - height:.2f}", f"{height:.2f}", short, name, count, mark, query))
    return Drawing(bars, BAR_WIDTH * len(bars), description, what, counted, sum(bar.count for bar in bars))


@dataclass(frozen=True)
class Histogram:
    """Stored lengths: their drawing, and the figures that stand beside it."""

    drawing: Drawing
    cuts: list[tuple[int, int]]
    num_rows: int
    mean: float
    longest: int
    total: int
    is_whole: bool


def histogram(found: dict[str, Any], unit: str, counted: str = "rows") -> Histogram | None:
    """What is shown of stored lengths; None when there are none."""
    bins = found.get("histogram") or []
    if not bins:
        return None
    counts: list[Count] = []
    queries: list[str] = []
    below = 0
    for bound, rows in bins:
        mark = bound if bound in CUTS and unit == "tokens" else None
        counts.append((f"{bound:,}", f"{below:,} to {bound:,}", rows, mark))
        # Rows can be asked for by their characters, which no base model decides.
        if unit == "characters" and counted == "rows":
            queries.append(urlencode({"state": "usable", "min_characters": below, "max_characters": bound}))
        below = bound + 1
    num = found["num_rows"]
    cut = found.get("cut", {})
    return Histogram(
        drawing=drawing(
            counts, what=unit.capitalize(), counted=counted.capitalize(),
            description=f"Lengths of {num:,} {counted} in {unit}, the longest {found['longest']:,}",
            queries=queries,
        ),
        cuts=[(bound, cut[str(bound)]) for bound in CUTS if str(bound) in cut],
        num_rows=num,
        mean=found["total"] / num if num else 0.0,
        longest=found["longest"],
        total=found["total"],
        is_whole=found.get("is_whole", True),
    )  # fmt: skip


def turns(statistics: dict[str, Any]) -> Drawing | None:
    """How many turns the rows have; None for rows without turns."""
    found = statistics.get("turns") or []
    if not found:
        return None
    counts = [
        (f"{num}+" if num == MAX_TURNS else str(num), f"{num} or more" if num == MAX_TURNS else str(num), rows, None)
        for num, rows in found
    ]
    queries = [
        urlencode({"state": "usable", "min_turns": num} | ({"max_turns": num} if num < MAX_TURNS else {}))
        for num, _rows in found
    ]
    return drawing(
        counts, what="Turns", counted="Rows", description="Rows by their number of turns", queries=queries
    )  # fmt: skip


def roles(statistics: dict[str, Any]) -> Drawing | None:
    """Who speaks in how many turns, the most frequent first; None when that was not counted."""
    found = sorted(statistics.get("roles", {}).items(), key=lambda item: (-item[1], item[0]))
    if not found:
        return None
    counts = [(role, role.capitalize(), num, None) for role, num in found]
    return drawing(counts, what="Role", counted="Turns", description="Turns by who speaks")


MAX_LANGUAGES = 12


def language_bars(counts: dict[str, int]) -> Drawing | None:
    """How many rows are in which language, rare ones together; None when that is not known."""
    if not counts:
        return None
    shown = list(counts.items())[:MAX_LANGUAGES]
    others = sum(counts.values()) - sum(num for _, num in shown)
    if others:
        shown.append((f"{len(counts) - MAX_LANGUAGES} others", others))
    return drawing(
        [(name, name, num, None) for name, num in shown], what="Language", counted="Rows",
        description="Rows by their language",
    )  # fmt: skip


def problem_groups(version: DatasetVersion) -> list[dict[str, Any]]:
    """Problems by rule with exact counts, the most frequent first."""
    ordered = sorted(version.problem_counts.items(), key=lambda item: (-item[1], item[0]))
    return [{"rule": rule, "title": RULES.get(rule, rule), "count": count} for rule, count in ordered]

"""What the dataset pages show: rows as chats, histograms, problems by rule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from django.apps import apps
from django.db.models import Model

from studio.datasets.models import DatasetVersion
from workers.examples import AnyExample, Problem
from workers.formats import get_format
from workers.inspection import CUTS, first_examples
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
class Histogram:
    """A histogram as the SVG template draws it, 0 to 100 in both directions for each bar's unit."""

    bars: list[dict[str, Any]]
    marks: list[dict[str, Any]]
    width: int
    description: str
    cuts: list[tuple[int, int]]
    num_rows: int
    mean: float
    longest: int
    total: int
    is_whole: bool


def histogram(found: dict[str, Any], unit: str) -> Histogram | None:
    """The drawing of stored lengths; None when there are none."""
    bins = found.get("histogram") or []
    if not bins:
        return None
    highest = max(rows for _, rows in bins)
    bars, marks, below = [], [], 0
    for index, (bound, rows) in enumerate(bins):
        height = 100 * rows / highest
        bars.append(
            {"x": index * 20 + 1, "y": f"{100 - height:.2f}", "height": f"{height:.2f}", "middle": index * 20 + 10,
             "label": f"{below:,} to {bound:,} {unit}: {rows:,} rows", "bound": bound}
        )  # fmt: skip
        if bound in CUTS and unit == "tokens":
            marks.append({"x": (index + 1) * 20, "bound": bound})
        below = bound + 1
    num = found["num_rows"]
    cut = found.get("cut", {})
    return Histogram(
        bars=bars,
        marks=marks,
        width=20 * len(bins),
        description=f"Lengths of {num:,} rows in {unit}, the longest {found['longest']:,}",
        cuts=[(bound, cut[str(bound)]) for bound in CUTS if str(bound) in cut],
        num_rows=num,
        mean=found["total"] / num if num else 0.0,
        longest=found["longest"],
        total=found["total"],
        is_whole=found.get("is_whole", True),
    )


def problem_groups(version: DatasetVersion) -> list[dict[str, Any]]:
    """Problems by rule with exact counts, the most frequent first."""
    ordered = sorted(version.problem_counts.items(), key=lambda item: (-item[1], item[0]))
    return [{"rule": rule, "title": RULES.get(rule, rule), "count": count} for rule, count in ordered]

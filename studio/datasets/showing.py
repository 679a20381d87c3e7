"""What the dataset pages show: rows as chats, rows as tokens, histograms, problems by rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from django.apps import apps
from django.db.models import Model

from studio.datasets.models import DatasetVersion
from workers.errors import ExplainedError
from workers.examples import AnyExample, Example, Problem
from workers.formats import get_format
from workers.inspection import CUTS, first_examples
from workers.reading import read_head, read_rows
from workers.rendering import Renderer, RenderingError
from workers.rules import RULES

NUM_PREVIEW = 20
NUM_AS_TOKENS = 5
WITHIN_ROWS = 2000
MAX_SHOWN_TOKENS = 2000
MAX_SHOWN_CHARS = 8000


@dataclass(frozen=True)
class Token:
    """A piece of a rendered row. `kind` is trained, context, end (an end-of-turn token that is trained) or cut."""

    text: str
    kind: str
    id: int | None = None


@dataclass(frozen=True)
class TokenRow:
    """A row as the model reads it."""

    line: int
    tokens: list[Token]
    num_tokens: int
    num_trained: int
    num_cut: int
    num_hidden: int
    problem: str = ""


def preview(version: DatasetVersion, num: int = NUM_PREVIEW) -> list[AnyExample]:
    """The first usable rows of a ready version."""
    return first_examples(version.path(), version.format, version.columns, num, within=WITHIN_ROWS)


def row(version: DatasetVersion, line: int) -> AnyExample | None:
    """The row of a ready version at a line; None when that holds no usable one."""
    for example, _problems in read_rows(version.path(), version.format, version.columns):
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
    return list(model._default_manager.order_by("name"))


def token_rows(examples: Sequence[AnyExample], folder: Path, max_length: int) -> list[TokenRow]:
    """Rows through a base model's template and tokenizer, by the code that training uses.

    Raises:
        BaseModelError: the base model's folder cannot be read.
    """
    renderer = _renderer(str(folder), max_length)
    return [_token_row(renderer, one) for example in examples for one in example.conversations()]


@lru_cache(maxsize=4)
def _renderer(folder: str, max_length: int) -> Renderer:
    return Renderer(Path(folder), max_length=max_length, loss_on="assistant")


def _token_row(renderer: Renderer, example: Example) -> TokenRow:
    try:
        rendered = renderer.render(example)
    except RenderingError as error:
        return TokenRow(example.line, [], 0, 0, 0, 0, problem=f"{error.message} {error.next_step}")
    tokens: list[Token] = []
    shown = 0
    pieces = zip(rendered.ids, rendered.trained, rendered.offsets, strict=True)
    for index, (token_id, trained, (start, end)) in enumerate(pieces):
        if index == MAX_SHOWN_TOKENS:
            break
        # Tokens of one character (an emoji in bytes) share its place: the first of them shows it.
        text = rendered.text[max(start, shown) : end]
        shown = max(shown, end)
        kind = "end" if trained and token_id in renderer.stop_ids else "trained" if trained else "context"
        tokens.append(Token(text, kind, token_id))
    if rendered.num_cut and len(rendered.ids) <= MAX_SHOWN_TOKENS:
        tokens.append(Token(rendered.text[shown : shown + MAX_SHOWN_CHARS], "cut"))
    return TokenRow(
        line=example.line,
        tokens=tokens,
        num_tokens=len(rendered.ids) + rendered.num_cut,
        num_trained=rendered.num_trained,
        num_cut=rendered.num_cut,
        num_hidden=max(0, len(rendered.ids) - MAX_SHOWN_TOKENS),
        problem=rendered.problem.message if rendered.problem else "",
    )


def as_model_reads(examples: Sequence[AnyExample], base_model: Any, max_length: int) -> tuple[list[TokenRow], str]:
    """Rows as tokens, or the sentence that says why there are none."""
    try:
        return token_rows(examples[:NUM_AS_TOKENS], Path(base_model.folder), max_length), ""
    except ExplainedError as error:
        return [], f"{error.message} {error.next_step}".strip()


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

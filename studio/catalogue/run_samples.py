"""The rows of a run on a suite, a page at a time: by one metric, the regressions first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlencode

from django.db.models import Count, F, FloatField, Q, QuerySet
from django.db.models.fields.json import KeyTextTransform, KeyTransform
from django.db.models.functions import Cast

from studio.catalogue.answer_rows import PAGE_SIZE, Tab, place_of, search_of, word_of, worst_first
from studio.catalogue.models import EvaluationRun, RunSample
from studio.catalogue.word_diff import Piece, word_diff

SHOWN = {
    "": ("All", Q()),
    "regressions": ("Regressions", Q(change__lt=0)),
    "improvements": ("Improvements", Q(change__gt=0)),
    "ties": ("Ties", Q(change=0)),
    "left_out": ("Without a figure", Q(shown_figure=None)),
}
DIFFS = {"": "Plain", "reference": "Against the expected answer", "base": "Against the base's answer"}
# Functions of the loss say of a row what the loss says: where there is another metric, that one tells more.
_LOSSES = {"loss", "perplexity", "byte_perplexity"}


@dataclass(frozen=True)
class Metric:
    """A metric of a run, as its rows can be ordered by it."""

    key: str
    label: str
    higher_is_better: bool


def metrics_of(run: EvaluationRun) -> dict[str, Metric]:
    """What a run measured, by key."""
    return {
        key: Metric(key, str(figure["label"]), bool(figure["higher_is_better"]))
        for key, figure in run.base_figures.items()
    }


@dataclass(frozen=True)
class Filters:
    """What the URL asked for. Unknown values ask for nothing."""

    metric: str = ""
    show: str = ""
    search: str = ""
    diff: str = ""
    after: tuple[float, int] | None = None
    """Change, as ordered, and key of the row before the page."""

    @classmethod
    def from_query(cls, query: Mapping[str, Any], metrics: Mapping[str, Metric]) -> Filters:
        metric, show, diff = (str(query.get(name, "")) for name in ("metric", "show", "diff"))
        return cls(
            metric=metric if metric in metrics else _usual(metrics),
            show=show if show in SHOWN else "",
            search=search_of(query),
            diff=diff if diff in DIFFS else "",
            after=place_of(query),
        )

    def query(self, **changes: str) -> str:
        """The same choices as the query of a URL, from the first row unless `after` is given."""
        values = {"metric": self.metric, "show": self.show, "q": self.search, "diff": self.diff} | changes
        return urlencode({name: value for name, value in values.items() if value})


def _usual(metrics: Mapping[str, Metric]) -> str:
    return next((key for key in metrics if key not in _LOSSES), next(iter(metrics), ""))


@dataclass(frozen=True)
class RowFigure:
    """A row's figures by one metric; None where it has no part in it, and `why` says why."""

    label: str
    base: float | None
    adapter: float | None
    why: str


@dataclass(frozen=True)
class RunRow:
    """A row as the page shows it."""

    sample: RunSample
    figures: list[RowFigure]
    change: float | None
    """By the chosen metric, above 0 where the adapter is better."""
    pieces: list[Piece] | None
    """The adapter's answer beside the text that it is compared with; None where it is shown as it is."""
    is_too_long: bool

    @property
    def word(self) -> str:
        """How the row went, in a word; empty where it has no figure of both."""
        return word_of(self.change)


@dataclass(frozen=True)
class RunPage:
    """Some rows of a run and how to get others."""

    rows: list[RunRow]
    tabs: list[Tab]
    total: int
    more: str
    """`after` of the page after this one; empty on the last."""


def run_page(run: EvaluationRun, filters: Filters, *, page_size: int = PAGE_SIZE) -> RunPage:
    """A page of a run's rows, in two queries: the worst first, improvements the best first, the rest as they stand."""
    metrics = metrics_of(run)
    rows = _measured(run, metrics.get(filters.metric))
    counts = rows.aggregate(**{name or "total": Count("pk", filter=condition)
                               for name, (_label, condition) in SHOWN.items()})  # fmt: skip
    found = list(_chosen(rows, filters)[: page_size + 1])
    shown = found[:page_size]
    more = f"{shown[-1].order!r}_{shown[-1].pk}" if len(found) > page_size else ""  # type: ignore[attr-defined]
    return RunPage(
        rows=[_row(sample, metrics, filters) for sample in shown],
        tabs=[
            Tab(value, label, counts[value or "total"], replace(filters, show=value).query())
            for value, (label, _condition) in SHOWN.items()
            # A base alone is no better and no worse than anything.
            if value in {"", "left_out"} or run.adapter_id is not None
        ],
        total=counts["total"],
        more=more,
    )


def _measured(run: EvaluationRun, metric: Metric | None) -> QuerySet[RunSample]:
    """A run's rows with their change by a metric, above 0 where the adapter is better; null without both figures."""
    # The key is the run's own: nothing that a person wrote becomes part of the query's text.
    pair = KeyTransform(metric.key if metric else "", "figures")
    base, adapter = (Cast(KeyTextTransform(place, pair), FloatField()) for place in ("0", "1"))
    change = adapter - base if metric is None or metric.higher_is_better else base - adapter
    is_alone = run.adapter_id is None
    return RunSample.objects.filter(run=run).annotate(change=change, shown_figure=base if is_alone else adapter)


def _chosen(rows: QuerySet[RunSample], filters: Filters) -> QuerySet[RunSample]:
    rows = rows.filter(SHOWN[filters.show][1])
    return worst_first(
        rows, F("change"), best_first=filters.show == "improvements", search=filters.search, after=filters.after
    )


def _row(sample: RunSample, metrics: Mapping[str, Metric], filters: Filters) -> RunRow:
    figures = []
    for key, metric in metrics.items():
        base, adapter = sample.figures.get(key) or (None, None)
        figures.append(RowFigure(metric.label, base, adapter, str(sample.left_out.get(key, ""))))
    pieces, is_too_long = None, False
    other = sample.reference if filters.diff == "reference" else sample.base_answer
    if filters.diff and other is not None and sample.adapter_answer is not None:
        pieces = word_diff(other, sample.adapter_answer)
        is_too_long = pieces is None
    return RunRow(sample, figures, sample.change, pieces, is_too_long)  # type: ignore[attr-defined]

"""An adapter's sample answers, a page at a time: filtered, searched, the worst first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlencode

from django.db.models import Count, F, Q, QuerySet
from django.db.models.functions import Length

from studio.catalogue.answer_rows import PAGE_SIZE, Tab, place_of, search_of, word_of, worst_first
from studio.catalogue.models import Adapter, Sample
from studio.catalogue.sample_figures import measure_older
from studio.catalogue.word_diff import Piece, word_diff
from workers.evaluations import evaluations

# How much longer, in characters, an answer is that counts as longer.
LENGTH_RATIO = 1.5

CHANGE = F("adapter_figure") - F("base_figure")
SHOWN = {
    "": ("All", Q()),
    "regressions": ("Regressions", Q(adapter_figure__lt=F("base_figure"))),
    "improvements": ("Improvements", Q(adapter_figure__gt=F("base_figure"))),
    "ties": ("Ties", Q(adapter_figure=F("base_figure"))),
}
LENGTHS = {
    "": ("Any length", Q()),
    "longer": ("Much longer than the base's", Q(adapter_length__gt=F("base_length") * LENGTH_RATIO)),
    "shorter": ("Much shorter than the base's", Q(adapter_length__lt=F("base_length") / LENGTH_RATIO)),
}
DIFFS = {"": "Plain", "reference": "Against the reference", "base": "Against the base's answer"}


@dataclass(frozen=True)
class Filters:
    """What the URL asked for. Unknown values ask for nothing."""

    show: str = ""
    length: str = ""
    search: str = ""
    diff: str = ""
    after: tuple[float, int] | None = None
    """Change and key of the sample before the page."""

    @classmethod
    def from_query(cls, query: Mapping[str, Any]) -> Filters:
        show, length, diff = (str(query.get(name, "")) for name in ("show", "length", "diff"))
        search = search_of(query)
        return cls(
            show=show if show in SHOWN else "",
            length=length if length in LENGTHS else "",
            search=search,
            diff=diff if diff in DIFFS else "",
            after=place_of(query),
        )

    def are_set(self) -> bool:
        return bool(self.show or self.length or self.search)

    def query(self, **changes: str) -> str:
        """The same choices as the query of a URL, from the first sample unless `after` is given."""
        values = {"show": self.show, "length": self.length, "q": self.search, "diff": self.diff} | changes
        return urlencode({name: value for name, value in values.items() if value})


@dataclass(frozen=True)
class SampleRow:
    """A sample as the page shows it."""

    sample: Sample
    pieces: list[Piece] | None
    """The adapter's answer beside the text that it is compared with; None where it is shown as it is."""
    is_too_long: bool

    @property
    def change(self) -> float | None:
        """The adapter's figure minus the base's."""
        if self.sample.base_figure is None or self.sample.adapter_figure is None:
            return None
        return self.sample.adapter_figure - self.sample.base_figure

    @property
    def word(self) -> str:
        """How the row went, in a word; empty where it has no figure."""
        return word_of(self.change)

    @property
    def num_words(self) -> int:
        return len(self.sample.adapter_answer.split())

    @property
    def words_more(self) -> int:
        """Words that the adapter's answer has more than the base's."""
        return self.num_words - len(self.sample.base_answer.split())

    @property
    def words_fewer(self) -> int:
        return -self.words_more


@dataclass(frozen=True)
class SamplePage:
    """Some samples of an adapter and how to get others."""

    rows: list[SampleRow]
    tabs: list[Tab]
    total: int
    figure_label: str
    """Name of the figure that tells regressions from improvements; empty without samples."""
    more_query: str
    """Query of the page after this one; empty on the last."""


def sample_page(adapter: Adapter, filters: Filters, *, counts: Mapping[str, int] | None = None) -> SamplePage:
    """A page of an adapter's samples; two queries, one where the counts are known (lineage.adapters_for_page)."""
    counts = _counts(adapter) if counts is None else counts
    if counts.get("unmeasured"):
        measure_older(adapter)
        counts = _counts(adapter)
    found = list(_chosen(adapter, filters)[: PAGE_SIZE + 1])
    shown = found[:PAGE_SIZE]
    more = ""
    if len(found) > PAGE_SIZE:
        more = filters.query(after=f"{shown[-1].order!r}_{shown[-1].pk}")  # type: ignore[attr-defined]
    tabs = [
        Tab(value, label, counts.get(value or "total", 0), replace(filters, show=value).query())
        for value, (label, _condition) in SHOWN.items()
    ]
    return SamplePage(
        rows=[_row(sample, filters.diff) for sample in shown],
        tabs=tabs,
        total=counts.get("total", 0),
        figure_label=evaluations()[shown[0].figure].label if shown and shown[0].figure in evaluations() else "",
        more_query=more,
    )


def _counts(adapter: Adapter) -> dict[str, int]:
    # With the names of lineage.adapters_for_page.
    named = {name: Count("pk", filter=condition) for name, (_label, condition) in SHOWN.items() if name}
    return Sample.objects.filter(adapter=adapter).aggregate(
        total=Count("pk"), unmeasured=Count("pk", filter=Q(figure="")), **named
    )


def _chosen(adapter: Adapter, filters: Filters) -> QuerySet[Sample]:
    """The asked samples: the worst first, improvements the best first; equal ones as they were stored."""
    # Never filter(adapter__...): the index on the adapter alone finds its rows.
    rows = Sample.objects.filter(adapter=adapter).filter(SHOWN[filters.show][1])
    if filters.length:
        rows = rows.annotate(adapter_length=Length("adapter_answer"), base_length=Length("base_answer"))
        rows = rows.filter(LENGTHS[filters.length][1])
    return worst_first(
        rows, CHANGE, best_first=filters.show == "improvements", search=filters.search, after=filters.after
    )


def _row(sample: Sample, diff: str) -> SampleRow:
    if not diff:
        return SampleRow(sample, None, is_too_long=False)
    other = sample.reference if diff == "reference" else sample.base_answer
    pieces = word_diff(other, sample.adapter_answer)
    return SampleRow(sample, pieces, is_too_long=pieces is None)

"""The list of a team's adapters: filtered, sorted by what was measured, a page at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from django.db.models import F, FloatField, OuterRef, Prefetch, QuerySet, Subquery
from django.http import QueryDict

from studio.accounts.models import Team
from studio.catalogue.models import Adapter, Score, TestSet
from studio.query_values import whole_number
from workers.evaluations import evaluations
from workers.methods import ADAPTER, Product, methods

PAGE_SIZE = 50
DEFAULT_SORT = "loss"
OTHER_SORTS = {"updated": "Newest first", "name": "Name", "size": "Size"}


@dataclass(frozen=True)
class Choice:
    """One option of a filter."""

    value: str
    label: str


@dataclass(frozen=True)
class Filters:
    """What the URL asked for. Unknown values ask for nothing."""

    base: str
    method: str
    dataset: str
    sort: str
    page: int

    @classmethod
    def from_query(cls, query: QueryDict, choices: dict[str, list[Choice]]) -> Filters:
        """The filters that a URL names, of what is installed or `filter_choices` offers."""
        sort, page, method = query.get("sort", DEFAULT_SORT), query.get("page", "1"), query.get("method", "")
        return cls(
            base=_number(query.get("base", "")),
            method=method if method in methods() or any(method == one.value for one in choices["method"]) else "",
            dataset=_number(query.get("dataset", "")),
            sort=sort if sort in evaluations() or sort in OTHER_SORTS else DEFAULT_SORT,
            page=max(1, min(whole_number(page) or 1, 100_000)),
        )

    @property
    def metric(self) -> str:
        """The evaluation whose difference is shown."""
        return self.sort if self.sort in evaluations() else DEFAULT_SORT

    def are_set(self) -> bool:
        return bool(self.base or self.method or self.dataset)


def _number(text: str) -> str:
    return text if whole_number(text) is not None else ""


@dataclass(frozen=True)
class AdapterPage:
    """Adapters with `shown_score` set to their score on the chosen metric, or None."""

    adapters: list[Adapter]
    has_more: bool
    extent: float
    """Largest absolute difference on the page: the axis that its intervals share."""


def list_adapters(team: Team, filters: Filters) -> AdapterPage:
    """One page of a team's adapters; three queries whatever their number."""
    found = sorted_adapters(team.adapters.all(), filters).select_related("base_model", "dataset_version__dataset")
    found = found.prefetch_related(
        Prefetch(
            "scores", Score.objects.filter(evaluation=filters.metric, test_set=TestSet.HELD_OUT), to_attr="shown_scores"
        )
    ).defer("recipe", "files", "provenance")
    start = (filters.page - 1) * PAGE_SIZE
    rows = list(found[start : start + PAGE_SIZE + 1])
    for adapter in rows:
        scores = adapter.shown_scores
        adapter.method_label = method_label(adapter.method)  # type: ignore[attr-defined]
        adapter.shown_score = scores[0] if scores else None  # type: ignore[attr-defined]
    shown = rows[:PAGE_SIZE]
    ends = [
        abs(end)
        for adapter in shown
        if (score := adapter.shown_score) is not None  # type: ignore[attr-defined]
        for end in (score.difference_low, score.difference_high)
    ]
    return AdapterPage(list[Adapter](shown), len(rows) > PAGE_SIZE, max(ends, default=0) or 1.0)


def sorted_adapters(adapters: QuerySet[Adapter], filters: Filters) -> QuerySet[Adapter]:
    """The filtered adapters in the asked order; those that were not scored come last."""
    if filters.base:
        adapters = adapters.filter(base_model__pk=int(filters.base))
    if filters.dataset:
        adapters = adapters.filter(dataset_version__dataset__pk=int(filters.dataset))
    if filters.method:
        adapters = adapters.filter(method=filters.method)
    if filters.sort in OTHER_SORTS:
        order = {"updated": "-created_at", "name": "name", "size": "num_bytes"}[filters.sort]
        return adapters.order_by(order, "-pk")
    scores = Score.objects.filter(adapter=OuterRef("pk"), evaluation=filters.sort, test_set=TestSet.HELD_OUT)
    difference = F("sorted_difference")
    best_first = (
        difference.desc(nulls_last=True)
        if evaluations()[filters.sort].higher_is_better
        else difference.asc(nulls_last=True)
    )
    return adapters.annotate(
        sorted_difference=Subquery(scores.values("difference")[:1], output_field=FloatField())
    ).order_by(best_first, "-created_at", "-pk")


def filter_choices(team: Team) -> dict[str, list[Choice]]:
    """What a team's adapters can be filtered by: only what occurs."""
    rows = (
        team.adapters.order_by()
        .values_list("base_model_id", "base_model__name", "dataset_version__dataset_id",
                     "dataset_version__dataset__name", "method")
        .distinct()
    )  # fmt: skip
    bases: dict[str, str] = {}
    datasets: dict[str, str] = {}
    used: dict[str, str] = {}
    for base_id, base, dataset_id, dataset, method in rows:
        bases[str(base_id)], datasets[str(dataset_id)], used[method] = base, dataset, method_label(method)
    return {"base": _choices(bases), "method": _choices(used), "dataset": _choices(datasets)}


def method_label(name: str) -> str:
    """A method as people call it; its name where the plug-in is not installed any more."""
    method = methods().get(name)
    return method.label if method else name


def product_of(name: str) -> Product:
    """What a method leaves; an adapter where the plug-in is not installed any more."""
    method = methods().get(name)
    return method.product if method else ADAPTER


def _choices(labels: dict[str, str]) -> list[Choice]:
    return sorted((Choice(value, label) for value, label in labels.items()), key=lambda choice: choice.label.lower())


def sort_choices() -> list[Choice]:
    """The evaluations, then the other orders."""
    measured = [Choice(name, f"{one.label}, best first") for name, one in evaluations().items()]
    return measured + [Choice(value, label) for value, label in OTHER_SORTS.items()]


def page_url(query: QueryDict, page: int) -> str:
    """The same list at another page."""
    changed: Any = query.copy()
    changed["page"] = str(page)
    return f"?{changed.urlencode()}"

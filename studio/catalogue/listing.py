"""The list of a team's adapters: filtered, sorted by what was measured, a page at a time."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

from django.contrib.postgres.expressions import ArraySubquery
from django.contrib.postgres.search import SearchQuery
from django.db.models import Exists, F, FilteredRelation, OuterRef, Q, QuerySet
from django.db.models.functions import JSONObject
from django.http import QueryDict

from studio.accounts.models import Team, User
from studio.catalogue.models import Adapter, AdapterDataset, AdapterState, Alias, BaseModel, SavedView, Score, TestSet
from studio.datasets.models import Dataset
from studio.keyset import Key, read_page
from studio.query_values import whole_number
from workers.evaluations import Evaluation, evaluations
from workers.methods import ADAPTER, Product, methods

PAGE_SIZE = 50
MAX_WORDS = 8
DEFAULT_SORT = "loss"
OTHER_SORTS = {"updated": "Newest first", "name": "Name", "size": "Size"}
FACTS = {
    "base": "Base", "method": "Method", "dataset": "Dataset", "parameters": "Trained parameters", "size": "Size",
    "by": "Made by", "made": "Made",
}  # fmt: skip
"""Columns that a list can have beside its metrics, by name."""
DEFAULT_COLUMNS = ("base", "method", "dataset", "size", "made")
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Choice:
    """One option of a filter."""

    value: str
    label: str


@dataclass(frozen=True)
class Filters:
    """What the URL asked for. Unknown values ask for nothing."""

    text: str
    state: str
    base: str
    method: str
    dataset: str
    alias: str
    tag: str
    is_every_version: bool
    sort: str
    columns: tuple[str, ...] = DEFAULT_COLUMNS
    """Of FACTS, and evaluations whose difference is shown beside that of the sort."""
    are_columns_chosen: bool = False

    @classmethod
    def from_query(cls, query: QueryDict, choices: dict[str, list[Choice]]) -> Filters:
        """The filters that a URL names, of what is installed or `filter_choices` offers."""
        sort, method = query.get("sort", DEFAULT_SORT), query.get("method", "")
        columns = [name for name in (*FACTS, *evaluations()) if name in query.getlist("col")]

        def offered(name: str) -> str:
            value = query.get(name, "")
            return value if any(value == one.value for one in choices[name]) else ""

        return cls(
            text=" ".join(query.get("q", "").replace("\0", " ").split())[:200],
            state=query.get("state", "") if query.get("state", "") in AdapterState.values else "",
            base=_number(query.get("base", "")),
            method=method if method in methods() else offered("method"),
            dataset=_number(query.get("dataset", "")),
            alias=offered("alias"),
            tag=query.get("tag", "").replace("\0", "")[:40],
            is_every_version="every" in query,
            sort=sort if sort in evaluations() or sort in OTHER_SORTS else DEFAULT_SORT,
            # Without `cols`, nobody has said that no column is wanted.
            columns=tuple(columns) if "cols" in query else DEFAULT_COLUMNS,
            are_columns_chosen="cols" in query,
        )

    @property
    def metric(self) -> str:
        """The evaluation whose difference is shown."""
        return self.sort if self.sort in evaluations() else DEFAULT_SORT

    @property
    def more_metrics(self) -> list[Evaluation]:
        """The evaluations that have a column of their own beside the first."""
        return [evaluations()[name] for name in self.columns if name in evaluations() and name != self.metric]

    def are_set(self) -> bool:
        return bool(self.text or self.state or self.base or self.method or self.dataset or self.alias or self.tag)

    @property
    def unfiltered_query(self) -> str:
        """The query of the same list without filters: its order and its columns."""
        named = [("every", "on")] if self.is_every_version else []
        named += [("sort", self.sort)] if self.sort != DEFAULT_SORT else []
        if self.are_columns_chosen:
            named += [("cols", "1"), *(("col", name) for name in self.columns)]
        return urlencode(named)


def _number(text: str) -> str:
    return text if whole_number(text) is not None else ""


@dataclass(frozen=True)
class AdapterPage:
    """Adapters with `shown_score` set to their score on the chosen metric, or None, `more_scores` to those on the other
    columns' metrics, and `alias_names`."""

    adapters: list[Adapter]
    before: str
    after: str
    extent: float
    """Largest absolute difference on the page: the axis that its intervals share."""


def list_adapters(team: Team, filters: Filters, query: QueryDict) -> AdapterPage:
    """One page of a team's adapters; at most three queries whatever their number."""
    page = read_page(with_columns(team.adapters.all(), filters), order_of(filters), query, size=PAGE_SIZE)
    more = [one.name for one in filters.more_metrics]
    scores = {
        (score.adapter_id, score.evaluation): score
        for score in Score.objects.filter(
            adapter__in=page.rows, evaluation__in=[filters.metric, *more], test_set=TestSet.HELD_OUT
        ).order_by("pk")
    }
    for adapter in page.rows:
        adapter.method_label = method_label(adapter.method)  # type: ignore[attr-defined]
        adapter.shown_score = scores.get((adapter.pk, filters.metric))  # type: ignore[attr-defined]
        adapter.more_scores = [scores.get((adapter.pk, name)) for name in more]  # type: ignore[attr-defined]
    shown = [score for (_adapter, name), score in scores.items() if name == filters.metric]
    ends = [abs(end) for score in shown for end in (score.difference_low, score.difference_high)]
    return AdapterPage(page.rows, page.before, page.after, max(ends, default=0) or 1.0)


def with_columns(adapters: QuerySet[Adapter], filters: Filters) -> QuerySet[Adapter]:
    """The filtered adapters with what a list shows and sorts by, heavy columns left out."""
    found = filtered(adapters, filters).select_related("base_model", "dataset_version__dataset", "created_by").defer(
        "recipe", "files", "provenance", "card", "overlap", "suspicious", "sources", "search",
        "base_model__files", "base_model__shape", "dataset_version__statistics",
    )  # fmt: skip
    aliases = Alias.objects.filter(adapter=OuterRef("pk")).order_by("name")
    found = found.annotate(alias_names=ArraySubquery(aliases.values("name")))
    if filters.sort in OTHER_SORTS:
        return found
    # A join, not a subquery in the order: so the scores' index gives the first of a page without all the others.
    ranked = Q(scores__evaluation=filters.sort, scores__test_set=TestSet.HELD_OUT)
    newer = Score.objects.filter(
        adapter=OuterRef("pk"), evaluation=filters.sort, test_set=TestSet.HELD_OUT, pk__gt=OuterRef("ranked__pk")
    )
    found = found.annotate(ranked=FilteredRelation("scores", condition=ranked)).filter(~Exists(newer))
    return found.annotate(scored_adapter=F("ranked__adapter"), sorted_difference=F("ranked__difference"))


def order_of(filters: Filters) -> list[Key]:
    """The order that was asked for; those that were not scored come last."""
    last = [Key("created_at", is_descending=True), Key("pk", is_descending=True)]
    if filters.sort == "updated":
        return last
    if filters.sort in OTHER_SORTS:
        return [Key({"name": "name", "size": "num_bytes"}[filters.sort]), Key("pk", is_descending=True)]
    is_descending = evaluations()[filters.sort].higher_is_better
    return [Key("sorted_difference", is_descending=is_descending, is_nullable=True, joined_key="scored_adapter"), *last]


def filtered(adapters: QuerySet[Adapter], filters: Filters) -> QuerySet[Adapter]:
    """The adapters that the filters leave; the archived ones only when they are asked for."""
    is_in_state = Q(state=filters.state) if filters.state else ~Q(state=AdapterState.ARCHIVED)
    adapters = adapters.filter(is_in_state)
    if filters.base:
        adapters = adapters.filter(base_model__pk=int(filters.base))
    if filters.dataset:
        mixed = AdapterDataset.objects.filter(dataset_version__dataset=int(filters.dataset)).values("adapter")
        adapters = adapters.filter(Q(dataset_version__dataset=int(filters.dataset)) | Q(pk__in=mixed))
    if filters.method:
        adapters = adapters.filter(method=filters.method)
    if filters.alias:
        adapters = adapters.filter(aliases__name=filters.alias)
    if filters.tag:
        adapters = adapters.filter(tags__contains=[filters.tag])
    adapters = adapters.filter(matches(filters.text))
    if not (filters.is_every_version or filters.alias):
        newer = Adapter.objects.filter(
            team_id=OuterRef("team_id"), name=OuterRef("name"), version__gt=OuterRef("version")
        )
        adapters = adapters.filter(~Exists(newer))
    return adapters


def matches(text: str) -> Q:
    """Adapters with every word of a text as the beginning of a word of name or card, or as a tag; all for no words."""
    found = Q()
    for word in _WORD.findall(text)[:MAX_WORDS]:
        # One word alone, in quotes: nothing of what a person types is syntax.
        begins = SearchQuery(f"'{word}':*", config="simple", search_type="raw")
        found &= Q(search=begins) | Q(tags__contains=[word.lower()])
    # A tag may hold what parts words: v1.2, de-AT.
    return (found | Q(tags__contains=[text.lower()])) if found else found


def filter_choices(team: Team) -> dict[str, list[Choice]]:
    """What a team's adapters can be filtered by: only what occurs."""
    return _as_choices(_with_choices(team).get())


def choices_and_views(team: Team, user: User) -> tuple[dict[str, list[Choice]], list[dict[str, Any]]]:
    """`filter_choices`, and the saved views that a person sees: id, name, query, is_shared, user_id; one query."""
    seen = SavedView.objects.filter(Q(user=user) | Q(is_shared=True), team=OuterRef("pk")).order_by("name", "pk")
    columns = JSONObject(id="pk", name="name", query="query", is_shared="is_shared", user_id="user_id")
    found: Any = _with_choices(team).annotate(views=ArraySubquery(seen.values(json=columns))).get()
    return _as_choices(found), found.views


def _with_choices(team: Team) -> QuerySet[Team]:
    named = JSONObject(id="pk", name="name")
    # Asked from their side, each ends at its first adapter; asked from that of the adapters, every one is read.
    bases = BaseModel.objects.filter(Exists(Adapter.objects.filter(team=team, base_model=OuterRef("pk"))))
    datasets = Dataset.objects.filter(
        Exists(Adapter.objects.filter(dataset_version__dataset=OuterRef("pk")))
        | Exists(AdapterDataset.objects.filter(dataset_version__dataset=OuterRef("pk"))),
        team=team,
    )
    used = Adapter.objects.filter(team=team).order_by().values("method").distinct()
    aliases = Alias.objects.filter(team=team).order_by("name").values("name").distinct()
    return Team.objects.filter(pk=team.pk).annotate(
        offered_bases=ArraySubquery(bases.values(json=named)),
        offered_datasets=ArraySubquery(datasets.values(json=named)),
        offered_methods=ArraySubquery(used),
        offered_aliases=ArraySubquery(aliases),
    )


def _as_choices(found: Any) -> dict[str, list[Choice]]:
    return {
        "base": _choices({str(one["id"]): one["name"] for one in found.offered_bases}),
        "method": _choices({name: method_label(name) for name in found.offered_methods}),
        "dataset": _choices({str(one["id"]): one["name"] for one in found.offered_datasets}),
        "alias": _choices({name: f"@{name}" for name in found.offered_aliases}),
        "state": [Choice(value, label) for value, label in AdapterState.choices],
    }


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


def column_choices() -> list[Choice]:
    """What columns a list can have: facts, then metrics."""
    return [Choice(name, label) for name, label in FACTS.items()] + [
        Choice(name, one.label) for name, one in evaluations().items()
    ]


def page_url(query: QueryDict, **cursor: str) -> str:
    """The same list at another page: `after` or `before` a cursor; empty for an empty cursor."""
    if not any(cursor.values()):
        return ""
    changed: Any = query.copy()
    for name in ("after", "before"):
        changed.pop(name, None)
    changed.update(cursor)
    return f"?{changed.urlencode()}"

"""The list of adapters: filters, search, saved views, exports, and what is compared."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from django.contrib import messages
from django.db.models import Prefetch
from django.http import HttpResponse, HttpResponseBase, QueryDict
from django.shortcuts import get_object_or_404, redirect, render
from django.urls import reverse
from django.views.decorators.http import require_GET, require_POST

from studio.accounts.access import TeamRequest, team_page
from studio.accounts.models import record
from studio.catalogue import listing, saved_views
from studio.catalogue.lineage import mixed_rows
from studio.catalogue.models import Adapter, SavedView, Score, TestSet
from studio.csv_tables import csv_response
from studio.query_values import whole_number
from studio.streaming import stream
from workers.evaluations import evaluations

EXPORTED_AT_ONCE = 500
COLUMNS = (
    "name", "version", "state", "aliases", "tags", "base_model", "method", "dataset", "evaluation", "num_rows", "value",
    "low", "high", "base_value", "difference", "difference_low", "difference_high", "p_value", "verdict",
    "num_trainable", "num_bytes", "created_by", "created_at", "url",
)  # fmt: skip


@require_GET
@team_page()
def adapters(request: TeamRequest) -> HttpResponse:
    """The team's adapters, the best first."""
    choices, views = listing.choices_and_views(request.team, request.user)
    filters = listing.Filters.from_query(request.GET, choices)
    page = listing.list_adapters(request.team, filters, request.GET)
    shown = request.GET.copy()
    for name in ("after", "before"):
        shown.pop(name, None)
    return render(
        request,
        "catalogue/adapters.html",
        {
            "page": page,
            "filters": filters,
            "metric": evaluations()[filters.metric],
            "choices": choices,
            "sorts": listing.sort_choices(),
            "column_choices": listing.column_choices(),
            "other_query": [
                (name, value) for name in shown if name not in ("col", "cols") for value in shown.getlist(name)
            ],
            "views": views,
            "shown_query": shown.urlencode(),
            "previous_url": listing.page_url(request.GET, before=page.before),
            "next_url": listing.page_url(request.GET, after=page.after),
        },
    )


@require_GET
@team_page()
def export(request: TeamRequest, kind: str) -> HttpResponseBase:
    """The list as it is filtered, all pages of it, as CSV or as JSON lines."""
    filters = listing.Filters.from_query(request.GET, listing.filter_choices(request.team))
    rows = listing.filtered(request.team.adapters.all(), filters)
    root = request.build_absolute_uri("/").rstrip("/")
    record("catalogue.exported", team=request.team, user=request.user, kind=kind)
    found = _exported(rows, filters.metric, root)
    if kind == "csv":
        return csv_response(request, "adapters.csv", COLUMNS, ([row[name] for name in COLUMNS] for row in found))
    response = stream(request, _json_lines(found), content_type="application/x-ndjson")
    response["Content-Disposition"] = 'attachment; filename="adapters.jsonl"'
    return response


@require_POST
@team_page()
def save_view(request: TeamRequest) -> HttpResponse:
    """Keep the filters and columns of the list under a name."""
    query = request.POST.get("query", "")
    try:
        view = saved_views.save_view(
            team=request.team, user=request.user, name=request.POST.get("name", ""), query=query,
            is_shared="shared" in request.POST,
        )  # fmt: skip
    except saved_views.ViewError as error:
        messages.error(request, f"{error.message} {error.next_step}".strip())
    else:
        messages.success(request, f"The view “{view.name}” is saved.")
    return redirect(f"{reverse('catalogue:adapters')}?{saved_views.kept_query(query)}")


@require_POST
@team_page()
def delete_view(request: TeamRequest, view_id: int) -> HttpResponse:
    """Forget one of the person's own views."""
    found = get_object_or_404(SavedView, pk=view_id, team=request.team, user=request.user)
    found.delete()
    messages.success(request, f"The view “{found.name}” is gone.")
    return redirect("catalogue:adapters")


def chosen_ids(query: QueryDict) -> list[int]:
    """The numbers that `run` parameters, or one `runs` with commas, name; each once, in their order."""
    texts = [*query.getlist("run"), *query.get("runs", "").split(",")]
    numbers = (whole_number(text.strip()) for text in texts)
    return list(dict.fromkeys(number for number in numbers if number is not None))


def _exported(rows: Any, metric: str, root: str) -> Iterator[dict[str, Any]]:
    scores = Score.objects.filter(evaluation=metric, test_set=TestSet.HELD_OUT)
    found = (
        rows.select_related("base_model", "dataset_version__dataset", "created_by")
        .defer("recipe", "files", "provenance", "card", "overlap", "suspicious", "sources", "search")
        .prefetch_related("aliases", Prefetch("scores", scores, to_attr="exported_scores"))
        .order_by("pk")
    )
    for adapter in found.iterator(chunk_size=EXPORTED_AT_ONCE):
        yield {
            **{name: getattr(adapter, name) for name in ("name", "version", "state", "num_trainable", "num_bytes")},
            "tags": list(adapter.tags),
            "aliases": [one.name for one in adapter.aliases.all()],
            "base_model": adapter.base_model.name,
            "method": adapter.method,
            "dataset": adapter.data_label,
            "evaluation": metric,
            **_figures(next(iter(adapter.exported_scores), None)),
            "created_by": adapter.created_by.display_name(),
            "created_at": adapter.created_at.isoformat(),
            "url": root + adapter.get_absolute_url(),
        }


def _figures(score: Score | None) -> dict[str, Any]:
    names = (
        "num_rows",
        "value",
        "low",
        "high",
        "base_value",
        "difference",
        "difference_low",
        "difference_high",
        "p_value",
    )
    if score is None:
        return {**dict.fromkeys(names), "verdict": None}
    return {**{name: getattr(score, name) for name in names}, "verdict": str(score.verdict())}


def _json_lines(rows: Iterator[dict[str, Any]]) -> Iterator[str]:
    for row in rows:
        yield json.dumps(row, ensure_ascii=False) + "\n"


def adapters_by_id(request: TeamRequest, ids: list[int]) -> list[Adapter]:
    """The team's adapters of these numbers, in their order; others are left out."""
    rows = request.team.adapters.annotate(mixed_rows=mixed_rows())
    rows = rows.select_related("base_model", "dataset_version__dataset", "created_by").defer(
        "files",
        "card",
        "suspicious",
        "sources",
        "search",
        "base_model__files",
        "base_model__shape",
        "dataset_version__statistics",
    )
    found = {one.pk: one for one in rows.filter(pk__in=ids)}
    return [found[pk] for pk in ids if pk in found]

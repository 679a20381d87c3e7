"""Pages of what ran on a suite: its rows, with both answers to each."""

from __future__ import annotations

from django.http import HttpResponse
from django.shortcuts import get_object_or_404, render
from django.views.decorators.http import require_GET

from studio.accounts.access import TeamRequest, team_page
from studio.catalogue.models import TestSet
from studio.catalogue.run_samples import DIFFS, Filters, metrics_of, run_page


@require_GET
@team_page()
def run(request: TeamRequest, run_id: int) -> HttpResponse:
    """A run's rows: prompt, expected answer, both answers and their figures; the rows after those shown, for htmx."""
    runs = request.team.evaluation_runs.filter(test_set=TestSet.SUITE).select_related("suite", "adapter", "base_model")
    runs = runs.defer("adapter__recipe", "adapter__files", "adapter__provenance", "adapter__suspicious",
                      "adapter__sources", "base_model__files", "base_model__shape")  # fmt: skip
    found = get_object_or_404(runs, pk=run_id)
    metrics = metrics_of(found)
    filters = Filters.from_query(request.GET, metrics)
    page = run_page(found, filters)
    others = []
    if found.adapter is not None:
        rows = request.team.evaluation_runs.filter(adapter=found.adapter, test_set=TestSet.SUITE)
        others = list(rows.select_related("suite").order_by("-created_at")[:50])
    context = {
        "run": found, "filters": filters, "page": page, "metrics": metrics.values(), "others": others,
        "diffs": list(DIFFS.items()), "more_query": filters.query(after=page.more) if page.more else "",
        "chosen": metrics.get(filters.metric),
    }  # fmt: skip
    is_more = "HX-Request" in request.headers and filters.after is not None
    return render(request, "catalogue/_run_rows.html" if is_more else "catalogue/run.html", context)

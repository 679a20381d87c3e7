"""The loss curves of the jobs that made several adapters, for one chart, and the same figures as a table."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from uuid import UUID

from django.http import HttpResponse, JsonResponse
from django.shortcuts import render
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_GET

from jobs.models import Job, MetricPoint
from jobs.series import Point, downsample, merge
from studio.accounts.access import TeamRequest, team_page
from studio.query_values import whole_number

MAX_CURVES = 10
MAX_POINTS = 300
"""Points of one curve: ten of them share a chart."""
MAX_ROWS = 100
"""Steps with a validation that the table shows, evenly chosen; the first and the last always."""


@dataclass(frozen=True)
class Curve:
    """An adapter's job and its losses by step, in nats per token."""

    job: Job
    points: list[Point]

    @property
    def label(self) -> str:
        assert self.job.adapter is not None
        return f"{self.job.adapter.name} v{self.job.adapter.version}"

    @property
    def first(self) -> float | None:
        """The training loss of the first step."""
        return next((point.loss for point in self.points if point.loss is not None), None)

    @property
    def last(self) -> float | None:
        """The training loss of the last step."""
        return next((point.loss for point in reversed(self.points) if point.loss is not None), None)

    @property
    def best(self) -> Point | None:
        """The point with the lowest validation loss."""
        checked = [point for point in self.points if point.validation_loss is not None]
        return min(checked, key=lambda point: point.validation_loss or 0.0, default=None)

    @property
    def num_steps(self) -> int:
        return self.points[-1].step if self.points else 0


def curves_of(request: TeamRequest) -> list[Curve]:
    """The curves of the team's adapters that `adapters` names with commas, in that order; others are left out."""
    asked = [whole_number(text.strip()) for text in request.GET.get("adapters", "")[:400].split(",")]
    ids = list(dict.fromkeys(number for number in asked if number is not None))[:MAX_CURVES]
    jobs = request.team.jobs.filter(adapter_id__in=ids).select_related("adapter").only(
        "team_id", "name", "adapter__name", "adapter__version", "adapter__team_id"
    )  # fmt: skip
    by_adapter = {job.adapter_id: job for job in jobs}
    rows = MetricPoint.objects.filter(job__in=list(by_adapter.values())).order_by("step", "attempt")
    points: dict[UUID, list[Point]] = defaultdict(list)
    for job_id, step, attempt, loss, validation in rows.values_list(
        "job_id", "step", "attempt", "loss", "validation_loss"
    ).iterator(2000):
        points[job_id].append(Point(step, attempt, loss, validation))
    return [Curve(by_adapter[pk], merge(points[by_adapter[pk].pk])) for pk in ids if pk in by_adapter]


@require_GET
@never_cache
@team_page()
def curves_json(request: TeamRequest) -> JsonResponse:
    """The curves for the chart: {"curves": [{"label", "points": [[step, loss, validation loss], ...]}]}."""
    found = [
        {
            "label": curve.label,
            "points": [
                [point.step, point.loss, point.validation_loss] for point in downsample(curve.points, MAX_POINTS)
            ],
        }
        for curve in curves_of(request)
    ]
    return JsonResponse({"curves": found})


@require_GET
@team_page()
def curves(request: TeamRequest) -> HttpResponse:
    """The curves as tables, for those who do not see charts: how each went, and the validation losses by step."""
    found = curves_of(request)
    return render(request, "jobs/curves.html", {"curves": found, "rows": validation_rows(found)})


def validation_rows(curves: list[Curve]) -> list[tuple[int, list[float | None]]]:
    """(step, the validation loss of each curve there or None), of steps at which one of them has one."""
    checked = [{point.step: point.validation_loss for point in curve.points if point.validation_loss is not None}
               for curve in curves]  # fmt: skip
    steps = sorted({step for one in checked for step in one})
    if len(steps) > MAX_ROWS:
        steps = [steps[round(row * (len(steps) - 1) / (MAX_ROWS - 1))] for row in range(MAX_ROWS)]
    return [(step, [one.get(step) for one in checked]) for step in steps]

"""How long a job will take, learned from finished jobs.

The engine's estimate (workers/memory.py) is corrected on a logarithmic scale: log(actual / estimate) is learned. Jobs
of all teams on a device give one number, the median of that, and nothing else of them; the team's own finished jobs
give the rest, by ridge regression (Hoerl and Kennard 1970) on the estimate, the tokens, the method, the base model and
the device. The penalty draws every coefficient to 0, which is the estimate as it stands: few jobs change little.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from django.db.models import F, FloatField, OuterRef, QuerySet, Subquery, Sum
from django.db.models.fields.json import KT
from django.db.models.functions import Cast, Extract
from django.utils import timezone

from jobs.models import Job, JobAttempt, JobKind, JobState
from studio.accounts.models import Team

MAX_LEARNED_FROM = 300
"""The newest finished jobs that are looked at: software and machines change."""
MIN_POOLED = 3
"""Jobs of all teams on a device below which their median says nothing."""
PENALTY = 1.0


@dataclass(frozen=True)
class Features:
    """What the duration of a job depends on."""

    estimated_seconds: float
    num_tokens: float
    method: str
    base_model: str
    device: str


@dataclass(frozen=True)
class Finished:
    """A job that has succeeded, and how long its attempts held a device in all."""

    features: Features
    seconds: float
    finished_at: datetime
    team_id: int

    @property
    def log_ratio(self) -> float:
        return math.log(self.seconds / self.features.estimated_seconds)


@dataclass(frozen=True)
class Prediction:
    """How long jobs take: `expected(features)`."""

    pooled: Mapping[str, float]
    """log(actual / estimate) by device, over all teams."""
    coefficients: Mapping[str, float]
    """The team's own corrections, by column."""
    centre: tuple[float, float]
    """Means of the logarithms of estimate and tokens."""

    def expected(self, features: Features) -> float:
        """Seconds that such a job should hold a device."""
        row = _row(features, self.centre)
        own = sum(value * self.coefficients.get(column, 0.0) for column, value in row.items())
        return features.estimated_seconds * math.exp(self.pooled.get(features.device, 0.0) + own)


def expected_seconds(team: Team, estimate: Mapping[str, Any], *, method: str, base_model: str) -> float | None:
    """Seconds that a job of the team should hold a device; None when it has no estimate to begin with.

    Args:
        estimate: as stored with a job: seconds_low, seconds_high, num_tokens, device.
    """
    features = features_of(estimate, method=method, base_model=base_model)
    if features is None:
        return None
    own = finished_jobs(Job.objects.filter(team=team))
    return learn(own, pooled_ratios(finished_jobs(Job.objects.all()))).expected(features)


def features_of(
    estimate: Mapping[str, Any], *, method: str, base_model: str, device: str | None = None
) -> Features | None:
    """The features of a job from its stored estimate; None when that says no time."""
    low, high = estimate.get("seconds_low"), estimate.get("seconds_high")
    if not low or not high:
        return None
    return Features(
        estimated_seconds=(low + high) / 2,
        num_tokens=max(1.0, float(estimate.get("num_tokens") or 1)),
        method=method,
        base_model=base_model,
        device=device or str(estimate.get("device", "")),
    )


def finished_jobs(jobs: QuerySet[Job]) -> list[Finished]:
    """The newest succeeded ones of these jobs, the newest first."""
    attempts = JobAttempt.objects.filter(job=OuterRef("pk"), ended_at__isnull=False)
    held = (
        attempts.order_by()
        .values("job")
        .annotate(seconds=Sum(Extract(F("ended_at") - F("started_at"), "epoch"), output_field=FloatField()))
    )
    rows = (
        jobs.filter(kind=JobKind.TRAIN, state=JobState.SUCCEEDED)
        .annotate(
            held_seconds=Subquery(held.values("seconds"), output_field=FloatField()),
            ran_on=Subquery(attempts.order_by("-number").values("worker__device")[:1]),
            seconds_low=Cast(KT("estimate__seconds_low"), FloatField()),
            seconds_high=Cast(KT("estimate__seconds_high"), FloatField()),
            num_tokens=Cast(KT("estimate__num_tokens"), FloatField()),
            estimated_device=KT("estimate__device"),
            method=KT("recipe__method"),
        )
        .filter(held_seconds__gt=0, seconds_low__gt=0, seconds_high__gt=0)
        .order_by("-finished_at")
        .values("held_seconds", "ran_on", "seconds_low", "seconds_high", "num_tokens", "estimated_device", "method",
                "base_model__name", "finished_at", "team_id")[:MAX_LEARNED_FROM]
    )  # fmt: skip
    return [
        Finished(
            Features(
                estimated_seconds=(row["seconds_low"] + row["seconds_high"]) / 2,
                num_tokens=max(1.0, row["num_tokens"] or 1.0),
                method=row["method"] or "",
                base_model=row["base_model__name"],
                device=row["ran_on"] or row["estimated_device"] or "",
            ),
            seconds=row["held_seconds"],
            finished_at=row["finished_at"] or timezone.now(),
            team_id=row["team_id"],
        )
        for row in rows
    ]


def pooled_ratios(finished: Sequence[Finished]) -> dict[str, float]:
    """The median of log(actual / estimate) by device, where enough jobs have run on it."""
    by_device: dict[str, list[float]] = {}
    for job in finished:
        by_device.setdefault(job.features.device, []).append(job.log_ratio)
    return {device: statistics.median(ratios) for device, ratios in by_device.items() if len(ratios) >= MIN_POOLED}


def learn(own: Sequence[Finished], pooled: Mapping[str, float]) -> Prediction:
    """What a team's finished jobs say beyond the pooled medians."""
    if not own:
        return Prediction(pooled, {}, (0.0, 0.0))
    centre = (
        statistics.fmean(math.log(job.features.estimated_seconds) for job in own),
        statistics.fmean(math.log(job.features.num_tokens) for job in own),
    )
    rows = [_row(job.features, centre) for job in own]
    targets = [job.log_ratio - pooled.get(job.features.device, 0.0) for job in own]
    return Prediction(pooled, _ridge(rows, targets), centre)


def held_out_errors(finished: Sequence[Finished], share: float = 0.2) -> tuple[list[float], list[float]]:
    """Relative errors on the newest share of each team's jobs, each predicted from what had finished before it.

    Returns:
        |expected / actual - 1| by the engine's estimate alone, and as learned.
    """
    ordered = sorted(finished, key=lambda job: job.finished_at)
    by_estimate, learned = [], []
    for team_id in {job.team_id for job in ordered}:
        own = [job for job in ordered if job.team_id == team_id]
        for job in own[len(own) - max(1, round(share * len(own))) :]:
            before = [one for one in ordered if one.finished_at < job.finished_at][-MAX_LEARNED_FROM:]
            prediction = learn([one for one in before if one.team_id == team_id], pooled_ratios(before))
            by_estimate.append(abs(job.features.estimated_seconds / job.seconds - 1))
            learned.append(abs(prediction.expected(job.features) / job.seconds - 1))
    return by_estimate, learned


def _row(features: Features, centre: tuple[float, float]) -> dict[str, float]:
    """A job as a row of the regression, only the columns that are not 0."""
    return {
        "constant": 1.0,
        "estimate": math.log(features.estimated_seconds) - centre[0],
        "tokens": math.log(features.num_tokens) - centre[1],
        f"method {features.method}": 1.0,
        f"base {features.base_model}": 1.0,
        f"device {features.device}": 1.0,
    }


def _ridge(rows: Sequence[Mapping[str, float]], targets: Sequence[float]) -> dict[str, float]:
    """Coefficients b that minimise |y - X b|^2 + PENALTY |b|^2, from the normal equations."""
    columns = sorted({column for row in rows for column in row})
    place = {column: index for index, column in enumerate(columns)}
    size = len(columns)
    matrix = [[PENALTY if i == j else 0.0 for j in range(size)] for i in range(size)]
    right = [0.0] * size
    for row, target in zip(rows, targets, strict=True):
        for one, value in row.items():
            right[place[one]] += value * target
            for other, factor in row.items():
                matrix[place[one]][place[other]] += value * factor
    return dict(zip(columns, _solve(matrix, right), strict=True))


def _solve(matrix: list[list[float]], right: list[float]) -> list[float]:
    """x of A x = b for a symmetric positive definite A (Cholesky)."""
    size = len(right)
    lower = [[0.0] * size for _ in range(size)]
    for i in range(size):
        for j in range(i + 1):
            rest = matrix[i][j] - sum(lower[i][k] * lower[j][k] for k in range(j))
            lower[i][j] = math.sqrt(rest) if i == j else rest / lower[j][j]
    middle: list[float] = []
    for i in range(size):
        middle.append((right[i] - sum(lower[i][k] * middle[k] for k in range(i))) / lower[i][i])
    solved = [0.0] * size
    for i in reversed(range(size)):
        solved[i] = (middle[i] - sum(lower[k][i] * solved[k] for k in range(i + 1, size))) / lower[i][i]
    return solved

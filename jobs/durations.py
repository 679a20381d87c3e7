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
from typing import Literal

from jobs.finished import MAX_LEARNED_FROM, Features, Finished
from workers.ridge import ridge

MIN_POOLED = 3
"""Jobs of all teams on a device below which their median says nothing."""
PENALTY = 1.0
SPREAD, SPREAD_WEIGHT = 0.43, 3
"""Standard deviation of log(actual / expected) before any job has finished, from the engine's own range (0.5 to 1.5
times its middle, as 80 %), and how many finished jobs that counts as."""
OF_80_PERCENT = 1.2816
"""Standard deviations of a normal distribution within which four of five values lie."""


Basis = Literal["arithmetic", "device", "team", "like"]


@dataclass(frozen=True)
class ExpectedTime:
    """Seconds that a job should hold a device.

    `num_jobs` finished ones of the team say so: those of the same method, base and device when `basis` is "like", all
    of them for "team". "device": jobs of all teams on the device; "arithmetic": nothing has finished there yet.
    """

    low: float
    high: float
    expected: float
    num_jobs: int
    basis: Basis


@dataclass(frozen=True)
class Prediction:
    """How long jobs take: `expected(features)`."""

    pooled: Mapping[str, float]
    """log(actual / estimate) by device, over all teams."""
    coefficients: Mapping[str, float]
    """The team's own corrections, by column."""
    centre: tuple[float, float]
    """Means of the logarithms of estimate and tokens."""
    spreads: Mapping[str, float]
    """Standard deviation of log(actual / expected) by device: of the team's own jobs, else of all teams'."""
    own: Mapping[tuple[str, str, str], int]
    """The team's finished jobs by method, base model and device."""
    num_own: int = 0

    def time_of(self, features: Features, low: float, high: float) -> ExpectedTime:
        """How long such a job should hold a device, as a range in which four of five such jobs end.

        Args:
            low, high: the engine's own range, which stands where no job has finished on the device.
        """
        num_like = self.own.get((features.method, features.base_model, features.device), 0)
        spread = self.spreads.get(features.device)
        if spread is None:
            return ExpectedTime(low, high, (low + high) / 2, 0, "arithmetic")
        expected = self.expected(features)
        factor = math.exp(OF_80_PERCENT * spread)
        basis: Basis = "like" if num_like else "team" if self.num_own else "device"
        return ExpectedTime(
            expected / factor, expected * factor, expected, num_like if num_like else self.num_own, basis
        )

    def expected(self, features: Features) -> float:
        """Seconds that such a job should hold a device."""
        row = _row(features, self.centre)
        own = sum(value * self.coefficients.get(column, 0.0) for column, value in row.items())
        return features.estimated_seconds * math.exp(self.pooled.get(features.device, 0.0) + own)


def pooled_ratios(finished: Sequence[Finished]) -> dict[str, float]:
    """The median of log(actual / estimate) by device, where enough jobs have run on it."""
    by_device: dict[str, list[float]] = {}
    for job in finished:
        by_device.setdefault(job.features.device, []).append(job.log_ratio)
    return {device: statistics.median(ratios) for device, ratios in by_device.items() if len(ratios) >= MIN_POOLED}


def learn(own: Sequence[Finished], everyone: Sequence[Finished]) -> Prediction:
    """What a team's finished jobs say beyond the median of everyone's on each device."""
    pooled = pooled_ratios(everyone)
    residuals = {
        device: [job.log_ratio - middle for job in everyone if job.features.device == device]
        for device, middle in pooled.items()
    }
    prediction = Prediction(pooled, {}, (0.0, 0.0), {device: _spread(found) for device, found in residuals.items()}, {})
    if not own:
        return prediction
    centre = (
        statistics.fmean(math.log(job.features.estimated_seconds) for job in own),
        statistics.fmean(math.log(job.features.num_tokens) for job in own),
    )
    rows = [_row(job.features, centre) for job in own]
    targets = [job.log_ratio - pooled.get(job.features.device, 0.0) for job in own]
    counts: dict[tuple[str, str, str], int] = {}
    for job in own:
        key = (job.features.method, job.features.base_model, job.features.device)
        counts[key] = counts.get(key, 0) + 1
    coefficients = ridge(rows, targets, PENALTY)
    left: dict[str, list[float]] = {}
    for job, row, target in zip(own, rows, targets, strict=True):
        explained = sum(value * coefficients[column] for column, value in row.items())
        left.setdefault(job.features.device, []).append(target - explained)
    spreads = {**prediction.spreads, **{device: _spread(found) for device, found in left.items()}}
    return Prediction(pooled, coefficients, centre, spreads, counts, len(own))


def _spread(residuals: Sequence[float]) -> float:
    """Standard deviation of residuals whose mean is 0, drawn towards SPREAD where they are few."""
    squares = SPREAD_WEIGHT * SPREAD**2 + sum(one**2 for one in residuals)
    return math.sqrt(squares / (SPREAD_WEIGHT + len(residuals)))


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
            prediction = learn([one for one in before if one.team_id == team_id], before)
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

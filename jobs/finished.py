"""The newest jobs that have succeeded: what was estimated of them, how long they held a device and how much memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from django.db.models import F, FloatField, OuterRef, QuerySet, Subquery, Sum
from django.db.models.fields.json import KT, KeyTextTransform
from django.db.models.functions import Cast, Extract
from django.utils import timezone

from jobs.models import TRAINED, Job, JobAttempt
from workers.measured_memory import MeasuredRun, MemoryParts

MAX_LEARNED_FROM = 300
"""The newest finished jobs that are looked at: software and machines change."""


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
    """A job that has succeeded, and how long its attempts held a device in all.

    `memory` is None where no peak was measured, or where the run had fewer rows at once than its estimate was made for.
    """

    job_id: UUID
    features: Features
    seconds: float
    finished_at: datetime
    team_id: int
    memory: MeasuredRun | None = None

    @property
    def log_ratio(self) -> float:
        return math.log(self.seconds / self.features.estimated_seconds)


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


def finished_jobs(jobs: QuerySet[Job], *, limit: int = MAX_LEARNED_FROM) -> list[Finished]:
    """The newest succeeded ones of these jobs, the newest first."""
    attempts = JobAttempt.objects.filter(job=OuterRef("pk"), ended_at__isnull=False)
    held = (
        attempts.order_by()
        .values("job")
        .annotate(seconds=Sum(Extract(F("ended_at") - F("started_at"), "epoch"), output_field=FloatField()))
    )
    # Where an attempt ran out of memory, the next one has fewer rows at once: it is not what was estimated.
    peaks = attempts.order_by("-peak_memory_bytes").values("peak_memory_bytes")
    rows = (
        jobs.filter(TRAINED)
        .annotate(
            held_seconds=Subquery(held.values("seconds"), output_field=FloatField()),
            ran_on=Subquery(attempts.order_by("-number").values("worker__device")[:1]),
            ran_on_kind=Subquery(attempts.order_by("-number").values("worker__device_kind")[:1]),
            peak=Subquery(peaks[:1]),
            seconds_low=Cast(KT("estimate__seconds_low"), FloatField()),
            seconds_high=Cast(KT("estimate__seconds_high"), FloatField()),
            method=KT("recipe__method"),
            precision=KT("recipe__precision"),
            family=KeyTextTransform("family", "base_model__shape"),
            layers=KeyTextTransform("num_layers", "base_model__shape"),
            hidden=KeyTextTransform("hidden_size", "base_model__shape"),
            vocabulary=KeyTextTransform("vocabulary_size", "base_model__shape"),
        )
        .filter(held_seconds__gt=0, seconds_low__gt=0, seconds_high__gt=0)
        .order_by("-finished_at")
        .values("pk", "held_seconds", "ran_on", "ran_on_kind", "peak", "seconds_low", "seconds_high", "method",
                "precision", "family", "layers", "hidden", "vocabulary", "estimate", "base_model__name",
                "micro_batch_size", "finished_at", "team_id")[:limit]
    )  # fmt: skip
    return [
        Finished(
            row["pk"],
            Features(
                estimated_seconds=(row["seconds_low"] + row["seconds_high"]) / 2,
                num_tokens=max(1.0, float(row["estimate"].get("num_tokens") or 1)),
                method=row["method"] or "",
                base_model=row["base_model__name"],
                device=row["ran_on"] or row["estimate"].get("device") or "",
            ),
            seconds=row["held_seconds"],
            finished_at=row["finished_at"] or timezone.now(),
            team_id=row["team_id"],
            memory=_measured_run(row),
        )
        for row in rows
    ]


def _measured_run(row: Mapping[str, Any]) -> MeasuredRun | None:
    estimate = row["estimate"]
    names = ("weights_bytes", "adapter_bytes", "optimizer_bytes", "activations_bytes", "runtime_bytes")
    if not row["peak"] or row["micro_batch_size"] is not None or not all(name in estimate for name in names):
        return None
    parts = MemoryParts(
        fixed=estimate["weights_bytes"] + estimate["adapter_bytes"] + estimate["optimizer_bytes"],
        activations=estimate["activations_bytes"],
        runtime=estimate["runtime_bytes"],
    )
    return MeasuredRun(
        # As workers.measured_memory.shape_key writes it.
        shape=f"{row['family']}-{row['layers']}x{row['hidden']}-{row['vocabulary']}",
        method=row["method"] or "",
        precision=row["precision"] or "",
        kind="cuda" if row["ran_on_kind"] == "cuda" else "cpu",
        device=row["ran_on"] or "",
        parts=parts,
        peak_bytes=row["peak"],
    )

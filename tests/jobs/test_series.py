from __future__ import annotations

import random

from django.conf import settings
from django.utils import timezone

from jobs import series
from jobs.models import Job, JobState, MetricPoint
from jobs.progress import add
from jobs.series import Point
from tests.jobs.conftest import MakeJob
from workers.events import MessageEvent, StepEvent, ValidationEvent


def step_event(step: int, loss: float = 1.0, **changes: float) -> StepEvent:
    values = {
        "num_steps": 1000, "epoch": 0.1, "learning_rate": 1e-4, "grad_norm": 0.5, "num_tokens": 100,
        "tokens_per_second": 200.0, "seconds_left": 60.0, "peak_memory_bytes": 10**9,
    } | changes  # fmt: skip
    return StepEvent(step=step, loss=loss, **values)  # type: ignore[arg-type]


def store(job: Job, step: int, loss: float | None = 1.0, *, attempt: int = 1, validation: float | None = None) -> None:
    MetricPoint.objects.create(
        job=job, attempt=attempt, step=step, loss=loss, validation_loss=validation, at=timezone.now()
    )


def test_the_stream_continues_where_postgres_ends_without_a_gap_or_a_double(make_job: MakeJob) -> None:
    job = make_job()
    for step in range(1, 1201):
        if step <= 700:
            store(job, step, loss=2.0)
        add(job.pk, 1, step_event(step, loss=2.0 if step <= 700 else 1.0))
    add(job.pk, 1, ValidationEvent(step=1200, loss=1.1, num_tokens=5))
    found = series.curve(job)
    assert [point.step for point in found] == list(range(1, 1201))
    assert found[-1].validation_loss == 1.1
    assert {point.loss for point in found[700:]} == {1.0}


def test_a_step_that_two_attempts_reached_counts_by_the_later_one(make_job: MakeJob) -> None:
    job = make_job()
    for step in (1, 2, 3):
        store(job, step, loss=9.0, attempt=1)
    store(job, 2, loss=5.0, attempt=2)
    add(job.pk, 1, step_event(3, loss=9.0))
    add(job.pk, 2, step_event(3, loss=4.0))
    assert [(point.step, point.loss) for point in series.curve(job)] == [(1, 9.0), (2, 5.0), (3, 4.0)]


def test_an_entry_that_cannot_be_read_is_left_out(make_job: MakeJob) -> None:
    job = make_job()
    series.stream_client().xadd(series.stream_key(job.pk), {"attempt": "x", "event": "{"})
    add(job.pk, 1, MessageEvent(text="hello"))
    add(job.pk, 1, step_event(1))
    assert [point.step for point in series.curve(job)] == [1]


def test_without_redis_the_stored_curve_is_shown(make_job: MakeJob, monkeypatch: object) -> None:
    job = make_job()
    store(job, 1)
    series.stream_client.cache_clear()
    before = settings.REDIS_URL
    try:
        settings.REDIS_URL = "redis://127.0.0.1:1/0"
        assert [point.step for point in series.curve(job)] == [1]
    finally:
        settings.REDIS_URL = before
        series.stream_client.cache_clear()


def test_a_finished_job_needs_no_stream(make_job: MakeJob) -> None:
    job = make_job(state=JobState.FAILED)
    store(job, 1)
    add(job.pk, 1, step_event(2))
    assert [point.step for point in series.curve(job)] == [1]


def test_downsampling_keeps_every_peak_every_validation_and_both_ends() -> None:
    chance = random.Random(3)
    points = [Point(step=step, attempt=1, loss=1 + chance.random() / 10) for step in range(10_000)]
    points[4321] = Point(step=4321, attempt=1, loss=99.0)
    points[7777] = Point(step=7777, attempt=1, validation_loss=1.2)
    kept = series.downsample(points, 800)
    steps = [point.step for point in kept]
    assert len(kept) <= 803
    assert steps == sorted(set(steps))
    assert {0, 4321, 7777, 9999} <= set(steps)
    assert series.downsample(points[:500], 800) == points[:500]

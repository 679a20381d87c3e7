"""A job's curves for a chart: from Postgres, and from the live stream what Postgres does not have yet."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, cast
from uuid import UUID

import redis
from django.conf import settings
from pydantic import ValidationError

from jobs.models import Job, MetricPoint
from jobs.progress import stream_key
from workers.events import StepEvent, ValidationEvent, parse_event

logger = logging.getLogger(__name__)

COLUMNS = ("step", "loss", "validation_loss", "learning_rate", "grad_norm", "tokens_per_second")
"""The order of the numbers in a row that goes to a chart."""

MAX_POINTS = 800
_CHUNK = 500


@cache
def stream_client() -> redis.Redis:
    """The web process's client for reading streams; a page does not wait long for it."""
    return redis.Redis.from_url(settings.REDIS_URL, socket_timeout=2, socket_connect_timeout=1)


@dataclass(frozen=True)
class Point:
    """One step of a job's curves. Losses are in nats per token; None where a step has no such value."""

    step: int
    attempt: int
    loss: float | None = None
    validation_loss: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    tokens_per_second: float | None = None

    def row(self) -> list[float | int | None]:
        """The point as a chart reads it, in the order of COLUMNS."""
        return [getattr(self, column) for column in COLUMNS]

    def merged(self, later: Point) -> Point:
        """Both points of one step as one; values of a later attempt replace those of an earlier one."""
        if later.attempt < self.attempt:
            return later.merged(self)
        if later.attempt > self.attempt and later.loss is not None:
            return later
        known = {column: getattr(later, column) for column in COLUMNS if getattr(later, column) is not None}
        return replace(self, attempt=later.attempt, **known)


Entry = tuple[bytes, dict[bytes, bytes]]
"""A stream entry: its id, and its fields."""


def read_backwards(job_id: UUID, *, newest: bytes = b"+", count: int = 30) -> list[Entry]:
    """A job's newest stream entries from `newest` backwards; raises redis.RedisError."""
    return cast(list[Entry], stream_client().xrevrange(stream_key(job_id), max=newest, count=count) or [])


def point_of(event: Any, attempt: int) -> Point | None:
    """The point that a trainer's event adds to the curves; None for other events."""
    if isinstance(event, StepEvent):
        return Point(
            step=event.step,
            attempt=attempt,
            loss=event.loss,
            learning_rate=event.learning_rate,
            grad_norm=event.grad_norm,
            tokens_per_second=event.tokens_per_second,
        )
    if isinstance(event, ValidationEvent):
        return Point(step=event.step, attempt=attempt, validation_loss=event.loss)
    return None


def merge(points: Iterable[Point]) -> list[Point]:
    """One point per step, in the order of steps."""
    by_step: dict[int, Point] = {}
    for point in points:
        known = by_step.get(point.step)
        by_step[point.step] = known.merged(point) if known else point
    return [by_step[step] for step in sorted(by_step)]


def stored_points(job_id: UUID) -> list[Point]:
    """The points in Postgres; a step that several attempts reached counts by the highest."""
    rows = MetricPoint.objects.filter(job_id=job_id).order_by("step", "attempt")
    return merge(Point(**values) for values in rows.values("attempt", *COLUMNS).iterator(chunk_size=2000))


def streamed_points(job_id: UUID, after: Point | None) -> list[Point]:
    """The points in the job's stream that are newer than `after`; none when Redis does not answer."""
    found: list[Point] = []
    newest = b"+"
    try:
        while entries := read_backwards(job_id, newest=newest, count=_CHUNK):
            for _entry_id, fields in entries:
                parsed = parse_entry(fields)
                point = point_of(parsed.event, parsed.attempt) if parsed else None
                if point is None:
                    continue
                if after is not None and point.loss is not None:
                    if (point.attempt, point.step) <= (after.attempt, after.step) and point.attempt == after.attempt:
                        return found
                    if point.attempt < after.attempt:
                        continue  # said by an attempt whose successor has stored its steps already
                found.append(point)
            if len(entries) < _CHUNK:
                return found
            newest = b"(" + entries[-1][0]
    except redis.RedisError as error:
        logger.warning("The live end of the curves of %s is missing: %s", job_id, error)
    return found


@dataclass(frozen=True)
class Parsed:
    """A stream entry: which attempt said what."""

    attempt: int
    event: Any


def parse_entry(fields: dict[bytes, bytes]) -> Parsed | None:
    """A stream entry's fields as an event; None for one that says that some are missing, or that cannot be read."""
    if b"lost" in fields:
        return None
    try:
        return Parsed(int(fields[b"attempt"]), parse_event(fields[b"event"]))
    except (KeyError, ValueError, ValidationError) as error:
        logger.warning("A progress entry cannot be read: %s", error)
        return None


def curve(job: Job) -> list[Point]:
    """Every point of a job's curves, stored or still in its stream, one per step."""
    stored = stored_points(job.pk)
    if job.is_final():
        return stored
    newest = max((point for point in stored if point.loss is not None), default=None, key=_age)
    streamed = unfenced(reversed(streamed_points(job.pk, newest)), newest.attempt if newest else 0)
    return merge([*stored, *streamed])


def unfenced(points: Iterable[Point], attempt: int = 0) -> list[Point]:
    """Points in the order in which they were said, without those of an attempt whose successor had begun.

    Args:
        points: oldest first.
        attempt: the newest attempt that had begun before.
    """
    found = []
    for point in points:
        attempt = max(attempt, point.attempt)
        if point.attempt == attempt:
            found.append(point)
    return found


def _age(point: Point) -> tuple[int, int]:
    return point.attempt, point.step


def downsample(points: list[Point], limit: int = MAX_POINTS) -> list[Point]:
    """At most about `limit` points that keep every peak: the lowest and highest loss of each bucket of steps.

    Points with a validation loss, the first and the last always stay.
    """
    if len(points) <= limit:
        return points
    num_buckets = max(1, (limit - 2) // 2)
    keep = {0, len(points) - 1}
    keep.update(i for i, point in enumerate(points) if point.validation_loss is not None)
    for bucket in range(num_buckets):
        first = bucket * len(points) // num_buckets
        last = (bucket + 1) * len(points) // num_buckets
        losses = [(loss, i) for i in range(first, last) if (loss := points[i].loss) is not None]
        if losses:
            keep.add(min(losses)[1])
            keep.add(max(losses)[1])
    return [points[i] for i in sorted(keep)]


def points(job: Job, limit: int = MAX_POINTS) -> dict[str, Any]:
    """Curve data for the chart: {"columns": names, "points": rows in that order}, by step."""
    return {"columns": COLUMNS, "points": [point.row() for point in downsample(curve(job), limit)]}

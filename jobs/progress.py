"""Live progress: one Redis stream per job. Losing all of it loses no fact, only a few seconds of a live curve."""

from __future__ import annotations

import logging
import queue
import threading
import time
from functools import cache
from uuid import UUID

import redis
from django.conf import settings
from pydantic import BaseModel

logger = logging.getLogger(__name__)

MAX_ENTRIES = 10_000
KEEP_SECONDS = 7 * 24 * 3600
# Events that wait for Redis at most, and seconds for which it is left alone after it failed.
MAX_WAITING = 2000
SILENT_SECONDS = 3.0
FINISH_SECONDS = 3.0


def stream_key(job_id: UUID | str) -> str:
    """The Redis stream of a job. Entries hold `attempt` and `event`, the JSON of a workers.events model."""
    return f"progress:{job_id}"


@cache
def _client() -> redis.Redis:
    # Short time-outs: a slow Redis must not slow a training run down.
    return redis.Redis.from_url(settings.REDIS_URL, socket_timeout=1, socket_connect_timeout=1)


def add(job_id: UUID, attempt: int, event: BaseModel) -> None:
    """Append an event of an attempt to the job's stream; raises redis.RedisError."""
    key = stream_key(job_id)
    with _client().pipeline(transaction=False) as pipeline:
        pipeline.xadd(key, {"attempt": attempt, "event": event.model_dump_json()}, maxlen=MAX_ENTRIES, approximate=True)
        pipeline.expire(key, KEEP_SECONDS)
        pipeline.execute()


class Publisher(threading.Thread):
    """Publishes one attempt's events from a thread of its own, so that a hanging Redis delays nobody.

    Errors are counted and logged, never raised; what does not fit into the queue is dropped.
    """

    def __init__(self, job_id: UUID, attempt: int) -> None:
        super().__init__(name=f"publisher-{job_id}", daemon=True)
        self.job_id, self.attempt = job_id, attempt
        self.num_dropped = 0
        self._events: queue.Queue[BaseModel | None] = queue.Queue(MAX_WAITING)

    def publish(self, event: BaseModel) -> None:
        """Hand an event over; returns at once."""
        try:
            self._events.put_nowait(event)
        except queue.Full:
            self.num_dropped += 1

    def finish(self) -> None:
        """Publish what is left, for a few seconds at most."""
        try:
            self._events.put(None, timeout=FINISH_SECONDS)
        except queue.Full:
            return  # Redis hangs; the thread ends with the process.
        self.join(FINISH_SECONDS)

    def run(self) -> None:
        silent_until = 0.0
        while (event := self._events.get()) is not None:
            if time.monotonic() < silent_until:
                self.num_dropped += 1
                continue
            try:
                add(self.job_id, self.attempt, event)
            except redis.RedisError as error:
                if self.num_dropped == 0:
                    logger.warning("Live progress of job %s is interrupted: %s", self.job_id, error)
                self.num_dropped += 1
                # A Redis that timed out is left alone for a while, or the queue would never empty.
                silent_until = time.monotonic() + SILENT_SECONDS

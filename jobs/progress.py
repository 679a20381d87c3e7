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


# Checked where the stream is: a worker that was paused just before it published cannot be stopped anywhere else.
_APPEND = """
local newest = tonumber(redis.call('GET', KEYS[2]) or '0')
local attempt = tonumber(ARGV[1])
if attempt < newest then return 0 end
if attempt > newest then redis.call('SET', KEYS[2], attempt, 'EX', ARGV[3]) end
redis.call('XADD', KEYS[1], 'MAXLEN', '~', ARGV[2], '*', unpack(ARGV, 4))
redis.call('EXPIRE', KEYS[1], ARGV[3])
return 1
"""
_FENCE = """
if tonumber(ARGV[1]) > tonumber(redis.call('GET', KEYS[1]) or '0') then
    redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[2])
end
"""


def _fence_key(job_id: UUID) -> str:
    """Where the stream's highest attempt number is kept: what belongs to a lower one is refused."""
    return f"progress-attempt:{job_id}"


def add(job_id: UUID, attempt: int, event: BaseModel) -> None:
    """Append an event of an attempt to the job's stream, unless a later attempt has been heard of.

    Raises redis.RedisError.
    """
    fields = ("attempt", attempt, "event", event.model_dump_json())
    keys = [stream_key(job_id), _fence_key(job_id)]
    _client().register_script(_APPEND)(keys=keys, args=[attempt, MAX_ENTRIES, KEEP_SECONDS, *fields])


def fence(job_id: UUID, attempt: int) -> None:
    """Let the job's stream take nothing any more from attempts below this one; without Redis nothing happens."""
    try:
        _client().register_script(_FENCE)(keys=[_fence_key(job_id)], args=[attempt, KEEP_SECONDS])
    except redis.RedisError as error:
        logger.warning("The stream of job %s is not told that attempt %s was taken back: %s", job_id, attempt, error)


class Publisher(threading.Thread):
    """Publishes one attempt's events from a thread of its own, so that a hanging Redis delays nobody.

    Errors are counted and logged, never raised; what does not fit into the queue is dropped.
    """

    def __init__(self, job_id: UUID, attempt: int) -> None:
        super().__init__(name=f"publisher-{job_id}", daemon=True)
        self.job_id, self.attempt = job_id, attempt
        self.num_dropped = 0
        self._events: queue.Queue[BaseModel | None] = queue.Queue(MAX_WAITING)
        self._is_over = False

    def publish(self, event: BaseModel) -> None:
        """Hand an event over; returns at once."""
        try:
            self._events.put_nowait(event)
        except queue.Full:
            self.num_dropped += 1

    def finish(self) -> None:
        """Publish what is left, for a few seconds at most, and nothing after that."""
        try:
            self._events.put(None, timeout=FINISH_SECONDS)
            self.join(FINISH_SECONDS)
        except queue.Full:
            pass  # Redis hangs; the thread ends with the process.
        finally:
            self._is_over = True

    def run(self) -> None:
        silent_until = 0.0
        while (event := self._events.get()) is not None:
            if self._is_over or time.monotonic() < silent_until:
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

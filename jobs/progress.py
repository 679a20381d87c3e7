"""Live progress: one Redis stream per job. Losing all of it loses no fact, only a few seconds of a live curve."""

from __future__ import annotations

import logging
import queue
import threading
from functools import cache
from uuid import UUID

import redis
from django.conf import settings
from pydantic import BaseModel

from workers.events import PhaseEvent

logger = logging.getLogger(__name__)

MAX_ENTRIES = 10_000
KEEP_SECONDS = 7 * 24 * 3600
# Events that wait for Redis at most, and seconds for which it is left alone after it failed.
MAX_WAITING = 2000
SILENT_SECONDS = 3.0
FINISH_SECONDS = 3.0


def stream_key(job_id: UUID | str) -> str:
    """The Redis stream of a job.

    Entries hold `attempt` and `event`, the JSON of a workers.events model; or `attempt` and `lost`, how many events
    are missing at this place.
    """
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
    _append(job_id, attempt, "event", event.model_dump_json())


def add_gap(job_id: UUID, attempt: int, num_lost: int) -> None:
    """Say in the job's stream that events are missing here, so that who follows it looks into Postgres.

    Raises redis.RedisError.
    """
    _append(job_id, attempt, "lost", num_lost)


def _append(job_id: UUID, attempt: int, name: str, value: str | int) -> None:
    keys = [stream_key(job_id), _fence_key(job_id)]
    arguments: list[str | int] = [attempt, MAX_ENTRIES, KEEP_SECONDS, "attempt", attempt, name, value]
    _client().register_script(_APPEND)(keys=keys, args=arguments)


def fence(job_id: UUID, attempt: int) -> None:
    """Let the job's stream take nothing any more from attempts below this one; without Redis nothing happens."""
    try:
        _client().register_script(_FENCE)(keys=[_fence_key(job_id)], args=[attempt, KEEP_SECONDS])
    except redis.RedisError as error:
        logger.warning("The stream of job %s is not told that attempt %s was taken back: %s", job_id, attempt, error)


class Publisher(threading.Thread):
    """Publishes one attempt's events from a thread of its own, so that a hanging Redis delays nobody.

    It begins with a word of its own: what an earlier attempt still says after that is not shown any more. Errors
    are logged, never raised: events wait while Redis is away, and what does not fit into the queue is dropped,
    counted, and said in the stream.
    """

    def __init__(self, job_id: UUID, attempt: int) -> None:
        super().__init__(name=f"publisher-{job_id}", daemon=True)
        self.job_id, self.attempt = job_id, attempt
        self.num_dropped = 0
        self._num_told = 0
        self._events: queue.Queue[BaseModel | None] = queue.Queue(MAX_WAITING)
        self._is_ending = threading.Event()
        self._is_over = False

    def publish(self, event: BaseModel) -> None:
        """Hand an event over; returns at once."""
        try:
            self._events.put_nowait(event)
        except queue.Full:
            self.num_dropped += 1

    def finish(self) -> None:
        """Publish what is left, for a few seconds at most, and nothing after that."""
        self._is_ending.set()
        try:
            self._events.put(None, timeout=FINISH_SECONDS)
            self.join(FINISH_SECONDS)
        except queue.Full:
            pass  # Redis hangs; the thread ends with the process.
        finally:
            self._is_over = True

    def run(self) -> None:
        event: BaseModel | None = PhaseEvent(phase="preparing")
        while event is not None and self._deliver(event):
            event = self._events.get()

    def _deliver(self, event: BaseModel) -> bool:
        """Publish an event as soon as Redis takes it; False when it does not and there is no time left."""
        is_told = False
        while not self._is_over:
            try:
                if (num_lost := self.num_dropped - self._num_told) > 0:
                    add_gap(self.job_id, self.attempt, num_lost)
                    self._num_told += num_lost
                add(self.job_id, self.attempt, event)
            except redis.RedisError as error:
                if not is_told:
                    logger.warning("Live progress of job %s is interrupted: %s", self.job_id, error)
                    is_told = True
                # A Redis that timed out is left alone for a while.
                if self._is_ending.wait(SILENT_SECONDS):
                    return False
            else:
                return True
        return False

"""What the open job pages of one web process are told: each job is read, encoded and rendered once for all of them.

One task follows the Redis streams of all watched jobs, and one looks at their rows. Whatever they find becomes one
message, and each watcher's bounded queue gets a reference to it. The id of a message is the id of the last stream
entry in it, so that a browser which comes back with `Last-Event-ID` goes on exactly there.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
import re
import time
import uuid
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import Any
from uuid import UUID
from weakref import WeakKeyDictionary

import redis.asyncio
from django.conf import settings
from django.db import Error as DatabaseError
from django.template.loader import render_to_string
from redis.exceptions import RedisError

from jobs import series, showing
from jobs.database_thread import DatabaseThread
from jobs.models import FINAL_STATES, Job
from jobs.progress import stream_key
from jobs.samples import samples_context
from jobs.series import Entry
from jobs.watching import Visit, watching_users
from studio import draining

logger = logging.getLogger(__name__)

# A watcher that has this many messages unread is closed; its browser comes back for a snapshot.
MAX_WAITING_MESSAGES = 100
# Messages of a feed that are kept for browsers which come back.
MAX_KEPT_MESSAGES = 256
MAX_MISSED_MESSAGES = 4
MAX_STREAMS_PER_USER = 20
# Points of one job go out at most this often; after a pause the first goes at once.
SECONDS_BETWEEN_POINTS = 0.1
# The parts of a page that the server renders are looked at this often while points arrive, and while none do.
SECONDS_BETWEEN_RENDERINGS = 1.0
SECONDS_BETWEEN_LOOKS = 3.0
# Share of the time in which pages are rendered, at most: with many jobs the parts come less often.
RENDERING_SHARE = 0.25
SECONDS_BETWEEN_PINGS = 15.0
SECONDS_BETWEEN_CHECKS = 60.0
# A stream ends on its own after this long, so that no connection lives for ever; the browser comes back.
MAX_SECONDS = 3600.0
# A watcher that was told to go and does not read even that is cut off after this long.
SECONDS_TO_LEAVE = 10.0
# A feed without watchers is kept this long, for a page that is loaded again.
SECONDS_TO_LINGER = 20.0
SNAPSHOT_SECONDS = 5.0
SECONDS_FOR_REDIS = 3.0
SECONDS_BETWEEN_SIGNS = 1.0
_REDIS_CONNECTIONS = 4
_BLOCK_MILLISECONDS = 100
_GATHER_SECONDS = 0.01
_CHUNK = 500
_TAIL = 100
_NOTHING_YET = b"0-0"

_ENTRY_ID = re.compile(r"[0-9]{1,20}-[0-9]{1,20}")

PING = b": ping\n\n"


@dataclass(frozen=True)
class Message:
    """Bytes for a browser."""

    content: bytes


@dataclass(frozen=True)
class Kept:
    """Points that went out as one message; `last` is the id of its last stream entry, `key` the same to compare."""

    points: Sequence[series.Point]
    last: bytes
    key: tuple[int, int]
    message: Message


def encode(data: str, *, event: str = "", entry_id: bytes = b"", retry_milliseconds: int = 0) -> bytes:
    """One server-sent event. Every line of the data needs its own field name."""
    lines = [f"id: {entry_id.decode()}"] if entry_id else []
    if retry_milliseconds:
        lines.append(f"retry: {retry_milliseconds}")
    if event:
        lines.append(f"event: {event}")
    lines.extend(f"data: {line}" for line in data.splitlines() or [""])
    return ("\n".join(lines) + "\n\n").encode()


# The empty id has the browser forget its place: what follows, now or at its next visit, is a snapshot.
RESET = Message(b"id:\n" + encode("{}", event="reset"))
END = Message(encode("{}", event="end"))


def key_of(entry_id: bytes) -> tuple[int, int]:
    """A stream entry's id as numbers, which compare as Redis compares them."""
    milliseconds, _, number = entry_id.partition(b"-")
    return int(milliseconds), int(number)


@dataclass(eq=False)
class Watcher:
    """One open page. `queue` holds what was not sent yet; None in it, or `is_closed`, ends the response."""

    visit: Visit
    user_id: int
    queue: asyncio.Queue[Message | None] = field(init=False)
    opened_at: float = field(default_factory=time.monotonic)
    checked_at: float = field(default_factory=time.monotonic)
    last_put: float = field(default_factory=time.monotonic)
    closed_at: float = 0.0
    was_cut_off: bool = False
    task: asyncio.Task[Any] | None = None

    def __post_init__(self) -> None:
        self.queue = asyncio.Queue(MAX_WAITING_MESSAGES)

    def put(self, message: Message) -> None:
        """Queue a message. A watcher that is too slow for it loses what waits and is closed with a reset."""
        if self.closed_at:
            return
        self.last_put = time.monotonic()
        try:
            self.queue.put_nowait(message)
        except asyncio.QueueFull:
            self.close([RESET])

    def close(self, last: Sequence[Message] = (), *, keep: bool = False) -> None:
        """End the response after these messages; what waited is dropped unless it is to be kept."""
        if self.closed_at:
            return
        self.closed_at = time.monotonic()
        room = MAX_WAITING_MESSAGES - len(last) - 1
        while not self.queue.empty() and (not keep or self.queue.qsize() > room):
            self.queue.get_nowait()
        for message in (*last, None):
            self.queue.put_nowait(message)


@dataclass(frozen=True)
class Standing:
    """What the header of a job page depends on: its buttons, its sentence and the attempts beside it."""

    state: str
    phase: str
    stop_mode: str
    attempt: int

    def message(self) -> Message:
        return Message(encode(json.dumps({"state": self.state, "phase": self.phase}), event="state"))


@dataclass(frozen=True)
class Known:
    """How far a job's events and its answers while training were when they were rendered."""

    num_events: int = -1
    newest_sample_at: datetime | None = None


@dataclass(frozen=True)
class View:
    """A job as its row and its stream showed it at one moment; without the parts of its page that are known already.

    `known` says which these are.
    """

    standing: Standing
    known: Known
    progress: Message
    events: Message | None
    samples: Message | None


class Feed:
    """One job: its place in the stream, what was said lately, and the rendered parts of its page."""

    def __init__(self, job_id: UUID) -> None:
        self.job_id = job_id
        self.stream = stream_key(job_id).encode()
        self.watchers: set[Watcher] = set()
        self.last = _NOTHING_YET
        # The newest attempt that has begun: what an older one says after that is not shown.
        self.attempt = 0
        self.is_synced = False
        self.was_synced = False
        # Set once it is known whether Redis answers.
        self.is_tried = asyncio.Event()
        self.kept: deque[Kept] = deque(maxlen=MAX_KEPT_MESSAGES)
        # Everything after this id is in `kept` or still in `waiting`.
        self.kept_from = (0, 0)
        self.waiting: list[series.Point] = []
        self.sent_at = 0.0
        self.flushing: asyncio.TimerHandle | None = None
        self.snapshot: tuple[float, tuple[int, int], Message] | None = None
        self.snapshot_lock = asyncio.Lock()
        self.standing: Standing | None = None
        self.known = Known()
        self.progress = self.events = self.samples = Message(PING)
        self.is_changed = True
        self.looked_at = 0.0
        self.left_at = time.monotonic()

    def begin(self, last: bytes, attempt: int) -> None:
        """Go on from a place in the stream."""
        self.last, self.attempt = last, max(attempt, self.attempt)
        self.kept.clear()
        self.waiting.clear()
        self.kept_from = key_of(last)
        self.snapshot = None
        self.is_synced = True

    def take(self, entries: Iterable[Entry]) -> bool:
        """Hand new entries to the watchers; False when the stream says that some are missing."""
        is_complete = True
        for entry_id, fields in entries:
            if key_of(entry_id) <= key_of(self.last):
                continue
            self.last = entry_id
            self.is_changed = True
            if b"lost" in fields:
                is_complete = False
            parsed = series.parse_entry(fields)
            if parsed is None or parsed.attempt < self.attempt:
                continue
            self.attempt = parsed.attempt
            if (point := series.point_of(parsed.event, parsed.attempt)) is not None:
                self.waiting.append(point)
        if self.waiting and self.flushing is None:
            wait = self.sent_at + SECONDS_BETWEEN_POINTS - time.monotonic()
            if wait <= 0:
                self.flush()
            else:
                self.flushing = asyncio.get_running_loop().call_later(wait, self.flush)
        return is_complete

    def flush(self) -> None:
        """Send the points that wait as one message."""
        if self.flushing is not None:
            self.flushing.cancel()
            self.flushing = None
        if not self.waiting:
            return
        points, self.waiting = self.waiting, []
        message = points_message(points, self.last)
        self.sent_at = time.monotonic()
        if len(self.kept) == self.kept.maxlen:
            self.kept_from = self.kept[0].key
        self.kept.append(Kept(points, self.last, key_of(self.last), message))
        self.tell(message)

    def tell(self, message: Message) -> None:
        """Queue a message for every watcher."""
        for watcher in self.watchers:
            watcher.put(message)

    def covers(self, key: tuple[int, int]) -> bool:
        """Whether everything after this id can be given from memory."""
        return self.is_synced and self.kept_from <= key <= key_of(self.last)

    def ends_at(self, key: tuple[int, int]) -> bool:
        """Whether this id is where one message ends and the next begins; another web process may have cut elsewhere."""
        if key == key_of(self.last):
            return not self.waiting
        return key == self.kept_from or any(one.key == key for one in self.kept)

    def after(self, key: tuple[int, int]) -> list[Message]:
        """What was said after an id that is covered."""
        missed = [one for one in self.kept if one.key > key]
        if len(missed) <= MAX_MISSED_MESSAGES:
            return [one.message for one in missed]
        # One message, for each of them makes a page draw its curves.
        return [points_message([point for one in missed for point in one.points], missed[-1].last)]

    def parts(self) -> list[Message]:
        """The rendered parts and the standing, for a page that may be older than this connection."""
        if self.standing is None:
            return []
        return [self.progress, self.events, self.samples, self.standing.message()]

    def show(self, view: View) -> None:
        """Tell the watchers what a look at the job's row has changed."""
        if view.progress != self.progress:
            self.progress = view.progress
            self.tell(view.progress)
        self.known = view.known
        if view.events is not None:
            self.events = view.events
            self.tell(view.events)
        if view.samples is not None:
            self.samples = view.samples
            self.tell(view.samples)
        if view.standing != self.standing:
            self.standing = view.standing
            self.attempt = max(self.attempt, view.standing.attempt)
            self.tell(view.standing.message())


def points_message(points: Iterable[series.Point], last: bytes) -> Message:
    """Curve points as the named event that the chart listens for."""
    rows = json.dumps({"points": [point.row() for point in points]}, separators=(",", ":"))
    return Message(encode(rows, event="points", entry_id=last))


class Hub:
    """All feeds and watchers of an event loop. Its tasks run while anybody watches."""

    def __init__(self) -> None:
        # Few connections however many watch; who wants one more waits for it. Untyped: the client's stubs leave open
        # what it decodes; ours gives bytes.
        pool = redis.asyncio.BlockingConnectionPool.from_url(
            settings.REDIS_URL,
            max_connections=_REDIS_CONNECTIONS,
            timeout=5,
            socket_timeout=5,
            socket_connect_timeout=2,
        )
        self.redis: Any = redis.asyncio.Redis(connection_pool=pool)
        self.feeds: dict[UUID, Feed] = {}
        self.open_streams: Counter[int] = Counter()
        self.is_closing = False
        self._signed_at = 0.0
        self._sign = f"progress:reader:{uuid.uuid4()}"
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._wakes = asyncio.Event()
        self._looks: DatabaseThread | None = None
        self._door: DatabaseThread | None = None
        self._knocking: list[tuple[Visit, asyncio.Future[int | None]]] = []
        self._answering: asyncio.Task[None] | None = None

    async def admit(self, visit: Visit) -> int | None:
        """The user who may watch; None for everybody else. Those who come together are looked up together.

        Raises django.db.Error when Postgres does not answer.
        """
        answer: asyncio.Future[int | None] = asyncio.get_running_loop().create_future()
        self._knocking.append((visit, answer))
        if self._answering is None or self._answering.done():
            # A task of its own: the browser that came first may leave before the others have their answer.
            self._answering = asyncio.create_task(self._answer())
        return await answer

    async def _answer(self) -> None:
        while self._knocking:
            door = self._door = self._door or DatabaseThread("stream-door")
            knocking, self._knocking = self._knocking, []
            try:
                users = await door.run(partial(watching_users, {visit for visit, _answer in knocking}))
            except Exception as error:  # noqa: BLE001  whatever it is, nobody must wait for ever
                for _visit, answer in knocking:
                    if not answer.done():
                        answer.set_exception(error)
                continue
            for visit, answer in knocking:
                if not answer.done():
                    answer.set_result(users.get(visit))
        if not self.feeds:
            self._rest()

    def enter(self, watcher: Watcher) -> None:
        """Count a watcher among its user's open streams, until `leave`."""
        self.open_streams[watcher.user_id] += 1

    async def watch(self, watcher: Watcher, last_id: str) -> list[Message]:
        """Begin to fill a watcher's queue; gives what comes before that: what was missed, or a snapshot.

        Args:
            watcher: one that has entered.
            last_id: the browser's Last-Event-ID, whatever it sent.
        """
        feed = self._feed(watcher.visit.job_id)
        feed.watchers.add(watcher)
        if feed.standing is None or _is_old(feed):
            self._wakes.set()
        with contextlib.suppress(TimeoutError):
            # A Redis that hangs is not waited for: there is a snapshot without it.
            async with asyncio.timeout(SECONDS_FOR_REDIS):
                await feed.is_tried.wait()
        first: list[Message] = []
        if _ENTRY_ID.fullmatch(last_id) and last_id.encode() != _NOTHING_YET:
            first = await self._missed(feed, watcher, last_id.encode())
        if not first:
            first = await self._snapshot(feed, watcher)
        return [*first, *feed.parts()]

    def leave(self, watcher: Watcher) -> None:
        """Forget a watcher."""
        watcher.closed_at = watcher.closed_at or time.monotonic()
        feed = self.feeds.get(watcher.visit.job_id)
        if feed is not None and watcher in feed.watchers:
            feed.watchers.discard(watcher)
            feed.left_at = time.monotonic()
        self.open_streams[watcher.user_id] -= 1
        if self.open_streams[watcher.user_id] <= 0:
            del self.open_streams[watcher.user_id]

    def close(self) -> None:
        """End all responses: the web process is about to stop. What was queued is still sent."""
        self.is_closing = True
        for feed in self.feeds.values():
            for watcher in feed.watchers:
                watcher.close(keep=True)

    def _feed(self, job_id: UUID) -> Feed:
        if (feed := self.feeds.get(job_id)) is None:
            feed = self.feeds[job_id] = Feed(job_id)
        for work in (self._follow, self._tend):
            if (task := self._tasks.get(work.__name__)) is None or task.done():
                task = self._tasks[work.__name__] = asyncio.create_task(work())
                task.add_done_callback(self._note_end)
        return feed

    def _note_end(self, task: asyncio.Task[None]) -> None:
        """A task that failed would leave its watchers in silence: they come back and find a new one."""
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("Live progress is interrupted by a mistake of ours.", exc_info=error)
            for feed in self.feeds.values():
                for watcher in feed.watchers:
                    watcher.close(keep=True)
            self.feeds.clear()

    async def _missed(self, feed: Feed, watcher: Watcher, last: bytes) -> list[Message]:
        """What came after a browser's last entry; nothing when that cannot be known any more."""
        key = key_of(last)
        if not feed.is_synced:
            return []
        if feed.covers(key) and feed.ends_at(key):
            _forget(watcher)
            # A comment, for there may be nothing to say.
            return [Message(PING), *feed.after(key)]
        try:
            at_last = await self.redis.xrange(feed.stream, min=last, max=last, count=1)
            if not at_last or not feed.is_synced:
                return []
            feed.flush()
            _forget(watcher)
            until, messages = feed.last, [Message(PING)]
            parsed = series.parse_entry(at_last[0][1])
            attempt = parsed.attempt if parsed else 0
            while chunk := await self.redis.xrange(feed.stream, min=b"(" + last, max=until, count=_CHUNK):
                last = chunk[-1][0]
                if any(b"lost" in fields for _entry_id, fields in chunk):
                    return []
                points, attempt = shown_points(chunk, attempt)
                if points:
                    messages.append(points_message(points, last))
        except (RedisError, OSError) as error:
            logger.warning("A live page gets a snapshot, for Redis does not answer: %s", error)
            return []
        return messages

    async def _snapshot(self, feed: Feed, watcher: Watcher) -> list[Message]:
        """The whole curve, with a reset before it, and what has happened since it was made."""
        async with feed.snapshot_lock:
            made_at, key, message = feed.snapshot or (0.0, (0, 0), RESET)
            is_usable = time.monotonic() - made_at < SNAPSHOT_SECONDS and (feed.covers(key) or not feed.is_synced)
            if feed.snapshot is None or not is_usable:
                feed.flush()
                last = feed.last if feed.is_synced else _NOTHING_YET
                curve = await self._database().run(partial(_curve, feed.job_id))
                key = key_of(last)
                rows = json.dumps(curve, separators=(",", ":"))
                # Without a place in the stream the browser asks for a snapshot again when it comes back.
                message = Message(encode(rows, event="points", entry_id=last if last != _NOTHING_YET else b""))
                feed.snapshot = (time.monotonic(), key, message)
        _forget(watcher)
        return [RESET, message, *(feed.after(key) if feed.is_synced else ())]

    async def _reset(self, feed: Feed) -> None:
        """Have every watcher of a feed start anew: events are missing from its stream."""
        feed.snapshot = None
        try:
            for watcher in list(feed.watchers):
                for message in await self._snapshot(feed, watcher):
                    watcher.put(message)
        except DatabaseError as error:
            logger.warning("Live pages come back for a snapshot, for the database does not answer: %s", error)
            for watcher in feed.watchers:
                watcher.close([RESET])

    def _database(self) -> DatabaseThread:
        self._looks = self._looks or DatabaseThread("stream-looks")
        return self._looks

    async def _follow(self) -> None:
        """Read the streams of all feeds, one after the other in one command."""
        self._signed_at = 0.0
        try:
            while self.feeds:
                try:
                    answer = await self._read()
                except (RedisError, OSError) as error:
                    logger.warning("Live progress is interrupted: %s", error)
                    self._lose_place()
                    self._signed_at = 0.0
                    await asyncio.sleep(random.uniform(0.5, 1.5))  # noqa: S311  spreads the web processes
                    continue
                by_stream = {feed.stream: feed for feed in self.feeds.values()}
                for stream, entries in answer or ():
                    feed = by_stream.get(stream)
                    if feed is not None and not feed.take(entries):
                        feed.flush()
                        await self._reset(feed)
                await asyncio.sleep(_GATHER_SECONDS)
        finally:
            await self.redis.connection_pool.disconnect()

    async def _read(self) -> Any:
        """The next entries of all feeds, each of which has found its place before; raises RedisError."""
        if time.monotonic() - self._signed_at > SECONDS_BETWEEN_SIGNS:
            # Gone: Redis lost its data, or this process stood still for a minute. Both lose events.
            num_watchers = sum(len(feed.watchers) for feed in self.feeds.values())
            sign = json.dumps({"watchers": num_watchers, "tasks": len(asyncio.all_tasks())})
            is_kept = await self.redis.set(self._sign, sign, ex=60, get=True)
            if not is_kept and self._signed_at:
                self._lose_place()
            self._signed_at = time.monotonic()
        for feed in [feed for feed in self.feeds.values() if not feed.is_synced]:
            await self._sync(feed)
        cursors = {feed.stream: feed.last for feed in self.feeds.values()}
        return await self.redis.xread(cursors, count=_CHUNK, block=_BLOCK_MILLISECONDS) if cursors else ()

    def _lose_place(self) -> None:
        for feed in self.feeds.values():
            feed.is_synced = False
            feed.is_tried.set()

    async def _sync(self, feed: Feed) -> None:
        """Find a feed's place at the end of its stream; raises RedisError."""
        tail = await self.redis.xrevrange(feed.stream, count=_TAIL)
        attempts = [(_attempt_of(fields), entry_id) for entry_id, fields in tail]
        # Not behind what a fenced attempt said last: a browser that comes back there could not tell.
        newest = max(attempts, key=lambda found: (found[0], key_of(found[1])), default=(0, _NOTHING_YET))
        feed.begin(newest[1], newest[0])
        feed.is_tried.set()
        if feed.was_synced or feed.snapshot is not None:
            await self._reset(feed)
        feed.was_synced = True

    async def _tend(self) -> None:
        """Look at the jobs' rows and at the watchers, again and again."""
        try:
            while self.feeds:
                self._wakes.clear()
                started = time.monotonic()
                if due := [feed for feed in self.feeds.values() if feed.watchers and _is_due(feed, started)]:
                    await self._look(due)
                spent = time.monotonic() - started
                await self._tend_watchers()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(max(SECONDS_BETWEEN_RENDERINGS, spent / RENDERING_SHARE) - spent):
                        await self._wakes.wait()
                        # Those who come together are looked at together.
                        await asyncio.sleep(0.05)
        finally:
            self._rest()

    async def _look(self, due: list[Feed]) -> None:
        known = {feed.job_id: feed.known for feed in due}
        for feed in due:
            feed.is_changed = False
            feed.looked_at = time.monotonic()
        try:
            views = await self._database().run(partial(_views, known))
        except (DatabaseError, RedisError) as error:
            logger.warning("Live pages keep what they show, for the database does not answer: %s", error)
            return
        for feed in due:
            view = views.get(feed.job_id)
            if view is None:
                _end(feed)
                continue
            if view.standing.state in FINAL_STATES:
                await self._read_rest(feed)
            feed.show(view)
            if view.standing.state in FINAL_STATES:
                _end(feed)

    async def _read_rest(self, feed: Feed) -> None:
        """The last entries may be newer than the last look at the stream: they go out before the end."""
        try:
            while feed.is_synced and (
                chunk := await self.redis.xrange(feed.stream, min=b"(" + feed.last, count=_CHUNK)
            ):
                feed.take(chunk)
        except (RedisError, OSError) as error:
            logger.warning("The end of a live curve is missing: %s", error)
        feed.flush()

    async def _tend_watchers(self) -> None:
        now = time.monotonic()
        asked: dict[Visit, list[Watcher]] = {}
        for feed in list(self.feeds.values()):
            if not feed.watchers and now - feed.left_at > SECONDS_TO_LINGER:
                del self.feeds[feed.job_id]
            for watcher in list(feed.watchers):
                if watcher.closed_at:
                    if now - watcher.closed_at > SECONDS_TO_LEAVE and watcher.task is not None:
                        watcher.was_cut_off = True
                        watcher.task.cancel()
                elif now - watcher.opened_at > MAX_SECONDS:
                    watcher.close(keep=True)
                elif now - watcher.last_put > SECONDS_BETWEEN_PINGS:
                    watcher.put(Message(PING))
                if not watcher.closed_at and now - watcher.checked_at > SECONDS_BETWEEN_CHECKS:
                    watcher.checked_at = now
                    asked.setdefault(watcher.visit, []).append(watcher)
        if asked:
            await self._check(asked)

    async def _check(self, asked: dict[Visit, list[Watcher]]) -> None:
        visits = list(asked)
        try:
            allowed = await self._database().run(partial(watching_users, visits, in_any_team=True))
        except DatabaseError as error:
            logger.warning("Live pages stay open unchecked, for the database does not answer: %s", error)
            return
        for visit, watchers in asked.items():
            for watcher in watchers:
                if allowed.get(visit) != watcher.user_id:
                    watcher.close([END])

    def _rest(self) -> None:
        """Give the threads and their connections back: nobody watches."""
        for thread in (self._looks, self._door):
            if thread is not None:
                thread.close()
        self._looks = self._door = None


def _is_old(feed: Feed) -> bool:
    return time.monotonic() - feed.looked_at > SECONDS_BETWEEN_LOOKS


def _is_due(feed: Feed, now: float) -> bool:
    if feed.standing is None or _is_old(feed):
        return True
    # Nearly: a turn that comes a moment early must not wait for the next.
    return feed.is_changed and now - feed.looked_at > 0.8 * SECONDS_BETWEEN_RENDERINGS


def _end(feed: Feed) -> None:
    for watcher in feed.watchers:
        watcher.close([END], keep=True)


def _forget(watcher: Watcher) -> None:
    """What was queued while a watcher's place was looked for comes before that place."""
    while not watcher.closed_at and not watcher.queue.empty():
        watcher.queue.get_nowait()


def _attempt_of(fields: dict[bytes, bytes]) -> int:
    attempt = fields.get(b"attempt", b"0")
    return int(attempt) if attempt.isdigit() else 0


def shown_points(entries: Iterable[Entry], attempt: int) -> tuple[list[series.Point], int]:
    """The curve points in stream entries, and the newest attempt that has begun with them.

    Args:
        entries: in the stream's order.
        attempt: the newest that had begun before; what an older one says is left out.
    """
    points = []
    for _entry_id, fields in entries:
        parsed = series.parse_entry(fields)
        if parsed is None or parsed.attempt < attempt:
            continue
        attempt = parsed.attempt
        if (point := series.point_of(parsed.event, parsed.attempt)) is not None:
            points.append(point)
    return points, attempt


def _curve(job_id: UUID) -> dict[str, Any]:
    job = Job.objects.filter(pk=job_id).first()
    return series.points(job) if job is not None else {"columns": series.COLUMNS, "points": []}


def _views(known: dict[UUID, Known]) -> dict[UUID, View]:
    """What the pages of these jobs show now; of what `known` has reached already, nothing."""
    found = {}
    for job in showing.job_for_page(Job.objects.filter(pk__in=known)):
        context = showing.live_context(job)
        events = context["events"]
        newest_sample_at = job.newest_sample_at  # type: ignore[attr-defined]
        before, now = known[job.pk], Known(events[0].sequence if events else 0, newest_sample_at)
        has_answered = now.newest_sample_at not in (None, before.newest_sample_at)
        found[job.pk] = View(
            Standing(job.state, job.phase, job.stop_mode, job.attempt),
            now,
            _part("progress", context),
            _part("events", context) if now.num_events != before.num_events else None,
            _part("samples", samples_context(job, now.newest_sample_at)) if has_answered else None,
        )
    return found


def _part(name: str, context: dict[str, Any]) -> Message:
    return Message(encode(render_to_string("jobs/_job_live.html", {**context, "part": name})))


_hubs: WeakKeyDictionary[asyncio.AbstractEventLoop, Hub] = WeakKeyDictionary()


def get_hub() -> Hub:
    """The hub of the running event loop."""
    loop = asyncio.get_running_loop()
    if loop not in _hubs:
        hub = _hubs[loop] = Hub()
        draining.when_draining(hub.close)
    return _hubs[loop]

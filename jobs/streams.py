"""Live progress of a job as server-sent events: a snapshot, what was missed, then what happens.

One Redis reader per web process follows the streams of all watched jobs and hands entries to the watchers'
bounded queues. A watcher that falls behind loses its queue, not its place: it reads what it missed from the
stream again. The id of an SSE message is the id of the last stream entry in it, so a browser that comes back
with `Last-Event-ID` goes on exactly there.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar
from uuid import UUID
from weakref import WeakKeyDictionary

import redis.asyncio
from asgiref.sync import SyncToAsync
from django.conf import settings
from django.contrib.sessions.models import Session
from django.db import connections
from django.http import HttpRequest, HttpResponse, HttpResponseBase, StreamingHttpResponse
from django.template.loader import render_to_string
from django.utils import timezone
from redis.exceptions import RedisError

from jobs import series, showing
from jobs.models import FINAL_STATES, Job
from jobs.progress import MAX_ENTRIES, stream_key
from jobs.series import Entry
from studio.accounts.middleware import current_membership
from studio.accounts.models import Role

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_WAITING_ENTRIES = 1000
MAX_STREAMS_PER_USER = 20
SECONDS_BETWEEN_MESSAGES = 1.0
SECONDS_BETWEEN_PINGS = 15.0
SECONDS_BETWEEN_CHECKS = 60.0
# The job's row is looked at this often when its stream is silent.
SECONDS_BETWEEN_LOOKS = 3.0
# A stream ends on its own so that a deploy drains; the browser comes back with its last id.
MAX_SECONDS = 600.0
RETRY_MILLISECONDS = 1000
# The Redis reader looks for newly watched streams this often.
_BLOCK_MILLISECONDS = 250
_CHUNK = 500
NOTHING_YET = b"0-0"

_ENTRY_ID = re.compile(r"\d{1,20}-\d{1,20}", re.ASCII)


class Watcher:
    """One open page. `queue` holds entries not yet sent; `fell_behind` says that some did not fit."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[Entry] = asyncio.Queue(MAX_WAITING_ENTRIES)
        self.fell_behind = False

    def put(self, entry: Entry) -> None:
        try:
            self.queue.put_nowait(entry)
        except asyncio.QueueFull:
            self.fell_behind = True

    def drain(self) -> list[Entry]:
        """Everything that waits, without waiting."""
        found = []
        while not self.queue.empty():
            found.append(self.queue.get_nowait())
        return found


class Reader:
    """The one Redis reader of an event loop. It runs while anybody watches."""

    def __init__(self) -> None:
        # Untyped: the client's stubs leave open what it decodes; ours gives bytes.
        self.redis: Any = redis.asyncio.Redis.from_url(settings.REDIS_URL, socket_connect_timeout=2)
        self.watchers: dict[bytes, set[Watcher]] = defaultdict(set)
        self.cursors: dict[bytes, bytes] = {}
        self.task: asyncio.Task[None] | None = None

    async def add(self, job_id: UUID, watcher: Watcher) -> None:
        """Begin to hand a job's new entries to a watcher; raises RedisError."""
        key = stream_key(job_id).encode()
        if key not in self.cursors:
            newest = await self.redis.xrevrange(key, count=1)
            self.cursors.setdefault(key, newest[0][0] if newest else NOTHING_YET)
        self.watchers[key].add(watcher)
        if self.task is None or self.task.done():
            self.task = asyncio.create_task(self._read())

    def remove(self, job_id: UUID, watcher: Watcher) -> None:
        """Stop handing entries to a watcher."""
        key = stream_key(job_id).encode()
        self.watchers[key].discard(watcher)
        if not self.watchers[key]:
            del self.watchers[key]
            self.cursors.pop(key, None)

    async def between(self, job_id: UUID, after: bytes) -> AsyncIterator[list[Entry]]:
        """A job's entries after an id, in chunks; raises RedisError."""
        while chunk := await self.redis.xrange(stream_key(job_id), min=b"(" + after, count=_CHUNK):
            yield chunk
            if len(chunk) < _CHUNK:
                return
            after = chunk[-1][0]

    async def holds(self, job_id: UUID, entry_id: bytes) -> bool:
        """Whether everything after this id is still in the stream; raises RedisError."""
        if entry_id == NOTHING_YET:
            return bool(await self.redis.xlen(stream_key(job_id)) < MAX_ENTRIES)
        return bool(await self.redis.xrange(stream_key(job_id), min=entry_id, max=entry_id, count=1))

    async def newest(self, job_id: UUID) -> bytes:
        """The id of the newest entry; 0-0 for an empty stream. Raises RedisError."""
        found = await self.redis.xrevrange(stream_key(job_id), count=1)
        newest: bytes = found[0][0] if found else NOTHING_YET
        return newest

    async def _read(self) -> None:
        while self.watchers:
            try:
                answer = await self.redis.xread(dict(self.cursors), count=_CHUNK, block=_BLOCK_MILLISECONDS)
            except (RedisError, OSError) as error:
                logger.warning("Live progress is interrupted: %s", error)
                await asyncio.sleep(1)
                continue
            for key, entries in answer or ():
                if key not in self.cursors:
                    continue
                self.cursors[key] = entries[-1][0]
                for watcher in self.watchers.get(key, ()):
                    for entry in entries:
                        watcher.put(entry)


_readers: WeakKeyDictionary[asyncio.AbstractEventLoop, Reader] = WeakKeyDictionary()
_open_streams: Counter[int] = Counter()


def get_reader() -> Reader:
    """The reader of the running event loop."""
    loop = asyncio.get_running_loop()
    if loop not in _readers:
        _readers[loop] = Reader()
    return _readers[loop]


async def events(request: HttpRequest, job_id: UUID) -> HttpResponseBase:
    """A job's live progress as server-sent events, for a member of its team."""
    user_id = await _in_thread(_watching_user, request, job_id)
    if user_id is None:
        return HttpResponse("There is no such job in your team.", status=404, content_type="text/plain")
    if _open_streams[user_id] >= MAX_STREAMS_PER_USER:
        return HttpResponse(
            f"You have {MAX_STREAMS_PER_USER} live pages open. Close some; this page is complete without.",
            status=429,
            content_type="text/plain",
            headers={"Retry-After": "30"},
        )
    response = StreamingHttpResponse(
        _stream(request, job_id, user_id), content_type="text/event-stream", headers={"X-Accel-Buffering": "no"}
    )
    response["Cache-Control"] = "no-store"
    return response


events.required_role = Role.VIEWER  # type: ignore[attr-defined]  # read by the access tests


def _watching_user(request: HttpRequest, job_id: UUID) -> int | None:
    """The person behind a request, when the job is in their current team; None for anybody else."""
    # Looked up again at each call: membership may end while a stream is open.
    membership = current_membership(request)
    if membership is None or not membership.may(Role.VIEWER):
        return None
    return membership.user_id if membership.team.jobs.filter(pk=job_id).exists() else None


def _still_allowed(user_id: int, session_key: str | None, job_id: UUID) -> bool:
    alive = Session.objects.filter(session_key=session_key, expire_date__gt=timezone.now()).exists()
    member = Job.objects.filter(
        pk=job_id, team__memberships__user_id=user_id, team__memberships__user__is_active=True
    ).exists()
    return alive and member


async def _in_thread(function: Callable[..., T], *args: Any) -> T:
    """Run a function that uses the database in a shared thread, and give its connection back at once.

    A stream lives for minutes: a thread and a connection of its own would exhaust both.
    """

    def call() -> T:
        try:
            return function(*args)
        finally:
            connections.close_all()

    return await asyncio.get_running_loop().run_in_executor(None, call)


def _release_request_thread() -> None:
    """End the thread that Django keeps for a request's synchronous parts: a stream has none any more."""
    context = SyncToAsync.thread_sensitive_context.get(None)
    executor = SyncToAsync.context_to_thread_executor.pop(context, None) if context is not None else None
    if executor is not None:
        executor.shutdown(wait=False)


async def _stream(request: HttpRequest, job_id: UUID, user_id: int) -> AsyncIterator[str]:
    """The messages of one connection. Nothing is sent once the browser has gone: `finally` never yields."""
    watcher = Watcher()
    reader = get_reader()
    try:
        # Counted here and not in the view: a browser may leave before the first message is asked for, and then
        # this generator never begins and its `finally` never runs.
        _open_streams[user_id] += 1
        _release_request_thread()
        yield f"retry: {RETRY_MILLISECONDS}\n\n"
        try:
            async for message in _messages(request, job_id, user_id, reader, watcher):
                yield message
        except (RedisError, OSError) as error:
            # The page stays right without us; the browser tries again.
            logger.warning("A live page lost Redis: %s", error)
            yield f"retry: {10 * RETRY_MILLISECONDS}\n\n"
    finally:
        reader.remove(job_id, watcher)
        _open_streams[user_id] -= 1
        if _open_streams[user_id] <= 0:
            del _open_streams[user_id]


async def _messages(
    request: HttpRequest, job_id: UUID, user_id: int, reader: Reader, watcher: Watcher
) -> AsyncIterator[str]:
    started = checked = pinged = time.monotonic()
    fragments = Fragments(job_id)
    # Watch first and read the past afterwards: what arrives in between is in both, and ids tell them apart.
    await reader.add(job_id, watcher)
    asked = request.headers.get("Last-Event-ID", "")
    if _ENTRY_ID.fullmatch(asked) and await reader.holds(job_id, asked.encode()):
        last = asked.encode()
    else:
        last = await reader.newest(job_id)
        snapshot = await _in_thread(_snapshot, job_id)
        yield _message(json.dumps(snapshot, separators=(",", ":")), event="points", entry_id=last)
    async for chunk in reader.between(job_id, last):
        last = chunk[-1][0]
        yield _points_message(chunk)
    yield _message(await fragments.render())
    # The page was made before this connection, perhaps long before: have it fetch its header once in any case.
    yield _message(fragments.standing.to_json(), event="state")
    while fragments.standing.state not in FINAL_STATES:
        entries = await _next_entries(watcher, timeout=2.0)
        if watcher.fell_behind:
            watcher.drain()
            watcher.fell_behind = False
            entries = [entry async for chunk in reader.between(job_id, last) for entry in chunk]
        entries = [entry for entry in entries if _key(entry[0]) > _key(last)]
        now = time.monotonic()
        if entries:
            last = entries[-1][0]
            yield _points_message(entries)
        if (entries or fragments.age() > SECONDS_BETWEEN_LOOKS) and (changed := await fragments.render_changed()):
            yield _message(changed)
            pinged = now
        if standing := fragments.take_change():
            yield _message(standing.to_json(), event="state")
        if now - pinged > SECONDS_BETWEEN_PINGS:
            yield ": ping\n\n"
            pinged = now
        if now - checked > SECONDS_BETWEEN_CHECKS:
            checked = now
            if not await _in_thread(_still_allowed, user_id, request.session.session_key, job_id):
                yield _message("{}", event="end")
                return
        if now - started > MAX_SECONDS:
            return
    # The last entries may be newer than the last look at the queue: send them before the end.
    async for chunk in reader.between(job_id, last):
        yield _points_message(chunk)
    yield _message(await fragments.render())
    yield _message("{}", event="end")


async def _next_entries(watcher: Watcher, *, timeout: float) -> list[Entry]:
    """The next entries within `timeout` seconds, gathered for a moment so that messages stay rare."""
    try:
        # Not wait_for: Python 3.11's loses a cancellation that comes together with an entry.
        async with asyncio.timeout(timeout):
            first = await watcher.queue.get()
    except TimeoutError:
        return []
    await asyncio.sleep(SECONDS_BETWEEN_MESSAGES)
    return [first, *watcher.drain()]


def _key(entry_id: bytes) -> tuple[int, int]:
    milliseconds, _, number = entry_id.partition(b"-")
    return int(milliseconds), int(number)


def _snapshot(job_id: UUID) -> dict[str, Any]:
    return {**series.points(Job.objects.get(pk=job_id)), "reset": True}


@dataclass(frozen=True)
class Standing:
    """What the header of a job page depends on: its buttons, its sentence and the attempts beside it."""

    state: str
    phase: str
    stop_mode: str
    attempt: int

    def to_json(self) -> str:
        return json.dumps({"state": self.state, "phase": self.phase})


class Fragments:
    """The parts of a job page that change while it runs, rendered at most when something happened."""

    def __init__(self, job_id: UUID) -> None:
        self.job_id = job_id
        self.sent = ""
        self.rendered_at = 0.0
        self.standing = Standing("", "", "", 0)
        self.is_changed = False

    def age(self) -> float:
        """Seconds since the last rendering."""
        return time.monotonic() - self.rendered_at

    async def render(self) -> str:
        """The current parts as one message."""
        html, standing = await _in_thread(_render, self.job_id)
        self.is_changed = self.is_changed or (self.sent != "" and standing != self.standing)
        self.standing = standing
        self.sent = html
        self.rendered_at = time.monotonic()
        return html

    async def render_changed(self) -> str:
        """The current parts; empty when they are what was sent last."""
        before = self.sent
        return after if (after := await self.render()) != before else ""

    def take_change(self) -> Standing | None:
        """The job's new standing, once after it has changed."""
        is_changed, self.is_changed = self.is_changed, False
        return self.standing if is_changed else None


def _render(job_id: UUID) -> tuple[str, Standing]:
    job = showing.job_for_page(Job.objects.filter(pk=job_id)).get()
    context = showing.live_context(job)
    standing = Standing(job.state, job.phase, job.stop_mode, job.attempt)
    return render_to_string("jobs/_job_live.html", context), standing


def _points_message(entries: Iterable[Entry]) -> str:
    """The curve points in some stream entries, as the named event that the chart listens for."""
    points = []
    last = NOTHING_YET
    for entry_id, fields in entries:
        last = entry_id
        parsed = series.parse_entry(fields)
        point = series.point_of(parsed.event, parsed.attempt) if parsed else None
        if point is not None:
            points.append(point.row())
    return _message(json.dumps({"points": points}, separators=(",", ":")), event="points", entry_id=last)


def _message(data: str, *, event: str = "", entry_id: bytes | None = None) -> str:
    """One server-sent event. Every line of the data needs its own field name."""
    lines = [f"id: {entry_id.decode()}"] if entry_id is not None else []
    if event:
        lines.append(f"event: {event}")
    lines.extend(f"data: {line}" for line in data.splitlines() or [""])
    return "\n".join(lines) + "\n\n"

"""Live progress of a job as server-sent events: a snapshot or what was missed, then what happens (jobs/feeds.py).

After `retry`, which differs from browser to browser, a connection begins with what came after its `Last-Event-ID`,
or, where that is unknown, with `event: reset` and the whole curve. `points` carry the curve, `state` says that the
header of the page has changed, messages without a name replace parts of it, and `end` is the last.
"""

from __future__ import annotations

import asyncio
import io
import logging
import random
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Any
from uuid import UUID

from django.conf import settings
from django.core.exceptions import DisallowedHost
from django.core.handlers.asgi import ASGIRequest
from django.db import Error as DatabaseError
from django.http import HttpRequest, HttpResponse, HttpResponseBase, StreamingHttpResponse
from django.views.decorators.http import require_GET

from jobs import feeds
from jobs.feeds import Hub, Message, Watcher, get_hub
from jobs.watching import Visit
from studio.accounts.models import Role

Receive = Callable[[], Awaitable[Mapping[str, Any]]]
Send = Callable[[Mapping[str, Any]], Awaitable[None]]

logger = logging.getLogger(__name__)

# A browser waits this long before it comes back; spread, so that not all do so in the same moment.
RETRY_MILLISECONDS = (500, 2500)

_SESSION_KEY = re.compile(r"[a-z0-9]{8,40}")

HEADERS = {
    "Content-Type": "text/event-stream",
    "Cache-Control": "no-store",
    # Proxies must not gather it.
    "X-Accel-Buffering": "no",
    "X-Content-Type-Options": "nosniff",
}


@require_GET
async def events(request: HttpRequest, job_id: UUID) -> HttpResponseBase:
    """A job's live progress as server-sent events, for a member of its team.

    `manage.py up` serves the address by `application`, which does the same without Django's middleware.
    """
    hub = get_hub()
    found = await _admit(hub, request, job_id)
    if isinstance(found, HttpResponse):
        return found
    return StreamingHttpResponse(_stream(hub, found, request.headers.get("Last-Event-ID", "")), headers=HEADERS)


events.required_role = Role.VIEWER  # type: ignore[attr-defined]  # read by the access tests


async def application(scope: dict[str, Any], receive: Receive, send: Send) -> None:
    """`events` as an ASGI application of its own.

    After a restart every open page comes back at once, and Django's handler and middleware take turns in several
    threads for each of them. What of these a stream needs is asked for here: the host name, the session and the team.
    """
    hub, request = get_hub(), ASGIRequest(scope, io.BytesIO())
    try:
        request.get_host()
        found = await _admit(hub, request, UUID(scope["path"].split("/")[2]))
    except DisallowedHost:
        found = _refusal("The studio does not answer to this host name.", 400)
    if isinstance(found, HttpResponse):
        await send({"type": "http.response.start", "status": found.status_code, "headers": _encoded(found.headers)})
        await send({"type": "http.response.body", "body": found.content})
        return
    watcher = found
    leaving = asyncio.create_task(_wait_until_gone(receive))
    leaving.add_done_callback(lambda _task: watcher.close())
    try:
        await send({"type": "http.response.start", "status": 200, "headers": _encoded(HEADERS)})
        async with aclosing(_stream(hub, watcher, request.headers.get("Last-Event-ID", ""))) as messages:
            async for content in messages:
                await send({"type": "http.response.body", "body": content, "more_body": True})
        await send({"type": "http.response.body"})
    except asyncio.CancelledError:
        # The hub cuts off who does not read; a server that stops is to see its cancellation.
        if not watcher.was_cut_off:
            raise
    finally:
        leaving.cancel()


def _encoded(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]


async def _wait_until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _admit(hub: Hub, request: HttpRequest, job_id: UUID) -> Watcher | HttpResponse:
    """A watcher for the person behind a request, or why there is none."""
    if hub.is_closing:
        return _refusal("The studio is being restarted.", 503, retry_after=1)
    session_key = request.COOKIES.get(settings.SESSION_COOKIE_NAME, "")
    visit = Visit(session_key, job_id)
    try:
        user_id = await hub.admit(visit) if _SESSION_KEY.fullmatch(session_key) else None
    except DatabaseError as error:
        logger.warning("A live page is turned away, for the database does not answer: %s", error)
        return _refusal("The studio's database does not answer. This page tries again by itself.", 503, retry_after=5)
    if user_id is None:
        return _refusal("There is no such job in your team.", 404)
    if hub.open_streams[user_id] >= feeds.MAX_STREAMS_PER_USER:
        many = f"You have {feeds.MAX_STREAMS_PER_USER} live pages open. Close some; this page is complete without."
        return _refusal(many, 429, retry_after=30)
    return Watcher(visit, user_id)


def _refusal(sentence: str, status: int, *, retry_after: int = 0) -> HttpResponse:
    headers = {"Content-Type": "text/plain; charset=utf-8", "X-Content-Type-Options": "nosniff"}
    if retry_after:
        headers["Retry-After"] = str(retry_after)
    return HttpResponse(sentence, status=status, headers=headers)


async def _stream(hub: Hub, watcher: Watcher, last_id: str) -> AsyncGenerator[bytes, None]:
    """The messages of one connection. Nothing is sent once the browser has gone: `finally` never yields."""
    retry = f"retry: {random.randint(*RETRY_MILLISECONDS)}\n".encode()  # noqa: S311  no secret
    watcher.task = asyncio.current_task()
    try:
        # Here and not before: a browser may leave before the first message is asked for, and then this generator
        # never begins and its `finally` never runs.
        hub.enter(watcher)
        try:
            first: list[Message | None] = [*await hub.watch(watcher, last_id)]
        except DatabaseError as error:
            logger.warning("A live page gets no snapshot, for the database does not answer: %s", error)
            return
        first.reverse()
        while (message := first.pop() if first else await watcher.queue.get()) is not None:
            if retry and not message.content.startswith(b":"):
                # Not alone: htmx reads it only beside data.
                message, retry = Message(retry + message.content), b""
            yield message.content
    finally:
        hub.leave(watcher)

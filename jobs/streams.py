"""Live progress of a job as server-sent events: a snapshot or what was missed, then what happens (jobs/feeds.py).

After `retry`, which differs from browser to browser, a connection begins with what came after its `Last-Event-ID`,
or, where that is unknown, with `event: reset` and the whole curve. `points` carry the curve, `state` says that the
header of the page has changed, messages without a name replace parts of it, and `end` is the last.
"""

from __future__ import annotations

import asyncio
import logging
import random
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any
from uuid import UUID

from asgiref.sync import SyncToAsync, iscoroutinefunction
from django.conf import settings
from django.db import Error as DatabaseError
from django.http import HttpRequest, HttpResponse, HttpResponseBase, StreamingHttpResponse
from django.utils.decorators import sync_and_async_middleware
from django.views.decorators.http import require_GET

from jobs import feeds
from jobs.feeds import Hub, Message, Watcher, get_hub
from jobs.watching import Visit
from studio.accounts.models import Role

logger = logging.getLogger(__name__)

# A browser waits this long before it comes back; spread, so that not all do so in the same moment.
RETRY_MILLISECONDS = (500, 2500)

_SESSION_KEY = re.compile(r"[a-z0-9]{8,40}")
_PATH = re.compile(r"/jobs/([0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12})/events/")


@require_GET
async def events(request: HttpRequest, job_id: UUID) -> HttpResponseBase:
    """A job's live progress as server-sent events, for a member of its team."""
    hub = get_hub()
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
    watcher = Watcher(visit, user_id)
    response = StreamingHttpResponse(
        _stream(hub, watcher, request.headers.get("Last-Event-ID", "")), content_type="text/event-stream"
    )
    # Proxies must not gather it, and nothing before the other middleware would say these two.
    for name, value in {"Cache-Control": "no-store", "X-Accel-Buffering": "no", **_PLAIN}.items():
        response[name] = value
    return response


events.required_role = Role.VIEWER  # type: ignore[attr-defined]  # read by the access tests

_PLAIN = {"X-Content-Type-Options": "nosniff"}


def _refusal(sentence: str, status: int, *, retry_after: int = 0) -> HttpResponse:
    headers = _PLAIN | ({"Retry-After": str(retry_after)} if retry_after else {})
    return HttpResponse(sentence, status=status, content_type="text/plain", headers=headers)


def _release_request_thread() -> None:
    """End the thread that Django keeps for a request's synchronous parts: a stream has none any more."""
    context = SyncToAsync.thread_sensitive_context.get(None)
    executor = SyncToAsync.context_to_thread_executor.pop(context, None) if context is not None else None
    if executor is not None:
        executor.shutdown(wait=False)


async def _stream(hub: Hub, watcher: Watcher, last_id: str) -> AsyncIterator[bytes]:
    """The messages of one connection. Nothing is sent once the browser has gone: `finally` never yields."""
    retry = f"retry: {random.randint(*RETRY_MILLISECONDS)}\n".encode()  # noqa: S311  no secret
    watcher.task = asyncio.current_task()
    try:
        # Here and not in the view: a browser may leave before the first message is asked for, and then this
        # generator never begins and its `finally` never runs.
        hub.enter(watcher)
        _release_request_thread()
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


@sync_and_async_middleware
def StreamMiddleware(get_response: Callable[[HttpRequest], Any]) -> Callable[[HttpRequest], Any]:  # noqa: N802
    """Answers the streams before all other middleware, most of which takes a turn in a thread.

    After a restart every open page comes back at once. Who may watch, `events` asks itself; the host name is looked at
    here; and a request that is to be sent to HTTPS goes the ordinary way.
    """
    if not iscoroutinefunction(get_response):
        return get_response

    async def asynchronous(request: HttpRequest) -> HttpResponseBase:
        found = _PATH.fullmatch(request.path_info) if request.method == "GET" else None
        if found is not None and (request.is_secure() or not settings.SECURE_SSL_REDIRECT):
            request.get_host()
            streaming: Awaitable[HttpResponseBase] = events(request, UUID(found[1]))
            return await streaming
        response: Awaitable[HttpResponseBase] = get_response(request)
        return await response

    return asynchronous

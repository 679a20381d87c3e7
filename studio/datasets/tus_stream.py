"""Receives the bytes of an upload while they arrive: Django would gather a whole body before anybody looks at it.

Django decides and this module receives. The request goes through every middleware and the view with an empty body;
the view leaves an admission in the scope, or its answer is a refusal and goes out as it is.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Any

from asgiref.sync import ThreadSensitiveContext, sync_to_async
from django.conf import settings
from django.db import Error as DatabaseError
from django.db import connection
from django.http import HttpResponse

from studio import body_limits, draining
from studio.api.errors import RETRY_LATER, UNAVAILABLE, ErrorDetail, error_response
from studio.datasets.tus import READ_BYTES, SCOPE_KEY, Admission, refusal_of

Receive = Callable[[], Awaitable[Mapping[str, Any]]]
Send = Callable[[Mapping[str, Any]], Awaitable[None]]
Application = Callable[[dict[str, Any], Receive, Send], Awaitable[None]]

logger = logging.getLogger(__name__)


class _Stops:
    """Ends the waits of this process's uploads when it is about to stop."""

    def __init__(self) -> None:
        self.has_begun = False
        self.waits: set[asyncio.Timeout] = set()
        draining.when_draining(self.begin)

    def begin(self) -> None:
        self.has_begun = True
        for wait in self.waits:
            wait.reschedule(asyncio.get_running_loop().time())


_stops = _Stops()


class _GoneError(Exception):
    """The sender closed the connection."""


class _SilentError(Exception):
    """The sender said nothing for so long that it is gone without a word: its place becomes free."""


class _StoppingError(Exception):
    """This process is about to stop."""


async def application(scope: dict[str, Any], receive: Receive, send: Send) -> None:
    """A PATCH to an upload, also one that is sent as a POST by whoever may send no other."""
    from studio.asgi import django_application

    override = dict(scope["headers"]).get(b"x-http-method-override", b"").decode("latin-1").upper()
    if scope["method"] == "POST" and override in {"PATCH", "HEAD", "DELETE"}:
        scope = {**scope, "method": override}
    if scope["method"] != "PATCH":
        await django_application(scope, body_limits.limited(scope, receive), send)
        return
    sent: list[Mapping[str, Any]] = []

    async def keep(message: Mapping[str, Any]) -> None:
        sent.append(message)

    await django_application(scope, _empty_body(), keep)
    admission: Admission | None = scope.get(SCOPE_KEY)
    start, content = sent[0], b"".join(message.get("body", b"") for message in sent[1:])
    if admission is None:
        await _refuse(receive, send, start["status"], start["headers"], content)
        return
    answer = await _receive(admission, receive)
    if answer is None:
        return
    # Django's own headers but for those that the answer has, too.
    own = {name.lower().encode("latin-1"): value.encode("latin-1") for name, value in answer.headers.items()}
    headers = [*((name, value) for name, value in start["headers"] if name.lower() not in own), *own.items()]
    if answer.status_code >= 400:
        await _refuse(receive, send, answer.status_code, headers, answer.content)
        return
    await send({"type": "http.response.start", "status": answer.status_code, "headers": headers})
    await send({"type": "http.response.body", "body": b""})


async def _refuse(
    receive: Receive, send: Send, status: int, headers: list[tuple[bytes, bytes]], content: bytes
) -> None:
    """An answer to a request whose body is not read: the connection is of no use after it."""
    kept = [(name, value) for name, value in headers if name.lower() != b"content-length"]
    length = (b"content-length", str(len(content)).encode())
    start = {"type": "http.response.start", "status": status, "headers": [*kept, length, (b"connection", b"close")]}
    await send(start)
    await send({"type": "http.response.body", "body": content, "more_body": True})
    # A sender that is still writing when its connection is closed may never read the answer.
    await body_limits.discard(receive)
    await send({"type": "http.response.body"})


def _empty_body() -> Receive:
    """`receive` of a request without a body, whose sender stays."""
    begun = False

    async def receive() -> Mapping[str, Any]:
        nonlocal begun
        if begun:
            await asyncio.Event().wait()
        begun = True
        return {"type": "http.request", "body": b"", "more_body": False}

    return receive


async def _receive(admission: Admission, receive: Receive) -> HttpResponse | None:
    """Take a request's body; gives the answer, or None when nobody is there to read one."""
    async with ThreadSensitiveContext():
        try:
            async with aclosing(_blocks(receive)) as blocks:
                async for block in blocks:
                    await _write(admission, block)
            return await sync_to_async(_connected(admission.end))()
        except _GoneError:
            await _break_off(admission)
            return None
        except _SilentError:
            await _break_off(admission)
            return _refusal(408, "silent", f"Nothing arrived for {settings.UPLOAD_SILENT_SECONDS:.0f} seconds.")
        except _StoppingError:
            await _break_off(admission)
            return _refusal(503, "restarting", "The studio is being restarted.", {"Retry-After": "1"})
        except asyncio.CancelledError:
            await asyncio.shield(_break_off(admission))
            raise
        except DatabaseError as error:
            logger.warning("An upload is broken off, for the database does not answer: %s", error)
            return error_response(503, [UNAVAILABLE], RETRY_LATER)
        except Exception as error:  # noqa: BLE001  refusal_of raises again what it does not know
            status, detail, headers = refusal_of(error)
            return error_response(status, [detail], headers)
        finally:
            await sync_to_async(_connected(admission.close))()


def _refusal(status: int, code: str, sentence: str, headers: Mapping[str, str] | None = None) -> HttpResponse:
    detail = ErrorDetail(code=code, message=sentence, help="What arrived is kept: go on with the upload.")
    return error_response(status, [detail], headers)


async def _break_off(admission: Admission) -> None:
    try:
        await sync_to_async(_connected(admission.break_off))()
    except Exception as error:  # noqa: BLE001  there is nobody to tell; what was safe before stays so
        logger.warning("The last bytes of an upload that broke off are lost: %s", error)


async def _write(admission: Admission, block: bytearray) -> None:
    await sync_to_async(_connected(lambda: admission.write(block)))()


def _connected(action: Callable[[], Any]) -> Callable[[], Any]:
    """An action in its request's own thread, which holds no connection to the database between slow ones."""

    def run() -> Any:
        try:
            return action()
        finally:
            connection.close()

    return run


async def _blocks(receive: Receive) -> AsyncGenerator[bytearray, None]:
    """The body in blocks of about READ_BYTES; what a broken one had begun comes before its error."""
    block, more = bytearray(), True
    while more:
        try:
            message = await _next_message(receive)
        except (_GoneError, _SilentError, _StoppingError):
            if block:
                yield block
            raise
        block += message.get("body", b"")
        more = message.get("more_body", False)
        if len(block) >= READ_BYTES or (block and not more):
            yield block
            block = bytearray()


async def _next_message(receive: Receive) -> Mapping[str, Any]:
    if _stops.has_begun:
        raise _StoppingError
    try:
        async with asyncio.timeout(settings.UPLOAD_SILENT_SECONDS) as wait:
            _stops.waits.add(wait)
            try:
                message = await receive()
            finally:
                _stops.waits.discard(wait)
    except TimeoutError:
        raise (_StoppingError if _stops.has_begun else _SilentError) from None
    if message["type"] == "http.disconnect":
        raise _GoneError
    return message

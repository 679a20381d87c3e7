"""How large a request's body may be. Asked before Django, which spools a whole body to disk before it looks at it."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from django.conf import settings

Message = Mapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

# The form's own page, and the API's two calls with a file. Everything else is a form or a JSON body.
UPLOAD_PATHS = re.compile(r"/datasets/upload/|/api/v1/datasets/(\d+/versions/)?", re.ASCII)
# What surrounds an uploaded file: its name, the other fields and the boundaries between them.
AROUND_A_FILE_BYTES = 1024**2
# Above DATA_UPLOAD_MAX_MEMORY_SIZE, so that Django's own refusal of a large form comes first.
OTHER_BODY_BYTES = 4 * 1024**2
# A sender that is still writing when its connection is closed may never read the answer.
SECONDS_TO_STOP_SENDING = 5.0


class BodyTooLargeError(Exception):
    """More bytes arrived than this path takes."""


def most_bytes(path: str) -> int:
    """The largest body that a path takes."""
    if UPLOAD_PATHS.fullmatch(path):
        return settings.MAX_UPLOAD_BYTES + AROUND_A_FILE_BYTES
    return OTHER_BODY_BYTES


def limited(scope: Mapping[str, Any], receive: Receive) -> Receive:
    """`receive` for a body that is counted as it arrives: chunked ones and understated lengths are refused as well.

    Raises:
        BodyTooLargeError: the length in the header is too large already; the wrapped `receive` raises it later.
    """
    if scope["type"] != "http":
        return receive
    limit, num_bytes = most_bytes(scope["path"]), 0
    declared = dict(scope["headers"]).get(b"content-length", b"")
    if declared.isdigit() and int(declared[:19]) > limit:
        raise BodyTooLargeError

    async def counted() -> Message:
        nonlocal num_bytes
        message = await receive()
        num_bytes += len(message.get("body", b""))
        if num_bytes > limit:
            raise BodyTooLargeError
        return message

    return counted


async def refuse(scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
    """413 with a sentence, in the API's form below /api/; then what still arrives is thrown away for a while."""
    limit = most_bytes(scope["path"])
    shown = f"{limit / 1e9:.1f} GB" if limit >= 1e9 else f"{limit / 1e6:.1f} MB"
    sentence = f"This request is larger than the {shown} that are accepted here, so nothing was stored."
    content, kind = sentence.encode(), b"text/plain; charset=utf-8"
    if scope["path"].startswith("/api/"):
        from studio.api.errors import ErrorDetail, error_response

        content = error_response(413, [ErrorDetail(code="too_large", message=sentence)]).content
        kind = b"application/json"
    headers = [
        (b"content-type", kind),
        (b"content-length", str(len(content)).encode()),
        (b"x-content-type-options", b"nosniff"),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": 413, "headers": headers})
    await send({"type": "http.response.body", "body": content, "more_body": True})
    await discard(receive)
    await send({"type": "http.response.body"})


async def discard(receive: Receive) -> None:
    """Throw away what still arrives of a refused body, for SECONDS_TO_STOP_SENDING."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(SECONDS_TO_STOP_SENDING):
            while (await receive()).get("more_body", False):
                pass

"""The ASGI entry point: progress streams need it, a WSGI server would hold them back in its buffers."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from django.conf import settings
from django.core.asgi import get_asgi_application
from django.utils.module_loading import import_string

from studio import body_limits

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "studio.settings")

Message = Mapping[str, Any]
django_application = get_asgi_application()
streams = [(re.compile(call), import_string(name)) for call, name in settings.ASGI_STREAMS.items()]

DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
SENTENCE = b"The studio's disk is full, so nothing was stored. Free some space and try again."


async def application(
    scope: dict[str, Any],
    receive: Callable[[], Awaitable[Message]],
    send: Callable[[Message], Awaitable[None]],
) -> None:
    """Django, and answers for what strikes before Django has a request: no space for its body, or too large a body."""
    if scope["type"] == "http":
        for call, stream in streams:
            if call.fullmatch(f"{scope['method']} {scope['path']}"):
                await stream(scope, receive, send)
                return
    has_answered = False

    async def note_answer(message: Message) -> None:
        nonlocal has_answered
        has_answered = True
        await send(message)

    try:
        await django_application(scope, body_limits.limited(scope, receive), note_answer)
    except body_limits.BodyTooLargeError:
        await body_limits.refuse(scope, receive, send)
    except OSError as error:
        if has_answered or error.errno not in DISK_FULL:
            raise
        headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
        await send({"type": "http.response.start", "status": 507, "headers": headers})
        await send({"type": "http.response.body", "body": SENTENCE})

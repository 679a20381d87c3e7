"""The web process: `python -m studio.serving FD` over a socket that its launcher has bound, or `... HOST PORT`.

The launcher keeps the socket, so that a restarted web process answers at the same address, and nobody can take
the port in between. In a container nobody else could: there it binds by itself.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import uvicorn

from studio import draining

# Seconds that open requests get to end after SIGTERM; streams end at once. With it the process is gone within 5 s.
GRACE_SECONDS = 4
# Seconds after which a connection is given up whose other end takes no byte of what was sent.
DEAD_PEER_SECONDS = 300

Application = Callable[[dict[str, Any], Any, Any], Awaitable[None]]


def main(listener: socket.socket) -> None:
    """Serve until SIGTERM or SIGINT."""
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "studio.settings")
    from django.conf import settings

    from studio.asgi import application

    config = uvicorn.Config(
        # Without a proxy of ours in front, X-Forwarded-For is whatever the visitor writes.
        behind_one_proxy(application) if settings.BEHIND_PROXY else application,
        interface="asgi3",
        lifespan="off",
        timeout_graceful_shutdown=GRACE_SECONDS,
        # uvicorn's own belief goes by the proxy's address, which nobody knows beforehand; or, with all addresses
        # trusted, takes the first entry, which the visitor may have written.
        proxy_headers=False,
        server_header=False,
        # Its lines go where ours go, in the same form.
        log_config=None,
        # The one-time login links are in the paths.
        access_log=False,
    )
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        # Inherited by every connection. Without it a browser that vanished would hold its buffers for ever.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, DEAD_PEER_SECONDS * 1000)
    DrainingServer(config).run(sockets=[listener])


class DrainingServer(uvicorn.Server):
    """uvicorn, which waits for open responses when it stops; progress streams are told to end."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        draining.begin()
        await super().shutdown(sockets)


def behind_one_proxy(application: Application) -> Application:
    """The application with the visitor's address as the proxy in front saw it: the last of X-Forwarded-For."""

    async def forwarded(scope: dict[str, Any], receive: Any, send: Any) -> None:
        named = [value for name, value in scope.get("headers", ()) if name == b"x-forwarded-for"]
        last = named[-1].decode("latin-1").rpartition(",")[2].strip() if named else ""
        # Where it names none, the proxy's own address stands.
        with contextlib.suppress(ValueError):
            scope = {**scope, "client": (str(ipaddress.ip_address(last)), 0)}
        await application(scope, receive, send)

    return forwarded


def open_listener(arguments: Sequence[str]) -> socket.socket:
    """The socket that the command line names: FD, or HOST PORT."""
    if len(arguments) == 1:
        return socket.socket(fileno=int(arguments[0]))
    host, port = arguments
    return socket.create_server((host, int(port)), family=socket.AF_INET6 if ":" in host else socket.AF_INET)


if __name__ == "__main__":
    main(open_listener(sys.argv[1:]))

"""The web process over a socket that its launcher has bound: `python -m studio.serving FD`.

The launcher keeps the socket, so that a restarted web process answers at the same address, and nobody can take
the port in between.
"""

from __future__ import annotations

import os
import socket
import sys

import uvicorn

# Seconds that open requests and streams get to end after SIGTERM.
GRACE_SECONDS = 5


def main(file_descriptor: int) -> None:
    """Serve until SIGTERM or SIGINT."""
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "studio.settings")
    from django.conf import settings

    config = uvicorn.Config(
        "studio.asgi:application",
        lifespan="off",
        timeout_graceful_shutdown=GRACE_SECONDS,
        # Without a proxy of ours in front, X-Forwarded-For is whatever the visitor writes.
        proxy_headers=settings.BEHIND_PROXY,
        server_header=False,
        access_log=False,
    )
    uvicorn.Server(config).run(sockets=[socket.socket(fileno=file_descriptor)])


if __name__ == "__main__":
    main(int(sys.argv[1]))

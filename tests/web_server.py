"""A real web process of the studio over the test's database, which can be killed and started anew at its address."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import httpx
from django.conf import settings

from studio.accounts.models import LoginLink, User
from tests.processes import test_environment, wait_for


class WebServer:
    """`python -m studio.serving` behind a socket that outlives it, as the launcher holds it.

    Attributes:
        is_special: whether it was started with something that other tests would not expect.
    """

    def __init__(self, folder: Path) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.root = f"http://127.0.0.1:{self.port}"
        self.log_file = folder / "web.log"
        self.process: subprocess.Popen[bytes]
        self.is_special = False

    def start(
        self, environment: Mapping[str, str] | None = None, *, preexec_fn: Callable[[], None] | None = None
    ) -> None:
        """Start it and wait until it answers."""
        self.is_special = bool(environment or preexec_fn)
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "studio.serving", str(self._listener.fileno())],
                pass_fds=[self._listener.fileno()], cwd=settings.ROOT, stdout=log, stderr=log, preexec_fn=preexec_fn,
                env=test_environment() | {"STUDIO_DEBUG": "1"} | dict(environment or {}),
            )  # fmt: skip
        wait_for(lambda: httpx.get(self.root + "/livez", timeout=60).is_success, what="the start")

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """SIGTERM, as a restart sends it."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)

    def signed_in(self, user: User) -> httpx.Client:
        """A client with a person's session, whose requests bear the page's token as its scripts do."""
        client = httpx.Client(base_url=self.root, timeout=60)
        link = f"/login/link/{LoginLink.create_for(user)}/"
        client.get(link)
        client.post(link, data={"csrfmiddlewaretoken": client.cookies["csrftoken"]}, headers={"Referer": self.root})
        client.headers["X-CSRFToken"] = client.cookies["csrftoken"]
        return client

    def close(self) -> None:
        self.kill()
        self._listener.close()


@contextmanager
def web_server(folder: Path, environment: Mapping[str, str] | None = None) -> Iterator[WebServer]:
    """A running one, which is gone afterwards."""
    server = WebServer(folder)
    try:
        server.start(environment)
        yield server
    finally:
        server.close()

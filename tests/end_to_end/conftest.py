"""The whole studio as a visitor meets it: a web server, both workers and a browser."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from django.conf import settings

from tests.end_to_end.browsing import CHROMIUM, Browser, open_browser
from tests.processes import celery_worker, test_environment, wait_for


@pytest.fixture
def site(transactional_db: None, tmp_path: Path) -> Iterator[str]:
    """The address of a running studio over the test's database."""
    environment = test_environment()
    subprocess.run(
        [sys.executable, "manage.py", "collectstatic", "--no-input", "--verbosity", "0"],
        cwd=settings.ROOT, env=environment, check=True,
    )  # fmt: skip
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        log = stack.enter_context((tmp_path / "web.log").open("wb"))
        web = subprocess.Popen(
            [sys.executable, "-m", "studio.serving", str(listener.fileno())], pass_fds=[listener.fileno()],
            cwd=settings.ROOT, env=environment, stdout=log, stderr=log,
        )  # fmt: skip
        stack.callback(web.wait)
        stack.callback(web.kill)
        stack.enter_context(celery_worker("default", tmp_path / "default.log"))
        stack.enter_context(celery_worker("gpu", tmp_path / "gpu.log"))
        root = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with urllib.request.urlopen(f"{root}/livez", timeout=60) as answer:
            assert answer.status == 200
        wait_for(lambda: b"ready" in (tmp_path / "gpu.log").read_bytes(), seconds=60, what="the worker's start")
        yield root


@pytest.fixture
def browser(site: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Browser]:
    """A browser on the running studio. Nothing may have complained in its console at the end."""
    # Playwright keeps an event loop running in this thread, which is not one that Django's queries could block.
    monkeypatch.setenv("DJANGO_ALLOW_ASYNC_UNSAFE", "1")
    if not CHROMIUM:
        if os.environ.get("CI"):
            pytest.fail("No Chromium, and CI is set: the browser tests must run there.")
        pytest.skip("NO CHROMIUM: the browser tests are skipped. Install chromium to run them.")
    with open_browser(site) as browser:
        yield browser
    assert browser.complaints == []

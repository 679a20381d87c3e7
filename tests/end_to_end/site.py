"""A studio as its visitors meet it: a web server and both workers, over the database that Django is set up for."""

from __future__ import annotations

import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path

from django.conf import settings

from tests.processes import celery_worker, test_environment, wait_for


@cache
def collect_static(data_dir: Path) -> None:
    """Have the pages' files where a web process looks for them: once for each data folder."""
    subprocess.run(
        [sys.executable, "manage.py", "collectstatic", "--no-input", "--verbosity", "0"],
        cwd=settings.ROOT, env=test_environment() | {"STUDIO_DATA_DIR": str(data_dir)}, check=True,
    )  # fmt: skip


@contextmanager
def running_site(folder: Path, *, worker: Mapping[str, str] | None = None) -> Iterator[str]:
    """The address of a running studio; logs go into the folder, `worker` into the GPU worker's environment."""
    environment = test_environment()
    collect_static(settings.DATA_DIR)
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        log = stack.enter_context((folder / "web.log").open("wb"))
        web = subprocess.Popen(
            [sys.executable, "-m", "studio.serving", str(listener.fileno())], pass_fds=[listener.fileno()],
            cwd=settings.ROOT, env=environment, stdout=log, stderr=log,
        )  # fmt: skip
        stack.callback(web.wait)
        stack.callback(web.kill)
        stack.enter_context(celery_worker("default", folder / "default.log"))
        stack.enter_context(celery_worker("gpu", folder / "gpu.log", environment=worker))
        root = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with urllib.request.urlopen(f"{root}/livez", timeout=60) as answer:
            assert answer.status == 200
        wait_for(lambda: b"ready" in (folder / "gpu.log").read_bytes(), what="the worker's start")
        yield root

"""A disk without space while an upload arrives: a sentence, and nothing left behind."""

from __future__ import annotations

import resource
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from django.conf import settings

from studio.accounts.models import LoginLink, User
from studio.datasets.models import DatasetVersion
from tests.processes import test_environment, wait_for

pytestmark = pytest.mark.django_db(transaction=True)
LIMIT_BYTES = 4 * 1024**2


def limit_files() -> None:
    """No file may grow beyond the limit: what a full disk does, without filling anybody's disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT_BYTES, LIMIT_BYTES))


def test_an_upload_onto_a_full_disk_gets_a_sentence_and_leaves_nothing(bob: User, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, (tmp_path / "web.log").open("wb") as log:
        web = subprocess.Popen(
            [sys.executable, "-m", "studio.serving", str(listener.fileno())], pass_fds=[listener.fileno()],
            cwd=settings.ROOT, env=test_environment() | {"STUDIO_DEBUG": "1"}, stdout=log, stderr=log,
            preexec_fn=limit_files,
        )  # fmt: skip
        try:
            root = f"http://127.0.0.1:{listener.getsockname()[1]}"
            with httpx.Client(base_url=root, timeout=60, follow_redirects=True) as client:
                wait_for(lambda: client.get("/livez").status_code == 200, what="the start")
                link = f"/login/link/{LoginLink.create_for(bob)}/"
                client.get(link)
                client.post(link, data={"csrfmiddlewaretoken": client.cookies["csrftoken"]}, headers={"Referer": root})
                answer = client.post(
                    "/datasets/upload/",
                    data={"name": "large", "csrfmiddlewaretoken": client.cookies["csrftoken"]},
                    files={"file": ("large.jsonl", b'{"prompt": "a", "completion": "b"}\n' * 400_000)},
                    headers={"Referer": root},
                )
        finally:
            web.kill()
            web.wait()
    assert answer.status_code == 507
    assert "disk is full" in answer.text
    assert not DatasetVersion.objects.exists()
    spooled = [*Path(settings.FILE_UPLOAD_TEMP_DIR).iterdir(), *Path(settings.DATA_DIR).glob("blobs/incoming/*")]
    assert spooled == []

"""Bodies that are too large are refused before any of them lies on the disk; asked of the real ASGI application."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from django.conf import settings as django_settings
from django.core.handlers.asgi import ASGIHandler
from django.urls import reverse

from studio.asgi import application
from studio.body_limits import AROUND_A_FILE_BYTES, OTHER_BODY_BYTES, most_bytes
from tests.processes import test_environment, wait_for

MIB = 1024**2


class Answer:
    """What the application sent, and how much of the body it took before."""

    def __init__(self, path: str, chunks: Iterator[bytes], headers: dict[str, str]) -> None:
        self.sent: list[dict[str, Any]] = []
        self.num_taken_before_answer = 0
        asyncio.run(self._ask(path, chunks, headers))
        start = self.sent[0]
        self.status = start["status"]
        self.headers = {name.decode().lower(): value.decode() for name, value in start["headers"]}
        self.text = b"".join(one.get("body", b"") for one in self.sent[1:]).decode()

    async def _ask(self, path: str, chunks: Iterator[bytes], headers: dict[str, str]) -> None:
        async def receive() -> dict[str, Any]:
            chunk = next(chunks, None)
            if not self.sent:
                self.num_taken_before_answer += len(chunk or b"")
            return {"type": "http.request", "body": chunk or b"", "more_body": chunk is not None}

        async def send(message: Any) -> None:
            self.sent.append(message)

        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
            "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
            "headers": [(name.encode(), value.encode()) for name, value in ({"host": "localhost"} | headers).items()],
            "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80),
        }  # fmt: skip
        await application(scope, receive, send)


def mebibytes(num: int) -> Iterator[bytes]:
    return (b"x" * MIB for _ in range(num))


@pytest.fixture(autouse=True)
def largest_upload(settings: Any) -> None:
    settings.MAX_UPLOAD_BYTES = 8 * MIB


@pytest.mark.parametrize(
    ("path", "limit"),
    [("/login/", 4), ("/jobs/new/", 4), ("/nowhere/", 4), ("/datasets/upload/", 9), ("/api/v1/me", 4)],
)
def test_a_declared_length_over_the_limit_is_refused_unread(path: str, limit: int) -> None:
    answer = Answer(path, mebibytes(20), {"content-length": str(limit * MIB + 1)})
    assert (answer.status, answer.num_taken_before_answer) == (413, 0)
    assert answer.headers["connection"] == "close"
    assert "larger than the" in answer.text
    assert "nothing was stored" in answer.text


@pytest.mark.parametrize(
    "headers", [{"transfer-encoding": "chunked"}, {"content-length": "10"}, {"content-length": "x"}]
)
def test_a_body_that_does_not_say_its_size_is_counted(headers: dict[str, str], settings: Any, tmp_path: Path) -> None:
    settings.FILE_UPLOAD_TEMP_DIR = tmp_path
    answer = Answer("/login/", mebibytes(50), headers)
    assert answer.status == 413
    assert answer.num_taken_before_answer == 5 * MIB
    assert list(tmp_path.iterdir()) == []


def test_the_api_answers_in_its_own_form() -> None:
    answer = Answer("/api/v1/datasets/", mebibytes(20), {"transfer-encoding": "chunked"})
    assert (answer.status, answer.headers["content-type"]) == (413, "application/json")
    error = json.loads(answer.text)["error"]
    assert error["code"] == "too_large"
    assert "9.4 MB" in error["message"]


def test_what_is_within_the_limit_goes_to_django(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    async def handle(self: ASGIHandler, scope: Any, receive: Any, send: Any) -> None:
        body = await self.read_body(receive)
        seen.append(len(body.read()))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    monkeypatch.setattr(ASGIHandler, "handle", handle)
    assert Answer("/datasets/upload/", mebibytes(9), {"content-length": str(9 * MIB)}).status == 200
    assert Answer("/login/", mebibytes(4), {"content-length": str(4 * MIB)}).status == 200
    assert seen == [9 * MIB, 4 * MIB]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("datasets:upload", []), ("api:upload_dataset", []), ("api:upload_version", [7])],
)
def test_only_the_calls_that_take_a_file_take_a_large_body(name: str, arguments: list[int]) -> None:
    assert most_bytes(reverse(name, args=arguments)) == 8 * MIB + AROUND_A_FILE_BYTES
    assert most_bytes(reverse(name, args=arguments) + "x/") == OTHER_BODY_BYTES


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("says_its_length", [True, False])
def test_a_sender_over_a_socket_reads_the_refusal(says_its_length: bool, tmp_path: Path) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for chunk in mebibytes(20):
            yield chunk

    async def ask(root: str) -> httpx.Response:
        async with httpx.AsyncClient(base_url=root, timeout=60) as client:
            body = b"x" * 20 * MIB if says_its_length else chunks()
            return await client.post("/login/", content=body)

    with socket.create_server(("127.0.0.1", 0)) as listener, (tmp_path / "web.log").open("wb") as log:
        web = subprocess.Popen(
            [sys.executable, "-m", "studio.serving", str(listener.fileno())], pass_fds=[listener.fileno()],
            cwd=django_settings.ROOT, env=test_environment() | {"STUDIO_DEBUG": "1"}, stdout=log, stderr=log,
        )  # fmt: skip
        try:
            root = f"http://127.0.0.1:{listener.getsockname()[1]}"
            wait_for(lambda: httpx.get(root + "/livez", timeout=60).is_success, what="the start")
            answer = asyncio.run(ask(root))
        finally:
            web.kill()
            web.wait()
    assert (answer.status_code, answer.headers["connection"]) == (413, "close")
    assert "larger than the" in answer.text

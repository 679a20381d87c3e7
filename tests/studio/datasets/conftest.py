"""Uploads that tests make: real blobs in a data folder of the test's own, inspected in this process's child."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from studio.accounts.models import Team, User
from studio.datasets import inspecting, uploads
from studio.datasets.models import DatasetVersion

Upload = Callable[..., DatasetVersion]


def jsonl(rows: list[Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def good_rows(num: int = 12) -> list[dict[str, str]]:
    return [{"prompt": f"What is {n} plus {n}?", "completion": f"It is {2 * n}."} for n in range(num)]


@pytest.fixture(autouse=True)
def no_broker(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Messages are kept in a list: what a worker would do, the tests do themselves."""
    queued: list[int] = []
    # Not the current one, whose broker every test after this one would wait for.
    app = Celery(set_as_current=False)
    monkeypatch.setattr(app, "send_task", lambda name, arguments, **_: queued.append(arguments[0]))
    monkeypatch.setattr(inspecting, "current_app", app)
    return queued


@pytest.fixture
def upload(team: Team, alice: User, data_dir: Path, django_capture_on_commit_callbacks: Any) -> Upload:
    """Upload bytes for Alice's team and, unless told otherwise, inspect them."""

    def receive(content: bytes, file_name: str = "rows.jsonl", *, inspect: bool = True, **more: Any) -> DatasetVersion:
        with django_capture_on_commit_callbacks(execute=True):
            values = {"team": team, "user": alice, **more}
            version = uploads.receive_upload(file_name=file_name, chunks=[content], **values)
        if inspect:
            inspecting.inspect(version.pk)
            version.refresh_from_db()
        return version

    return receive

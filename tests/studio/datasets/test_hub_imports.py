"""Datasets of the Hub become versions that know their commit; asked of a stand-in Hub over real HTTP."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from celery import Celery
from django.test import Client

from studio.accounts.models import ApiToken, AuditEvent, Role, Team, User
from studio.datasets import fetching
from studio.datasets.fetching import fetch, start_hub_import
from studio.datasets.models import DatasetVersion, Upload
from tests.conftest import make_member, signed_in
from tests.hub_server import COMMIT, HubServer, hub_server
from tests.studio.datasets.conftest import good_rows

PAGE = "/datasets/upload/hub/"


@pytest.fixture(autouse=True)
def queued(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    sent: list[str] = []
    silent = Celery(set_as_current=False)
    monkeypatch.setattr(silent, "send_task", lambda name, arguments, **_: sent.append(arguments[0]))
    monkeypatch.setattr(fetching, "current_app", silent)
    return sent


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, data_dir: Path) -> Iterator[HubServer]:
    with hub_server() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        server.repos["acme/faq"] = {
            "README.md": b"# FAQ", "data/train-00000-of-00001.parquet": parquet(good_rows(12)),
            "data/test-00000-of-00001.parquet": parquet(good_rows(3)),
        }  # fmt: skip
        yield server


def parquet(rows: list[dict[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def fetched(team: Team, user: User, **wanted: str) -> Upload:
    upload = start_hub_import(team=team, user=user, **{"hub_id": "acme/faq", **wanted})
    fetch(str(upload.pk))
    upload.refresh_from_db()
    return upload


def test_a_split_becomes_a_version_that_knows_its_commit(
    bob_client: Client, team: Team, bob: User, hub: HubServer, data_dir: Path
) -> None:
    assert fetched(team, bob).state == "finished"
    version = DatasetVersion.objects.get()
    assert [json.loads(line) for line in version.path().read_text().splitlines()] == good_rows(12)
    assert version.source == {
        "kind": "hub", "id": "acme/faq", "revision": COMMIT, "asked": "", "config": "", "split": "train",
    }  # fmt: skip
    assert version.dataset.name == "faq train"
    page = bob_client.get(version.get_absolute_url()).content.decode()
    assert f"acme/faq (train) on the Hugging Face Hub at {COMMIT[:12]}" in page
    assert list((data_dir / "uploads").iterdir()) == []


def test_what_goes_wrong_is_said_in_words(
    bob_client: Client, team: Team, bob: User, hub: HubServer, data_dir: Path
) -> None:
    hub.gated.add("acme/gated")
    hub.repos["acme/script"] = {"script.py": b"raise SystemExit(1)"}
    for wanted, code, sentence in (
        ({"hub_id": "acme/none"}, "hub_not_found", "no dataset"),
        ({"revision": "v9"}, "hub_not_found", "no revision"),
        ({"hub_id": "acme/gated"}, "hub_gated", "is gated"),
        ({"hub_id": "acme/script"}, "hub_script", "never run"),
        ({"split": "validation"}, "hub_split", "test"),
    ):
        upload = fetched(team, bob, **wanted)
        assert (upload.state, upload.error_code) == ("refused", code), upload.error
        assert sentence in upload.error
        assert upload.error_next_step
    assert not DatasetVersion.objects.exists()
    assert list((data_dir / "uploads").iterdir()) == []


def test_a_hub_that_does_not_answer_is_said_so(
    bob_client: Client, team: Team, bob: User, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    upload = fetched(team, bob)
    assert (upload.state, upload.error_code) == ("refused", "hub_unreachable")
    assert "The Hub does not answer" in bob_client.get(upload.get_absolute_url()).content.decode()


def test_more_than_is_accepted_is_not_downloaded(team: Team, bob: User, hub: HubServer, settings: Any) -> None:
    settings.MAX_UPLOAD_BYTES = 100
    assert fetched(team, bob).error_code == "too_large"


def test_the_page_starts_it_and_refuses_what_cannot_be(
    bob_client: Client, charlie_client: Client, team: Team, queued: list[str], django_capture_on_commit_callbacks: Any
) -> None:
    with django_capture_on_commit_callbacks(execute=True):
        answer = bob_client.post(PAGE, {"hub_id": "acme/faq", "split": "train"})
    upload = Upload.objects.get()
    assert answer["Location"] == upload.get_absolute_url()
    assert queued == [str(upload.pk)]
    assert charlie_client.get(upload.get_absolute_url()).status_code == 404
    for wrong in ("--out=/etc/passwd", "../secret", "a/b/c", "a b", "http://x/y", ""):
        assert bob_client.post(PAGE, {"hub_id": wrong, "split": "train"}).status_code == 422, wrong
    assert bob_client.post(PAGE, {"hub_id": "a/b", "split": "train", "revision": "--x"}).status_code == 422
    viewer = signed_in(make_member("victor", team, Role.VIEWER))
    assert viewer.post(PAGE, {"hub_id": "acme/faq", "split": "train"}).status_code == 403
    assert Upload.objects.count() == 1


def test_the_api_starts_it_too(team: Team, bob: User, hub: HubServer) -> None:
    secret = ApiToken.issue(team=team, user=bob, name="t", scopes=["read", "write"])[1]
    api = Client(headers={"authorization": f"Bearer {secret}"})
    body = {"hub_id": "acme/faq", "split": "test", "name": "FAQ test"}
    made = api.post("/api/v1/datasets/from-hub/", body, content_type="application/json")
    assert made.status_code == 202, made.content
    event = AuditEvent.objects.get(action="dataset.import_asked")
    assert (event.token_id is not None, event.details["source"]["id"]) == (True, "acme/faq")
    fetch(made.json()["id"])
    found = api.get(f"/api/v1/uploads/{made.json()['id']}/").json()
    assert (found["state"], found["version"]["source"]["revision"]) == ("finished", COMMIT)
    refused = api.post("/api/v1/datasets/from-hub/", {"hub_id": "a b"}, content_type="application/json")
    assert (refused.status_code, refused.json()["error"]["field"]) == (422, "hub_id")

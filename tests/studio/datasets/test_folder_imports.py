"""Files of the server become datasets: only for admins, only below the folders, copied once by a worker."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from django.test import Client
from django.utils import timezone

from jobs.celery import app
from studio.accounts.models import ApiToken, AuditEvent, Team, User
from studio.datasets import fetching
from studio.datasets.fetching import fetch, fetch_waiting, start_folder_import
from studio.datasets.models import DatasetVersion, Upload
from studio.datasets.resumable import cancel_upload
from tests.processes import celery_worker, wait_for
from tests.studio.datasets.conftest import good_rows, jsonl
from workers.errors import DatasetError

CONTENT = jsonl(good_rows())
PAGE = "/datasets/upload/folder/"


@pytest.fixture(autouse=True)
def queued(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    sent: list[str] = []
    silent = Celery(set_as_current=False)
    monkeypatch.setattr(silent, "send_task", lambda name, arguments, **_: sent.append(arguments[0]))
    monkeypatch.setattr(fetching, "current_app", silent)
    return sent


@pytest.fixture
def root(tmp_path: Path, settings: Any) -> Path:
    """A folder that admins may choose from, beside one that they may not."""
    settings.DATA_DIR = tmp_path / "data"
    root = tmp_path / "offered"
    (root / "deep").mkdir(parents=True)
    (root / "faq.jsonl").write_bytes(CONTENT)
    (root / "deep" / "more.csv").write_text("prompt,completion\n" + "Why?,Because.\n" * 20)
    (root / "picture.png").write_bytes(b"\x89PNG")
    (root / ".hidden.jsonl").write_bytes(CONTENT)
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "secret.jsonl").write_bytes(CONTENT)
    (root / "link.jsonl").symlink_to(secret / "secret.jsonl")
    (root / "linked").symlink_to(secret)
    settings.DATASET_ROOTS = [root]
    return root


def test_the_page_shows_the_files_and_no_link(alice_client: Client, root: Path) -> None:
    page = alice_client.get(PAGE).content.decode()
    assert "faq.jsonl" in page
    assert "deep/more.csv" in page
    for hidden in ("picture.png", ".hidden", "link.jsonl", "secret.jsonl"):
        assert hidden not in page
    assert PAGE in alice_client.get("/datasets/upload/").content.decode()


def test_a_chosen_file_becomes_a_dataset(
    alice_client: Client, root: Path, queued: list[str], django_capture_on_commit_callbacks: Any, settings: Any
) -> None:
    with django_capture_on_commit_callbacks(execute=True):
        answer = alice_client.post(PAGE, {"path": str(root / "faq.jsonl"), "name": "FAQ", "licence": "mit"})
    upload = Upload.objects.get()
    assert answer["Location"] == upload.get_absolute_url()
    assert queued == [str(upload.pk)]
    event = AuditEvent.objects.get(action="dataset.import_asked")
    assert (event.user.username, event.token_id, event.details["upload"]) == ("alice", None, str(upload.pk))
    assert event.details["source"] == upload.source
    assert "Waiting for a worker" in alice_client.get(upload.get_absolute_url()).content.decode()
    fetch(queued[0])
    version = DatasetVersion.objects.get()
    assert version.path().read_bytes() == CONTENT
    assert (version.dataset.name, version.dataset.licence) == ("FAQ", "mit")
    assert version.source == {"kind": "folder", "path": str(root / "faq.jsonl")}
    progress = alice_client.get(f"{upload.get_absolute_url()}progress/")
    assert progress["HX-Redirect"] == upload.get_absolute_url()
    assert alice_client.get(upload.get_absolute_url())["Location"] == version.get_absolute_url()
    assert (root / "faq.jsonl").read_bytes() == CONTENT
    kept = [path for path in Path(settings.DATA_DIR).rglob("*") if path.is_file()]
    assert kept == [version.path()]


@pytest.mark.parametrize(
    "path",
    ["{root}/../secret/secret.jsonl", "{root}/link.jsonl", "{root}/linked/secret.jsonl", "/etc/passwd", "faq.jsonl",
     "{root}/none.jsonl", "{root}", "{root}/deep", "/proc/self/environ", "a\\0b", "/dev/zero"],
)  # fmt: skip
def test_nothing_else_can_be_chosen(alice_client: Client, root: Path, path: str) -> None:
    answer = alice_client.post(PAGE, {"path": path.format(root=root)})
    assert answer.status_code == 422
    assert not Upload.objects.exists()


def test_a_file_that_became_a_link_is_not_read(team: Team, alice: User, root: Path) -> None:
    upload = start_folder_import(team=team, user=alice, path=str(root / "faq.jsonl"))
    (root / "faq.jsonl").unlink()
    (root / "faq.jsonl").symlink_to(root.parent / "secret" / "secret.jsonl")
    fetch(str(upload.pk))
    upload.refresh_from_db()
    assert upload.state == "refused"
    assert "outside the folders" in upload.error
    (root / "pipe.jsonl").unlink(missing_ok=True)
    os.mkfifo(root / "pipe.jsonl")
    with pytest.raises(DatasetError):
        start_folder_import(team=team, user=alice, path=str(root / "pipe.jsonl"))


def test_a_file_that_cannot_be_read_is_refused_with_the_sentence(
    alice_client: Client, team: Team, alice: User, root: Path, settings: Any
) -> None:
    (root / "empty.jsonl").write_bytes(b"")
    upload = start_folder_import(team=team, user=alice, path=str(root / "empty.jsonl"))
    fetch(str(upload.pk))
    assert "The file has 0 bytes." in alice_client.get(upload.get_absolute_url()).content.decode()
    assert not DatasetVersion.objects.exists()
    assert not [path for path in Path(settings.DATA_DIR).rglob("*") if path.is_file()]
    settings.MAX_UPLOAD_BYTES = 10
    assert "larger than" in alice_client.post(PAGE, {"path": str(root / "faq.jsonl")}).content.decode()


def test_only_admins_and_only_where_there_are_folders(
    alice_client: Client, bob_client: Client, root: Path, settings: Any
) -> None:
    assert bob_client.get(PAGE).status_code == 403
    assert bob_client.post(PAGE, {"path": str(root / "faq.jsonl")}).status_code == 403
    assert PAGE not in bob_client.get("/datasets/upload/").content.decode()
    settings.DATASET_ROOTS = []
    assert alice_client.get(PAGE).status_code == 404
    assert PAGE not in alice_client.get("/datasets/upload/").content.decode()


def test_another_team_sees_nothing_of_it(charlie_client: Client, team: Team, alice: User, root: Path) -> None:
    upload = start_folder_import(team=team, user=alice, path=str(root / "faq.jsonl"))
    assert charlie_client.get(upload.get_absolute_url()).status_code == 404
    assert charlie_client.get(upload.get_absolute_url() + "progress/").status_code == 404


def test_the_api_does_what_the_page_does(team: Team, alice: User, bob: User, root: Path) -> None:
    def api(user: User) -> Client:
        secret = ApiToken.issue(team=team, user=user, name="t", scopes=["read", "write"])[1]
        return Client(headers={"authorization": f"Bearer {secret}"})

    client = api(alice)
    files = client.get("/api/v1/server-files/").json()
    assert [Path(one["path"]).name for one in files] == ["faq.jsonl", "more.csv"]
    put: Any = {"content_type": "application/json"}
    made = client.post("/api/v1/datasets/from-server/", {"path": files[0]["path"], "name": "FAQ"}, **put)
    assert (made.status_code, made.json()["state"]) == (202, "receiving")
    assert AuditEvent.objects.get(action="dataset.import_asked").token_id is not None
    # What a worker fetches is nobody's to send.
    tus = client.head(f"/api/v1/uploads/{made.json()['id']}/", headers={"Tus-Resumable": "1.0.0"})
    assert tus.status_code == 404
    fetch(made.json()["id"])
    found = client.get(f"/api/v1/uploads/{made.json()['id']}/").json()
    assert (found["state"], found["version"]["number"]) == ("finished", 1)
    refused = client.post("/api/v1/datasets/from-server/", {"path": "/etc/passwd"}, **put)
    assert (refused.status_code, refused.json()["error"]["field"]) == (422, "path")
    assert api(bob).get("/api/v1/server-files/").status_code == 403
    assert api(bob).post("/api/v1/datasets/from-server/", {"path": files[0]["path"]}, **put).status_code == 403


def test_a_lost_message_and_a_dead_worker_are_found(team: Team, alice: User, root: Path, queued: list[str]) -> None:
    upload = start_folder_import(team=team, user=alice, path=str(root / "faq.jsonl"))
    assert fetch_waiting() == 0
    old = timezone.now() - timedelta(minutes=5)
    Upload.objects.update(touched_at=old)
    assert fetch_waiting() == 1
    Upload.objects.update(touched_at=old, heartbeat_at=timezone.now())
    assert fetch_waiting() == 0
    fetch(str(upload.pk))
    assert not DatasetVersion.objects.exists(), "another worker has it"
    Upload.objects.update(touched_at=old, heartbeat_at=old)
    assert fetch_waiting() == 1
    fetch(str(upload.pk))
    assert DatasetVersion.objects.count() == 1


def test_a_fetch_that_was_cancelled_registers_nothing(
    team: Team, alice: User, root: Path, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = start_folder_import(team=team, user=alice, path=str(root / "faq.jsonl"))
    opened = fetching.OPENERS["folder"]

    def cancel_first(one: Upload) -> Any:
        cancel_upload(Upload.objects.get(pk=one.pk))
        return opened(one)

    monkeypatch.setitem(fetching.OPENERS, "folder", cancel_first)
    fetch(str(upload.pk))
    assert not DatasetVersion.objects.exists()
    assert not [path for path in Path(settings.DATA_DIR).rglob("*") if path.is_file()]


@pytest.mark.django_db(transaction=True)
def test_a_real_worker_fetches_it(
    team: Team, alice: User, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: Any
) -> None:
    root = tmp_path / "offered"
    root.mkdir()
    (root / "faq.jsonl").write_bytes(CONTENT)
    settings.DATASET_ROOTS = [root]
    monkeypatch.setattr(fetching, "current_app", app)
    with celery_worker("default", tmp_path / "worker.log", environment={"STUDIO_DATASET_ROOTS": str(root)}):
        upload = start_folder_import(team=team, user=alice, path=str(root / "faq.jsonl"))
        wait_for(lambda: Upload.objects.get(pk=upload.pk).state == "finished", what="the import")
    assert DatasetVersion.objects.get().path().read_bytes() == CONTENT

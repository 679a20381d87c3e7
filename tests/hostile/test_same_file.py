"""Row 29: the same file twice is told to the team that has it, and to nobody else by any sign."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from django.core.files.uploadedfile import SimpleUploadedFile
from django.test import Client

from studio import storage
from studio.accounts.models import AuditEvent, Team, User
from studio.datasets.models import DatasetVersion, Upload
from studio.storage.backends import LocalFolder
from tests.conftest import signed_in
from tests.studio.datasets.conftest import good_rows, jsonl
from tests.studio.datasets.test_tus import Sender, api_client

pytestmark = pytest.mark.django_db

CONTENT = jsonl(good_rows())
SHA256 = hashlib.sha256(CONTENT).hexdigest()
# What differs between any two uploads, whoever sends them.
_OWN = {"id", "dataset_id", "created_at", "version_id", "upload_id"}


def post(client: Client, name: str = "faq.jsonl") -> Any:
    return client.post("/api/v1/datasets/", {"file": SimpleUploadedFile(name, CONTENT)})


def told(answer: Any) -> dict[str, Any]:
    """What an answer says beside numbers of its own; headers without what the client sent."""
    body = {key: value for key, value in answer.json().items() if key not in _OWN}
    return {"status": answer.status_code, "body": body, "headers": sorted(answer.headers)}


def test_the_team_that_has_it_is_told_and_another_gets_what_a_new_file_gets(
    team: Team, bob: User, other_team: Team, charlie: User, data_dir: Path
) -> None:
    bobs, charlies = (api_client(t, u, "read", "write") for t, u in ((team, bob), (other_team, charlie)))
    new = post(bobs)
    again = post(bobs, "other.jsonl")
    assert (new.status_code, new.json()["already_stored"]) == (201, False)
    assert (again.status_code, again.json()["already_stored"], again.json()["id"]) == (200, True, new.json()["id"])
    assert DatasetVersion.objects.count() == 1
    theirs = post(charlies)
    assert told(theirs) == told(new)
    events = AuditEvent.objects.filter(team=other_team, action__startswith="dataset.").values_list("action", "details")
    assert list(events) == [("dataset.uploaded", {"sha256": SHA256, "num_bytes": len(CONTENT)})]


def test_in_pieces_the_digest_announced_beforehand_saves_nobody_a_byte(
    team: Team, bob: User, other_team: Team, charlie: User, data_dir: Path
) -> None:
    answers = []
    for client in (signed_in(bob), signed_in(charlie), signed_in(bob)):
        sender = Sender(client)
        begun = sender.begin(sha256=SHA256)
        assert begun.status_code == 201
        assert sender.offset(begun["Location"]) == 0, "every byte is asked for, whoever has the file"
        sent = sender.send(begun["Location"], CONTENT, 0)
        answers.append((sent.status_code, sorted(sent.headers), Upload.objects.latest("created_at").was_stored))
    first, theirs, again = answers
    assert theirs == first
    assert again[2], "the team itself is told"
    assert not theirs[2]


def test_the_page_tells_the_team_and_not_another(team: Team, bob: User, charlie: User, data_dir: Path) -> None:
    def page(user: User) -> str:
        answer = signed_in(user).post(
            "/datasets/upload/", {"file": SimpleUploadedFile("f.jsonl", CONTENT)}, follow=True
        )
        return str(answer.content.decode())

    assert "stored already" not in page(bob)
    assert "stored already" not in page(charlie)
    assert "stored already" in page(bob)


def test_the_same_work_is_done_for_a_file_that_another_team_has(
    team: Team, bob: User, other_team: Team, charlie: User, data_dir: Path, settings: Any, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    # An answer that came sooner would tell: bytes go into a storage that machines share also when they are there.
    put: list[str] = []

    class Shared(LocalFolder):
        def put(self, key: str, path: Path) -> None:
            put.append(key)
            super().put(key, path)

    shared = Shared(tmp_path / "shared")
    settings.S3_BUCKET = "studio"
    monkeypatch.setattr(storage, "backend", lambda: shared)
    post(api_client(team, bob, "read", "write"))
    of_the_first = list(put)
    put.clear()
    post(api_client(other_team, charlie, "read", "write"))
    assert put == of_the_first == [f"blobs/{SHA256[:2]}/{SHA256}"]


def test_what_a_base_was_measured_at_on_the_rows_is_kept_for_each_team(team: Team, other_team: Team) -> None:
    # A job that did not measure it anew would be faster than the first one of such rows can be.
    mine, theirs = (storage.base_scores_folder(SHA256, one.pk) for one in (team, other_team))
    assert mine != theirs
    for folder in (mine, theirs):
        folder.mkdir(parents=True)
    storage.remove_base_scores(SHA256)
    assert not mine.exists()
    assert not theirs.exists()

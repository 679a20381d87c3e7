"""Uploads: what is registered, and what is refused with nothing left behind."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from django.test import Client

from studio.accounts.models import AuditEvent, Team, User
from studio.datasets import inspecting
from studio.datasets.models import Dataset, DatasetVersion
from studio.datasets.uploads import clean_file_name, receive_upload
from studio.storage import DiskFullError, TooLargeError
from tests.studio.datasets.conftest import Upload, good_rows, jsonl
from workers.errors import DatasetError


def blobs(data_dir: Path) -> list[Path]:
    return [path for path in (data_dir / "blobs").rglob("*") if path.is_file()]


def test_it_registers_a_dataset_and_queues_its_inspection(upload: Upload, no_broker: list[int], data_dir: Path) -> None:
    version = upload(jsonl(good_rows()), "support faq.jsonl", inspect=False)
    assert (version.dataset.name, version.number, version.state) == ("support faq", 1, "inspecting")
    assert version.path().read_bytes() == jsonl(good_rows())
    assert no_broker == [version.pk]
    assert AuditEvent.objects.get().action == "dataset.uploaded"


def test_an_upload_survives_a_broker_that_is_down(upload: Upload, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        inspecting, "current_app", Celery(broker="redis+socket:///nowhere/valkey.sock", set_as_current=False)
    )
    assert upload(jsonl(good_rows()), inspect=False).pk


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "empty_file"),
        (b" \n\n", "no_rows"),
        (b"prompt,completion\n", "no_rows"),
        (b"[]", "no_rows"),
        (b'{"name": "one object"}'.replace(b"}", b', "x": {\n"y": 1}}'), "no_rows"),
        (b"\x89PNG\r\n\x1a\n" + b"x" * 100, "wrong_type"),
        (b"PK\x03\x04" + b"x" * 100, "archives_not_accepted"),
        (b"\x1f\x8b\x08" + b"x" * 100, "damaged_file"),
        (b"\x7fELF" + b"x" * 100, "wrong_type"),
        (b"%PDF-1.7\n", "wrong_type"),
        (b"PAR1" + b"x" * 100, "damaged_file"),
        (bytes(range(256)) * 4 + b"\0" * 4000, "wrong_type"),
        ("a,b\nc,d\n".encode("utf-16"), "encoding"),
        ("a,b\nc,d\n".encode("utf-16-le"), "encoding"),
        ("prompt,answer\n" + "é,ü\n" * 10).encode("latin-1") and (("é,ü\n" * 10).encode("latin-1"), "encoding"),
        (b'[{"prompt": "a", "completion": "b"}, {"prompt": "a"', "unreadable_dataset"),
    ],
)
def test_it_refuses_a_file_that_cannot_be_read_and_keeps_nothing(
    upload: Upload, data_dir: Path, content: bytes, code: str
) -> None:
    with pytest.raises(DatasetError) as refusal:
        upload(content, "rows.jsonl")
    assert refusal.value.code == code
    assert refusal.value.message
    assert not Dataset.objects.exists()
    assert blobs(data_dir) == []


def test_a_refusal_names_the_type_behind_the_ending(upload: Upload) -> None:
    with pytest.raises(DatasetError, match=r"named \.jsonl but is a PNG image"):
        upload(b"\x89PNG\r\n\x1a\n123", "rows.jsonl")


def test_the_same_file_is_stored_once_per_team(upload: Upload, other_team: Team, charlie: User, data_dir: Path) -> None:
    first = upload(jsonl(good_rows()))
    again = upload(jsonl(good_rows()), "other name.jsonl", inspect=False)
    assert again.pk == first.pk
    assert again.already_stored
    theirs = upload(jsonl(good_rows()), team=other_team, user=charlie, inspect=False)
    assert not theirs.already_stored
    assert theirs.dataset.team == other_team
    assert len(blobs(data_dir)) == 1


def test_a_taken_name_is_refused_and_a_taken_file_name_gets_a_number(upload: Upload) -> None:
    upload(jsonl(good_rows(10)), "faq.jsonl", inspect=False)
    second = upload(jsonl(good_rows(11)), "faq.jsonl", inspect=False)
    assert second.dataset.name == "faq 2"
    with pytest.raises(DatasetError) as refusal:
        upload(jsonl(good_rows(12)), name="faq")
    assert (refusal.value.code, refusal.value.field) == ("name_taken", "name")


def test_a_new_version_gets_the_next_number(upload: Upload) -> None:
    first = upload(jsonl(good_rows(10)), inspect=False)
    second = upload(jsonl(good_rows(11)), dataset=first.dataset, inspect=False)
    assert (second.dataset_id, second.number) == (first.dataset_id, 2)


def test_a_file_over_the_limit_and_a_full_disk_leave_nothing(
    upload: Upload, settings: Any, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.MAX_UPLOAD_BYTES = 100
    with pytest.raises(TooLargeError):
        upload(jsonl(good_rows()))
    settings.MAX_UPLOAD_BYTES = 10**9

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("studio.storage.os.fsync", full)
    with pytest.raises(DiskFullError, match="disk is full"):
        upload(jsonl(good_rows()))
    assert not DatasetVersion.objects.exists()
    assert blobs(data_dir) == []


@pytest.mark.parametrize(
    ("file_name", "cleaned"),
    [
        ("../../etc/passwd", "passwd"),
        ("C:\\Users\\me\\rows.csv", "rows.csv"),
        ("a\r\nSet-Cookie: x.jsonl", "aSet-Cookie: x.jsonl"),
        ("rows\u202elnosj.exe", "rowslnosj.exe"),
        ("..", "upload"),
        ("", "upload"),
        ("🦜.jsonl", "🦜.jsonl"),
        ("CON", "_CON"),
        ("nul.jsonl", "_nul.jsonl"),
        ("com1.tar.gz", "_com1.tar.gz"),
        ("console.jsonl", "console.jsonl"),
    ],
)
def test_it_cleans_file_names(file_name: str, cleaned: str) -> None:
    assert clean_file_name(file_name) == cleaned


def test_it_shortens_a_long_file_name_and_keeps_its_ending() -> None:
    assert len(clean_file_name("x" * 4000 + ".jsonl")) == 120
    assert clean_file_name("x" * 4000 + ".jsonl").endswith(".jsonl")


def test_an_upload_by_form_goes_to_the_version(alice_client: Client, data_dir: Path) -> None:
    from django.core.files.uploadedfile import SimpleUploadedFile

    file = SimpleUploadedFile("faq.jsonl", jsonl(good_rows()))
    answer = alice_client.post("/datasets/upload/", {"name": "FAQ", "file": file})
    version = DatasetVersion.objects.get()
    assert (answer.status_code, answer["Location"]) == (302, version.get_absolute_url())
    assert version.dataset.name == "FAQ"
    # The form's own temporary file is gone.
    assert blobs(data_dir) == [version.path()]


def test_a_refused_upload_shows_the_form_with_the_sentence(alice_client: Client, data_dir: Path) -> None:
    from django.core.files.uploadedfile import SimpleUploadedFile

    answer = alice_client.post("/datasets/upload/", {"file": SimpleUploadedFile("faq.jsonl", b"")})
    assert answer.status_code == 422
    assert "The file has 0 bytes." in answer.content.decode()
    answer = alice_client.post("/datasets/upload/", {})
    assert answer.status_code == 422


def test_an_upload_over_the_limit_is_413(alice_client: Client, data_dir: Path, settings: Any) -> None:
    from django.core.files.uploadedfile import SimpleUploadedFile

    settings.MAX_UPLOAD_BYTES = 100
    answer = alice_client.post("/datasets/upload/", {"file": SimpleUploadedFile("faq.jsonl", b"x" * 1000)})
    assert answer.status_code == 413
    assert "larger than" in answer.content.decode()
    assert blobs(data_dir) == []


def test_an_upload_needs_the_forms_token(alice: User, data_dir: Path) -> None:
    client = Client(enforce_csrf_checks=True)
    client.force_login(alice)
    assert client.post("/datasets/upload/", {"name": "x"}).status_code == 403


def test_receive_upload_holds_one_chunk_at_a_time(team: Team, alice: User, data_dir: Path) -> None:
    alive = 0
    most = 0

    class Chunk(bytes):
        def __new__(cls, content: bytes) -> Chunk:
            nonlocal alive, most
            alive += 1
            most = max(most, alive)
            return super().__new__(cls, content)

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    row = jsonl(good_rows(100))
    receive_upload(team=team, user=alice, file_name="x.jsonl", chunks=(Chunk(row) for _ in range(50)))
    assert most <= 2

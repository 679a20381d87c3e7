"""A job's files between a machine and a storage that all share, against a real S3-compatible server."""

from __future__ import annotations

import json
import shutil
import uuid
import zipfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from django.test import Client

from jobs import files
from jobs.files import CheckpointStore, fetch_checkpoint
from studio import storage
from studio.accounts.models import Team, User
from studio.catalogue import base_files
from studio.storage import NotStoredError, StorageError, fetching
from studio.storage.backends import backend
from tests.factories import make_adapter, make_base_model
from tests.s3_server import S3Server, s3_server
from workers.checkpoint_names import DAMAGED
from workers.digests import file_sha256
from workers.errors import DamagedAdapterError
from workers.events import CheckpointEvent, PhaseEvent


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as found:
        yield found


@pytest.fixture
def shared(server: S3Server, settings: Any, data_dir: Path) -> None:
    for name, value in server.settings(f"files/{uuid.uuid4()}").items():
        setattr(settings, name, value)


@pytest.fixture
def job() -> Any:
    """What these functions know of a job: its id."""
    return SimpleNamespace(pk=uuid.uuid4())


def make_checkpoint(job: Any, name: str) -> Path:
    folder = storage.job_folder(job.pk) / "checkpoints" / name
    folder.mkdir(parents=True)
    weights = folder / "adapter.safetensors"
    weights.write_text(f"weights of {name}")
    entry = {"path": weights.name, "size": weights.stat().st_size, "sha256": file_sha256(weights)}
    (folder / "MANIFEST.json").write_text(json.dumps({"files": [entry]}))
    return folder


def store_checkpoints(job: Any, *folders: Path, attempt: int = 1) -> None:
    log = storage.job_folder(job.pk) / "attempts" / str(attempt) / "trainer.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("a line")
    heard: list[object] = []
    with CheckpointStore(job.pk, attempt) as store:
        tell = store.telling(heard.append)
        for folder in folders:
            tell(CheckpointEvent(step=int(folder.name.partition("-")[0]), folder=str(folder), num_bytes=1))
        tell(PhaseEvent(phase="evaluating"))
        store.finish(log)
    assert len(heard) == len(folders) + 1


def stored_names(job: Any) -> list[str]:
    return [key.rpartition("/")[2] for key in fetching.stored_folders(f"jobs/{job.pk}/checkpoints/")]


def another_machine(settings: Any, tmp_path: Path) -> None:
    settings.DATA_DIR = tmp_path / f"machine-{uuid.uuid4().hex[:6]}"
    settings.DATA_DIR.mkdir()


def test_checkpoints_and_the_log_are_stored_and_the_newest_two_stay(shared: None, job: Any) -> None:
    for step in (5, 10, 15):
        store_checkpoints(job, make_checkpoint(job, f"{step}-1"))
    assert stored_names(job) == ["10-1", "15-1"]
    assert all("/5-1/" not in key for key in backend().keys(f"jobs/{job.pk}/"))
    with backend().open(f"jobs/{job.pk}/attempts/1/trainer.log") as log:
        assert log.read() == b"a line"


def test_another_machine_gets_the_newest_and_asks_for_nothing_when_it_has_it(
    shared: None, job: Any, settings: Any, tmp_path: Path
) -> None:
    store_checkpoints(job, make_checkpoint(job, "5-1"))
    store_checkpoints(job, make_checkpoint(job, "10-2"), attempt=2)
    another_machine(settings, tmp_path)
    found = fetch_checkpoint(job)
    assert found == storage.job_folder(job.pk) / "checkpoints" / "10-2"
    assert (found / "adapter.safetensors").read_text() == "weights of 10-2"
    assert fetch_checkpoint(job) is None
    make_checkpoint(job, "12-3")
    assert fetch_checkpoint(job) is None


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    shared: None, job: Any, settings: Any, tmp_path: Path
) -> None:
    for step in (5, 10):
        store_checkpoints(job, make_checkpoint(job, f"{step}-1"))
    bad = tmp_path / "bad"
    bad.write_text("weights of 10-I")
    backend().put(f"jobs/{job.pk}/checkpoints/10-1/adapter.safetensors", bad)
    another_machine(settings, tmp_path)
    found = fetch_checkpoint(job)
    assert found is not None
    assert found.name == "5-1"


def test_a_checkpoint_that_was_damaged_here_is_fetched_again(shared: None, job: Any) -> None:
    folder = make_checkpoint(job, "10-1")
    store_checkpoints(job, folder)
    whole = (folder / "adapter.safetensors").read_bytes()
    (folder / "adapter.safetensors").write_bytes(b"other bytes")
    assert fetch_checkpoint(job) is None, "nobody has noticed yet"
    (folder / DAMAGED).touch()
    assert fetch_checkpoint(job) == folder
    assert (folder / "adapter.safetensors").read_bytes() == whole
    assert not (folder / DAMAGED).exists()


def test_a_checkpoint_that_the_trainer_removed_meanwhile_harms_nothing(shared: None, job: Any) -> None:
    gone, half, kept = (make_checkpoint(job, f"{step}-1") for step in (5, 7, 10))
    shutil.rmtree(gone)
    (half / "adapter.safetensors").unlink()
    for folder in (gone, half, kept):
        store_checkpoints(job, folder)
    assert stored_names(job) == ["10-1"]
    assert not [key for key in backend().keys(f"jobs/{job.pk}/checkpoints/") if "/10-1/" not in key]


def test_a_storage_that_is_away_keeps_a_job_from_starting_anew_and_loses_no_training(
    shared: None, job: Any, settings: Any
) -> None:
    folder = make_checkpoint(job, "5-1")
    settings.S3_ENDPOINT = "http://127.0.0.1:9"
    store_checkpoints(job, folder)
    assert (folder / "MANIFEST.json").exists()
    with pytest.raises(StorageError, match="does not answer"):
        fetch_checkpoint(job)


def test_without_a_shared_storage_nothing_is_copied(job: Any, data_dir: Path) -> None:
    folder = make_checkpoint(job, "5-1")
    before = sorted(path for path in data_dir.rglob("*") if path.is_file())
    with CheckpointStore(job.pk, 1) as store:
        store.hear(CheckpointEvent(step=5, folder=str(folder), num_bytes=1))
        store.finish(folder / "none.log")
    assert fetch_checkpoint(job) is None
    assert sorted(path for path in data_dir.rglob("*") if path.is_file()) == before


@pytest.mark.django_db
def test_a_base_model_comes_from_where_it_lies_or_from_the_storage(shared: None, settings: Any, tmp_path: Path) -> None:
    base = make_base_model()
    registered = Path(base.folder)
    assert base_files.local_folder(base) == registered
    assert base_files.share_base_models() == 1
    weights = registered / "model.safetensors"
    content = weights.read_bytes()
    # The path is there on another machine, too, with other files in it.
    (registered / "config.json").write_text("{}")
    another_machine(settings, tmp_path)
    fetched = base_files.local_folder(base)
    assert fetched == Path(settings.DATA_DIR) / "base_models" / base.revision
    assert (fetched / "model.safetensors").read_bytes() == content
    assert base_files.holds_files(fetched, base.files)
    assert files.base_model_folder(SimpleNamespace(base_model=base)) == fetched  # type: ignore[arg-type]


@pytest.mark.django_db
def test_a_base_model_that_is_not_there_yet_is_said(shared: None, settings: Any, tmp_path: Path) -> None:
    base = make_base_model()
    Path(base.folder).rename(tmp_path / "away")
    with pytest.raises(NotStoredError, match=r"Tiny is not in the storage yet"):
        base_files.local_folder(base)
    assert base_files.share_base_models() == 0


@pytest.mark.django_db
def test_an_adapter_of_another_machine_is_downloaded_from_the_web(
    shared: None, settings: Any, tmp_path: Path, team: Team, alice: User, alice_client: Client
) -> None:
    adapter = make_adapter(team, alice)
    fetching.store_folder(storage.adapter_folder(adapter.folder), f"adapters/{adapter.folder}")
    settings.DATA_DIR = tmp_path / "elsewhere"
    page = alice_client.get(adapter.get_absolute_url())
    assert page.status_code == 200
    assert "Answers questions about <em>animals</em>" in page.content.decode()
    answer = alice_client.get(f"{adapter.get_absolute_url()}download/")
    assert answer.status_code == 200
    content = b"".join(answer.streaming_content)  # type: ignore[attr-defined]
    with zipfile.ZipFile(BytesIO(content)) as archive:
        assert archive.testzip() is None
        assert len(archive.namelist()) == len(adapter.files)
    backend().delete([f"adapters/{adapter.folder}/adapter_model.safetensors"])
    from studio.catalogue.bundles import check_files

    with pytest.raises(DamagedAdapterError, match="missing in the studio's storage"):
        check_files(adapter)

"""Two machines that share Postgres, Redis and an S3-compatible storage, and no folder: one goes, the other goes on.

Both are this machine, with a data folder each. The folders of the web process and of the first machine are moved
away before the second begins, so whatever it needs can only come from the storage.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings as django_settings
from django.test import Client
from pytest_django.live_server_helper import LiveServer

from jobs.join_tokens import issue_join_token
from jobs.models import Job, JobState, Worker
from studio import storage
from studio.accounts.models import AuditEvent, Team, User
from studio.catalogue.base_files import share_base_models, storage_key
from studio.catalogue.importing import register_base_model
from studio.catalogue.models import BaseModel
from studio.storage import fetching
from studio.storage.backends import backend
from tests.faults.test_worker_deaths import WEIGHTS, wait_for_step, wait_until_final
from tests.processes import celery_worker, kill_tree, test_environment, wait_for, with_steps_of
from tests.s3_server import s3_server
from tests.tiny import make_tiny_base

pytestmark = pytest.mark.django_db(transaction=True)

PATIENCE = 300


@pytest.fixture
def shared(settings: Any, tmp_path: Path) -> Iterator[dict[str, str]]:
    """A studio with its files in a real S3-compatible server; gives what its workers must know of it."""
    settings.DATA_DIR = tmp_path / "web"
    # The children's database is the test's own, and the web process tells it to whoever joins.
    settings.DATABASE_URL = test_environment()["DATABASE_URL"]
    with s3_server() as server:
        values = server.settings("two-machines")
        for name, value in values.items():
            setattr(settings, name, value)
        yield {f"STUDIO_{name}": value for name, value in values.items()}


@pytest.fixture
def base_model(shared: dict[str, str], transactional_db: None) -> BaseModel:
    folder = make_tiny_base(Path(django_settings.DATA_DIR) / "base_models" / "tiny")
    return register_base_model(folder=folder, name="tiny-llama", hub_id="studio/tiny-llama", licence="apache-2.0")


def move_away(folder: Path) -> None:
    folder.rename(folder.with_name(f"{folder.name}-gone"))


def weights_digest(job: Job) -> str:
    with storage.open_adapter_file(job.adapter.folder, WEIGHTS) as file:
        return hashlib.sha256(file.read()).hexdigest()


def join_command(data_dir: Path, *arguments: str, log: Path) -> subprocess.Popen[bytes]:
    """The real command on another machine, which knows nothing of the studio but what it is told."""
    names = ("DATABASE_URL", "REDIS_URL", "STUDIO_SECRET_KEY")
    known = {name: value for name, value in os.environ.items() if name not in names and "_S3_" not in name}
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "manage.py", "join", *arguments], cwd=django_settings.ROOT, stdout=output, stderr=output,
            env=known | {"STUDIO_DATA_DIR": str(data_dir), "OMP_NUM_THREADS": "1"}, start_new_session=True,
        )  # fmt: skip


@pytest.mark.timeout(900)
def test_a_second_machine_joins_and_goes_on_where_the_first_was_killed(
    shared: dict[str, str], queue: Callable[..., Job], team: Team, alice: User, alice_client: Client,
    live_server: LiveServer, settings: Any, tmp_path: Path,
) -> None:  # fmt: skip
    disturbed, undisturbed = queue("disturbed"), queue("undisturbed")
    assert share_base_models() == 1
    assert share_base_models() == 0
    move_away(tmp_path / "web")
    settings.DATA_DIR = tmp_path / "web-anew"

    first = tmp_path / "first"
    environment = shared | with_steps_of(0.5) | {"STUDIO_DATA_DIR": str(first)}
    with celery_worker("gpu", tmp_path / "first.log", environment=environment) as worker:
        wait_for_step(disturbed, 12)
        stored = f"jobs/{disturbed.pk}/checkpoints/"
        wait_for(lambda: fetching.stored_folders(stored), seconds=PATIENCE, what="a checkpoint in the storage")
        kill_tree(worker.pid)
    assert Job.objects.get(pk=disturbed.pk).state == JobState.RUNNING
    move_away(first)

    token, secret = issue_join_token(team, alice)
    second = tmp_path / "second"
    process = join_command(second, live_server.url, secret, log=tmp_path / "second.log")
    try:
        wait_for(
            lambda: disturbed.attempts.filter(number__gt=1).exists() or process.poll() is not None,
            seconds=PATIENCE, what="the second attempt",
        )  # fmt: skip
        assert process.poll() is None, (tmp_path / "second.log").read_text()
        disturbed, undisturbed = wait_until_final(disturbed), wait_until_final(undisturbed)
        log = (tmp_path / "second.log").read_text()
        for job in (disturbed, undisturbed):
            assert (job.state, job.failure_message) == (JobState.SUCCEEDED, ""), log
        assert secret not in log
        assert weights_digest(disturbed) == weights_digest(undisturbed)
        last = disturbed.attempts.order_by("number").last()
        assert last is not None
        assert last.from_step > 0, "it began at a checkpoint out of the storage"
        outcomes = disturbed.attempts.order_by("number").values_list("outcome", "failure_code")
        assert list(outcomes) == [("lost", "worker_lost"), ("succeeded", "")]
        page = alice_client.get("/workers/").content.decode()
        assert "1 worker" in page
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0, (tmp_path / "second.log").read_text()
    finally:
        kill_tree(process.pid)
        process.wait()

    # What the second machine has, it was told or has fetched; what it leaves is in the storage.
    assert (second / storage_key(disturbed.base_model) / "config.json").is_file()
    assert backend().size(f"jobs/{disturbed.pk}/attempts/{last.number}/trainer.log") is not None
    kept = second / "joined.json"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    told = json.loads(kept.read_text())["environment"]
    assert told["DATABASE_URL"] == settings.DATABASE_URL
    assert "STUDIO_SECRET_KEY" not in told
    token.refresh_from_db()
    assert token.used_at is not None
    assert list(AuditEvent.objects.filter(action="machine.joined").values_list("user", flat=True)) == [alice.pk]
    assert Worker.objects.filter(is_draining=True).count() == 1, "the second said that it goes, the first could not"

    again = join_command(tmp_path / "third", live_server.url, secret, log=tmp_path / "third.log")
    assert again.wait(PATIENCE) == 1
    assert "unknown, used, revoked or too old" in (tmp_path / "third.log").read_text()
    assert not (tmp_path / "third" / "joined.json").exists()


@pytest.mark.timeout(900)
def test_a_worker_that_stops_brings_its_last_checkpoint_into_the_storage_first(
    shared: dict[str, str], queue: Callable[..., Job], settings: Any, tmp_path: Path
) -> None:
    job = queue(max_steps=60, epochs=10, checkpoint_every_steps=1000)
    share_base_models()
    move_away(tmp_path / "web")
    settings.DATA_DIR = tmp_path / "web-anew"
    for name, pace in (("first", with_steps_of(0.2)), ("second", {})):
        environment = shared | pace | {"STUDIO_DATA_DIR": str(tmp_path / name)}
        with celery_worker("gpu", tmp_path / f"{name}.log", environment=environment) as worker:
            if name == "second":
                job = wait_until_final(job)
                continue
            wait_for_step(job, 7)
            os.kill(worker.pid, signal.SIGTERM)
            worker.wait(PATIENCE)
        assert Job.objects.get(pk=job.pk).state == JobState.QUEUED
        move_away(tmp_path / name)
    assert (job.state, job.failures_counted) == (JobState.SUCCEEDED, 0)
    assert job.attempts.get(number=2).from_step >= 7

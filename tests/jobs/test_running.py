"""What happens after training: the product is registered, whatever the database and the clock do meanwhile."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psycopg
import pytest
from django.db import OperationalError, connection

from jobs import running
from jobs.models import Job, JobState
from jobs.running import run_job, until_answered
from studio.accounts.models import Team, User
from studio.catalogue import registering
from studio.storage import adapter_folder
from tests.factories import make_adapter_folder, make_result
from tests.jobs.making import make_running_job

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("data_dir")]

TRAINER = """
import json, os, sys
fd = int(sys.argv[sys.argv.index("--events") + 1])
os.write(fd, json.dumps({"type": "result", "folder": sys.argv[1]}).encode() + b"\\n")
"""


@pytest.fixture
def job(team: Team, bob: User, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """A claimed job whose trainer is done at once; its product lies ready."""
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER)
    product = adapter_folder(make_adapter_folder(result=make_result()))
    monkeypatch.setattr(running, "trainer_command", lambda job, folder: [sys.executable, str(script), str(product)])
    return make_running_job(team, bob)


def test_hashing_for_longer_than_the_lease_costs_neither_lease_nor_product(
    job: Job, monkeypatch: pytest.MonkeyPatch, settings
) -> None:
    settings.LEASE_SECONDS = 3
    real = registering.file_digests

    def slow(folder: Path) -> list[dict[str, str | int]]:
        time.sleep(4)
        return real(folder)

    monkeypatch.setattr(registering, "file_digests", slow)
    run_job(job)
    job.refresh_from_db()
    assert (job.state, job.attempt) == (JobState.SUCCEEDED, 1)
    assert adapter_folder(job.adapter.folder).is_dir()


def test_a_connection_that_died_during_training_costs_nothing(job: Job) -> None:
    """As after a restart of the database: every connection of this process is cut while the trainer runs."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        (mine,) = cursor.fetchone()

    def cut(_event: object) -> None:
        with psycopg.connect(**connection.get_connection_params()) as other:
            other.execute("SELECT pg_terminate_backend(%s)", [mine])

    run_job(job, tell=cut)
    job.refresh_from_db()
    assert (job.state, job.attempt, job.failures_counted) == (JobState.SUCCEEDED, 1, 0)


def test_an_action_is_tried_until_the_database_answers_and_not_for_ever(
    settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.LEASE_SECONDS = 2
    calls: list[float] = []
    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    # A clock of its own: how long the machine takes is no matter.
    monkeypatch.setattr(running, "boot_clock", lambda: now)
    monkeypatch.setattr(running, "time", SimpleNamespace(sleep=sleep))

    def failing(times: int) -> Callable[[], None]:
        def act() -> None:
            calls.append(now)
            if len(calls) <= times:
                raise OperationalError("the server has gone away")

        return act

    until_answered(failing(3))
    assert len(calls) == 4
    calls.clear()
    with pytest.raises(OperationalError):
        until_answered(failing(10_000))
    assert calls[-1] - calls[0] == pytest.approx(1.0, abs=0.11)

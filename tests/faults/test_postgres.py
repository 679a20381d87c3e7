"""A database that restarts, stays away, is full or breaks off a deadlock: no job is lost, and no page answers 500."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
from django.conf import settings as django_settings
from django.core.management import call_command
from django.db import OperationalError, connection, transaction
from django.test import Client

from jobs.models import Job, JobState
from jobs.retrying import tried_again
from studio.accounts.models import ApiToken, Team, User
from studio.embedded import EmbeddedServers
from tests.faults.invariants import broken_invariants
from tests.faults.quick import describe, expected_weights, reload, wait_for_step, wait_until_final, weights
from tests.faults.slot_workers import SlotWorkers
from tests.jobs.making import make_job
from tests.processes import test_environment, wait_for

pytestmark = pytest.mark.django_db(transaction=True)

MAX_CONNECTIONS = 20


class Database:
    """A PostgreSQL server of these tests' own, migrated, with few connections."""

    def __init__(self, folder: Path) -> None:
        self.servers = EmbeddedServers(folder)
        self.url = self.servers.start(valkey=False).database
        with psycopg.connect(self.url, autocommit=True) as server:
            server.execute(f"ALTER SYSTEM SET max_connections = {MAX_CONNECTIONS}")
        self.kill()
        self.revive()
        migrate = [sys.executable, "manage.py", "migrate", "--verbosity=0", "--skip-checks"]
        environment = os.environ | {"DATABASE_URL": self.url}
        subprocess.run(migrate, cwd=django_settings.ROOT, env=environment, check=True)

    def kill(self) -> None:
        """As `pg_ctl stop -m immediate`: no checkpoint, no goodbye; the next start recovers from the log."""
        os.kill(self.servers.pids()["postgres"], signal.SIGQUIT)
        wait_for(lambda: "postgres" not in self.servers.pids(), what="the end of PostgreSQL")
        connection.close()

    def revive(self) -> None:
        assert self.servers.revive() == ["postgres"]


@pytest.fixture(scope="module")
def server() -> Iterator[Database]:
    folder = Path(tempfile.mkdtemp(prefix="ps-"))
    folder.chmod(0o711)
    own = Database(folder)
    yield own
    own.servers.stop()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def database(transactional_db: None, server: Database) -> Iterator[Database]:
    """The server, in whose database everything is that fixtures after this one make. It is empty afterwards."""
    before = dict(connection.settings_dict)
    parts = psycopg.conninfo.conninfo_to_dict(server.url.replace("postgres://", "postgresql://"))
    connection.close()
    connection.settings_dict.update(
        HOST=parts["host"], USER=parts["user"], PASSWORD=parts["password"], NAME=parts["dbname"], PORT=""
    )
    yield server
    server.servers.revive()
    connection.close()
    call_command("flush", interactive=False, verbosity=0)
    connection.close()
    connection.settings_dict.update(before)


@pytest.fixture
def own_workers(database: Database, tmp_path: Path) -> Iterator[SlotWorkers]:
    started = SlotWorkers(tmp_path, test_environment())
    yield started
    started.stop()


def finish(jobs: list[Job]) -> None:
    for job in jobs:
        ended = wait_until_final(job)
        assert ended.state == JobState.SUCCEEDED, describe(job)
        assert weights(ended) == expected_weights(job)
    assert broken_invariants(patience=30) == []


def restart_database_while_jobs_run(
    database: Database, workers: SlotWorkers, quick: Callable[..., Job], times: int
) -> None:
    jobs = [quick(f"job {number}", max_steps=60, every=10) for number in range(2 + times // 4)]
    slots = [workers.start("slot", index, settings={"MAX_ATTEMPTS": 100}) for index in range(2)]
    wait_for_step(jobs[0], 2)
    for _ in range(times):
        time.sleep(0.5)  # the fault's own rhythm: jobs make some progress in between
        database.kill()
        database.revive()
    finish(jobs)
    assert not [slot for slot in slots if slot.is_gone()], "a worker outlives its database"


def test_an_immediate_restart_of_the_database_costs_no_job(
    database: Database, own_workers: SlotWorkers, quick: Callable[..., Job]
) -> None:
    restart_database_while_jobs_run(database, own_workers, quick, times=3)


@pytest.mark.slow
def test_20_immediate_restarts_of_the_database_cost_no_job(
    database: Database, own_workers: SlotWorkers, quick: Callable[..., Job]
) -> None:
    restart_database_while_jobs_run(database, own_workers, quick, times=20)


def test_a_database_away_for_longer_than_the_lease_ends_the_trainer_in_time_and_the_job_resumes(
    database: Database, own_workers: SlotWorkers, quick: Callable[..., Job]
) -> None:
    job = quick(max_steps=220, every=5)
    # A longer lease than elsewhere leaves more time between the trainer's end and its own.
    lease = 10.0
    slot = own_workers.start("slot", settings={"LEASE_SECONDS": lease})
    wait_for_step(job, 6)
    lease_until = reload(job).lease_until
    database.kill()
    assert slot.trainers(), "a trainer does not mind a database that is away for a moment"
    wait_for(lambda: not slot.trainers(), seconds=lease, what="the end of the trainer, before its lease ends")
    wait_for(lambda: time.time() > lease_until.timestamp() + 2, what="the end of the lease, and some time after it")
    database.revive()
    finish([job])
    first, *_, last = job.attempts.order_by("number")
    # Taken back by a reaper, or handed back by its worker, whichever reached the database first.
    assert (first.outcome, first.failure_code) in {("lost", "worker_lost"), ("failed", "database")}
    assert last.outcome == "succeeded"
    assert last.from_step >= 5, "it goes on from its checkpoint"
    assert not slot.is_gone()


def answers(client: Client, path: str, **headers: str) -> tuple[int, str | None, str]:
    connection.close()
    response = client.get(path, headers=headers)
    return response.status_code, response.get("Retry-After"), response.content.decode()


def test_pages_and_api_answer_503_and_retry_after_while_the_database_is_away(
    database: Database, bob: User, bob_client: Client, team: Team
) -> None:
    job = make_job(team, bob)
    token = {"Authorization": f"Bearer {ApiToken.issue(team=team, user=bob, name='ci', scopes=['read'])[1]}"}
    pages = ["/", "/jobs/", f"/jobs/{job.pk}/", "/datasets/", "/jobs/new/"]
    api = ["/api/v1/me", "/api/v1/jobs/", f"/api/v1/jobs/{job.pk}/"]
    bob_client.raise_request_exception = False
    stranger = Client(raise_request_exception=False)
    database.kill()
    for path in pages:
        status, retry_after, text = answers(bob_client, path)
        assert (status, retry_after) == (503, "5"), path
        assert "The database does not answer" in text
    for path in api:
        status, retry_after, text = answers(stranger, path, **token)
        assert (status, retry_after) == (503, "5"), path
        assert '"code": "unavailable"' in text
    database.revive()
    assert [answers(bob_client, path)[0] for path in pages] == [200] * len(pages)
    assert [answers(stranger, path, **token)[0] for path in api] == [200] * len(api)


def test_without_a_free_connection_pages_answer_503_and_a_running_job_keeps_its_lease(
    database: Database, own_workers: SlotWorkers, quick: Callable[..., Job], bob_client: Client
) -> None:
    bob_client.raise_request_exception = False
    job = quick(max_steps=160, every=20)
    own_workers.start("slot")
    wait_for_step(job, 2)
    connection.close()
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(psycopg.OperationalError):
            for _ in range(MAX_CONNECTIONS + 1):
                stack.enter_context(psycopg.connect(database.url))
        for _ in range(3):
            status, retry_after, text = answers(bob_client, "/jobs/")
            assert (status, retry_after) == (503, "5")
            assert "The database does not answer" in text
        time.sleep(1.5 * django_settings.LEASE_SECONDS)  # the fault lasts for longer than a lease
    assert answers(bob_client, "/jobs/")[0] == 200
    finish([job])
    assert reload(job).attempt == 1, "its heartbeat has a connection of its own, held since it began"


def lock_in_order(jobs: list[Job], meet: threading.Barrier) -> None:
    with transaction.atomic():
        Job.objects.select_for_update().get(pk=jobs[0].pk)
        with contextlib.suppress(threading.BrokenBarrierError):
            meet.wait(10)  # broken after the first meeting: a second try has nobody to meet
        meet.abort()
        Job.objects.filter(pk=jobs[1].pk).update(priority=1)


def test_of_two_transactions_in_a_deadlock_the_one_that_is_broken_off_is_done_again(
    quick: Callable[..., Job],
) -> None:
    jobs = [quick("first"), quick("second")]
    meet = threading.Barrier(2)
    failed: list[BaseException] = []

    def run(order: list[Job]) -> None:
        try:
            tried_again(lock_in_order)(order, meet)
        except BaseException as error:  # noqa: BLE001 - handed to the test's own thread
            failed.append(error)
        finally:
            connection.close()

    threads = [threading.Thread(target=run, args=[order]) for order in (jobs, jobs[::-1])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert {reload(job).priority for job in jobs} == {1}


def test_a_conflict_that_does_not_end_is_raised_after_three_tries_and_other_errors_at_once() -> None:
    tries: list[str] = []

    def fail(cause: Exception) -> None:
        tries.append(type(cause).__name__)
        raise OperationalError("broken off") from cause

    for cause in (psycopg.errors.DeadlockDetected(), psycopg.errors.AdminShutdown()):
        with pytest.raises(OperationalError):
            tried_again(fail)(cause)
    assert tries == ["DeadlockDetected"] * 3 + ["AdminShutdown"]

"""A broker that dies, forgets, is full or does not answer: jobs run on, and what it was to be told waits for it."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis
from django.db import connection
from django.test import Client
from kombu import pools

from jobs import outbox, progress, sweeping
from jobs.celery import app
from jobs.models import Job, JobState, OutboxMessage
from studio.embedded import EmbeddedServers
from tests.faults.invariants import broken_invariants
from tests.faults.quick import describe, expected_weights, reload, wait_for_step, weights
from tests.faults.quick_app import quick_celery_worker
from tests.processes import held, trainers_of, wait_for

pytestmark = pytest.mark.django_db(transaction=True)


class Broker:
    """A Valkey server of a test's own, to which this process and its workers speak."""

    def __init__(self, folder: Path) -> None:
        self.servers = EmbeddedServers(folder)
        self.url = self.servers.start(postgres=False).redis
        self.environment = {"REDIS_URL": self.url}

    def client(self) -> redis.Redis:
        return redis.Redis.from_url(self.url, socket_timeout=10)

    def kill(self) -> None:
        pid = self.servers.pids()["valkey"]
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: "valkey" not in self.servers.pids(), what="the death of Valkey")

    def revive(self) -> None:
        assert self.servers.revive() == ["valkey"]

    def restart(self) -> None:
        self.kill()
        self.revive()


@pytest.fixture
def broker(settings: object) -> Iterator[Broker]:
    folder = Path(tempfile.mkdtemp(prefix="ps-"))
    folder.chmod(0o711)
    own = Broker(folder)
    before = app.conf.broker_url
    speak_to(own.url.replace("unix://", "redis+socket://", 1))
    settings.REDIS_URL = own.url  # type: ignore[attr-defined]
    progress._client.cache_clear()
    yield own
    speak_to(before)
    progress._client.cache_clear()
    own.servers.stop()
    shutil.rmtree(folder, ignore_errors=True)


def speak_to(url: str) -> None:
    """Have this process's Celery application use another broker, and forget what it knew of the last one."""
    app.conf.broker_url = url
    app._after_fork()
    pools.reset()
    outbox._silent_until = 0.0


def finish(jobs: list[Job], *, seconds: float = 240) -> None:
    """All jobs end by themselves, each with the adapter of an undisturbed run, and nothing waits to be sent."""
    for job in jobs:
        wait_for(lambda job=job: reload(job).is_final(), seconds=seconds, what=f"the end of {job.name}")
        assert reload(job).state == JobState.SUCCEEDED, describe(job)
        assert reload(job).attempt == 1, "a broker's fault costs no attempt"
        assert weights(reload(job)) == expected_weights(job)
    wait_for(nothing_waits, what="the emptying of the outbox")
    assert broken_invariants(patience=20) == []


def nothing_waits() -> bool:
    return not OutboxMessage.objects.filter(sent_at=None).exists()


def restart_broker_while_jobs_run(broker: Broker, quick: Callable[..., Job], tmp_path: Path, times: int) -> None:
    with quick_celery_worker(tmp_path / "worker.log", **broker.environment) as worker:
        jobs = [quick("first", max_steps=40)]
        wait_for_step(jobs[0], 1)
        for number in range(times):
            broker.restart()
            jobs.append(quick(f"after restart {number}"))
        finish(jobs)
        assert worker.poll() is None


def test_a_broker_that_is_killed_and_restarted_costs_no_job(
    broker: Broker, quick: Callable[..., Job], tmp_path: Path
) -> None:
    restart_broker_while_jobs_run(broker, quick, tmp_path, times=3)


@pytest.mark.slow
def test_a_broker_that_is_killed_and_restarted_20_times_costs_no_job(
    broker: Broker, quick: Callable[..., Job], tmp_path: Path
) -> None:
    restart_broker_while_jobs_run(broker, quick, tmp_path, times=20)


def test_jobs_run_without_any_broker_and_the_outbox_empties_once_it_is_back(
    broker: Broker, quick: Callable[..., Job], tmp_path: Path
) -> None:
    with quick_celery_worker(tmp_path / "worker.log", **broker.environment):
        first = quick("with a broker")
        wait_for(lambda: reload(first).is_final(), what="the end of the first job")
        broker.kill()
        jobs = [quick(f"without {number}") for number in range(3)]
        for job in jobs:
            wait_for(lambda job=job: reload(job).is_final(), what=f"the end of {job.name}")
        waiting = OutboxMessage.objects.filter(sent_at=None)
        assert waiting.count() == 3
        assert all(message.last_error for message in waiting.exclude(attempts=0))
        assert waiting.exclude(attempts=0).exists()
        broker.revive()
        # By the idle slot's own sweeps; nobody calls one here.
        wait_for(nothing_waits, what="the emptying of the outbox")
        finish([first, *jobs])


def test_a_broker_that_forgets_everything_costs_no_job(
    broker: Broker, quick: Callable[..., Job], tmp_path: Path
) -> None:
    with quick_celery_worker(tmp_path / "worker.log", **broker.environment):
        jobs = [quick("running", max_steps=60), quick("waiting")]
        wait_for_step(jobs[0], 2)
        broker.client().flushall()
        finish(jobs)


def test_a_full_broker_keeps_messages_waiting_and_costs_no_job(
    broker: Broker, quick: Callable[..., Job], tmp_path: Path, bob_client: Client
) -> None:
    with quick_celery_worker(tmp_path / "worker.log", **broker.environment) as worker:
        running = quick("running", max_steps=100)
        wait_for_step(running, 2)
        broker.client().config_set("maxmemory", "1")
        # A slot without a job would try to send it as well.
        with held(trainers_of(worker.pid)):
            waiting = quick("queued while it is full")
            message = OutboxMessage.objects.latest("pk")
            assert (message.sent_at, message.attempts) == (None, 1)
            assert "OOM" in message.last_error or "memory" in message.last_error
            assert bob_client.get(f"/jobs/{waiting.pk}/").status_code == 200
        wait_for(lambda: reload(running).is_final(), what="the end of the running job")
        broker.client().config_set("maxmemory", "0")
        finish([running, waiting])


def test_a_broker_that_does_not_answer_holds_up_neither_a_lease_nor_a_person_for_long(
    broker: Broker, quick: Callable[..., Job], tmp_path: Path
) -> None:
    with quick_celery_worker(tmp_path / "worker.log", **broker.environment) as worker:
        running = quick("running", max_steps=100)
        wait_for_step(running, 2)
        broker.client().client_pause(15_000, all=True)
        # A slot without a job would try to send them as well.
        with held(trainers_of(worker.pid)):
            waiting = quick("queued while it hangs")
            assert OutboxMessage.objects.latest("pk").sent_at is None
            again = quick("queued right after")
            message = OutboxMessage.objects.latest("pk")
        assert (message.sent_at, message.attempts) == (None, 0), "the second does not even ask: it would only wait"
        finish([running, waiting, again])


def test_a_connection_that_the_broker_closed_is_found_out_without_losing_the_message(
    broker: Broker, quick: Callable[..., Job]
) -> None:
    quick("makes the connection")
    broker.restart()
    job = quick("uses the dead one")
    assert reload(job).state == JobState.QUEUED
    outbox._silent_until = 0.0
    OutboxMessage.objects.filter(sent_at=None).update(next_try_at="2000-01-01T00:00Z")
    sweeping.sweep()
    assert nothing_waits()


def test_the_sweep_leaves_the_relay_to_whoever_is_at_it_and_still_takes_jobs_back(quick: Callable[..., Job]) -> None:
    from tests.faults.quick import expire_leases
    from tests.jobs.making import make_worker

    job = quick()
    sweeping.lifecycle.claim(job, make_worker())
    OutboxMessage.objects.update(sent_at=None)
    expire_leases()
    is_held, may_go = threading.Event(), threading.Event()

    def hold() -> None:
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_advisory_lock(%s)", [sweeping.SWEEPER_LOCK])
            is_held.set()
            may_go.wait(60)
        connection.close()

    holder = threading.Thread(target=hold)
    holder.start()
    assert is_held.wait(60)
    try:
        sweeping.sweep()
        assert reload(job).state == JobState.RETRY_WAIT
        assert not nothing_waits()
    finally:
        may_go.set()
        holder.join()
    sweeping.sweep()
    assert nothing_waits()

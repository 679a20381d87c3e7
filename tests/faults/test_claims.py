"""Claims, reaps and messages that meet: one gets the job, whatever is doubled, lost or interrupted."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from django.db import connection

from jobs import lifecycle, outbox, scheduling, sweeping
from jobs.models import Job, JobState, OutboxMessage
from studio.accounts.models import Team, User
from tests.faults.invariants import broken_invariants
from tests.faults.quick import (
    FAST,
    SLOW,
    describe,
    expected_weights,
    expire_leases,
    reload,
    wait_until_final,
    weights,
)
from tests.faults.quick_app import quick_celery_worker
from tests.faults.slot_workers import SlotWorkers
from tests.jobs.making import make_worker
from tests.processes import wait_for

pytestmark = pytest.mark.django_db(transaction=True)

NUM_CLAIMERS = 8


def in_threads(actions: list[Callable[[], object]]) -> list[object]:
    """What each action gives, all begun at the same moment, each on a database connection of its own."""
    barrier = threading.Barrier(len(actions))
    given: list[object] = []

    def run(action: Callable[[], object]) -> None:
        try:
            barrier.wait()
            given.append(action())
        finally:
            connection.close()

    threads = [threading.Thread(target=run, args=[action]) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(given) == len(actions), "an action failed"
    return given


def race_for_one_job(quick: Callable[..., Job], rounds: int) -> None:
    job = quick()
    claimers = [make_worker(slot) for slot in range(NUM_CLAIMERS)]
    for number in range(1, rounds + 1):
        won = in_threads([lambda worker=worker: scheduling.next_job(worker) for worker in claimers])
        [claimed] = [one for one in won if one is not None]
        assert (claimed.pk, claimed.attempt) == (job.pk, number)
        lifecycle.hand_back(job.pk, number, reason="The next round.")
    assert job.attempts.count() == rounds
    assert broken_invariants() == []


def test_of_eight_claimers_one_gets_the_job(quick: Callable[..., Job]) -> None:
    race_for_one_job(quick, rounds=15)


@pytest.mark.slow
def test_of_eight_claimers_one_gets_the_job_in_each_of_1000_rounds(quick: Callable[..., Job]) -> None:
    race_for_one_job(quick, rounds=1000)


def test_eight_claimers_of_eight_jobs_get_one_each(quick: Callable[..., Job]) -> None:
    jobs = {quick(str(number)).pk for number in range(NUM_CLAIMERS)}
    claimers = [make_worker(slot) for slot in range(NUM_CLAIMERS)]
    first = in_threads([lambda worker=worker: scheduling.next_job(worker) for worker in claimers])
    got = [job.pk for job in first if job is not None]
    # Whoever looked while another held the row it wanted may have found nothing: it looks again.
    while len(got) < len(jobs):
        job = scheduling.next_job(make_worker(99))
        assert job is not None, "a job that nobody has cannot be claimed"
        got.append(job.pk)
    assert sorted(got) == sorted(jobs)
    assert broken_invariants() == []


def test_two_reapers_at_once_take_a_job_back_once(quick: Callable[..., Job]) -> None:
    job, worker = quick(), make_worker()
    for number in range(1, 11):
        attempt = 2 * number - 1
        assert lifecycle.claim(job, worker).attempt == attempt
        expire_leases()
        assert sorted(in_threads([lifecycle.reap_expired, lifecycle.reap_expired])) == [0, 1]
        assert reload(job).attempt == attempt + 1
        # Every reap is a counted failure: without this the job would be given up as it should.
        Job.objects.filter(pk=job.pk).update(failures_counted=0, not_before=lifecycle.database_now())
        job.attempts.update(from_step=0, last_step=1)
    assert list(job.attempts.values_list("outcome", flat=True)) == ["lost"] * 10
    assert broken_invariants() == []


def claim_in_storms(quick: Callable[..., Job], workers: SlotWorkers, folder: Path, rounds: int) -> None:
    """A claimer gets SIGTERM, which raises wherever it is, some milliseconds after it began to claim."""
    job = quick()
    taken = 0
    for number in range(rounds):
        ready = folder / f"ready-{number}"
        claimer = workers.start("claim_in_storm", environment={"READY_FILE": str(ready)})
        wait_for(lambda ready=ready, claimer=claimer: ready.exists() or claimer.is_gone(), what="the claimer")
        time.sleep(number % 20 / 1000)
        claimer.send(signal.SIGTERM)
        claimer.wait()
        now = reload(job)
        is_taken = now.attempt == taken + 1
        assert is_taken or now.attempt == taken
        assert (now.state == JobState.RUNNING) == (now.lease_until is not None) == is_taken
        assert job.attempts.filter(number=taken + 1).exists() == is_taken
        if is_taken:
            taken += 1
            lifecycle.hand_back(job.pk, taken, reason="The next round.")
    assert broken_invariants() == []


def test_a_claim_that_a_signal_interrupts_is_made_whole_or_not_at_all(
    quick: Callable[..., Job], workers: SlotWorkers, tmp_path: Path
) -> None:
    claim_in_storms(quick, workers, tmp_path, rounds=40)


@pytest.mark.slow
def test_a_claim_that_a_signal_interrupts_is_made_whole_or_not_at_all_500_times(
    quick: Callable[..., Job], workers: SlotWorkers, tmp_path: Path
) -> None:
    claim_in_storms(quick, workers, tmp_path, rounds=500)


def test_messages_that_come_five_times_run_each_job_once(quick: Callable[..., Job], tmp_path: Path) -> None:
    with quick_celery_worker(tmp_path / "first.log"), quick_celery_worker(tmp_path / "second.log", slot=1):
        jobs = [quick(str(number)) for number in range(4)]
        for _ in range(5):
            for message in OutboxMessage.objects.all():
                outbox.send(message)
        for job in jobs:
            ended = wait_until_final(job)
            assert (ended.state, ended.attempt) == (JobState.SUCCEEDED, 1), describe(job)
            assert weights(ended) == expected_weights(job)
        assert broken_invariants(patience=20) == []


def lose_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    """The broker takes each message, and it never arrives."""
    monkeypatch.setattr(outbox, "send", lambda message: None)


def test_a_job_whose_message_is_lost_is_found_by_an_idle_worker(
    quick: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Not by `lose_messages`: the worker's own sweeper would send what this process has not.
    monkeypatch.setattr(outbox, "announce", lambda topic, key: None)
    with quick_celery_worker(tmp_path / "worker.log") as worker:
        wait_for(lambda: "ready." in (tmp_path / "worker.log").read_text(), what="the start of the worker")
        job = quick()
        assert not OutboxMessage.objects.exists()
        assert wait_until_final(job).state == JobState.SUCCEEDED
        assert worker.poll() is None
    assert broken_invariants() == []


def test_a_job_whose_message_is_lost_gets_another_from_the_sweeper(
    quick: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as lost:
        lose_messages(lost)
        job = quick()
    sent: list[OutboxMessage] = []
    monkeypatch.setattr(outbox, "send", sent.append)
    sweeping.sweep()
    assert sent == [], "it is young: its message may be on its way"
    long_ago = lifecycle.database_now() - 2 * timedelta(seconds=sweeping.HINT_SECONDS)
    Job.objects.filter(pk=job.pk).update(not_before=long_ago)
    OutboxMessage.objects.update(created_at=long_ago)
    sweeping.sweep()
    sweeping.sweep()
    assert [message.topic for message in sent] == ["wake"], "one more message, and not one at every sweep"


def test_what_waits_for_its_retry_is_queued_when_it_is_due_and_idle_workers_hear_of_it(
    quick: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = lifecycle.claim(quick(), make_worker())
    lifecycle.retry_later(job.pk, 1, code="process_lost", message="The trainer died.", counted=True)
    sent: list[OutboxMessage] = []
    monkeypatch.setattr(outbox, "send", sent.append)
    sweeping.sweep()
    assert (reload(job).state, sent) == (JobState.RETRY_WAIT, [])
    Job.objects.update(not_before=lifecycle.database_now())
    sweeping.sweep()
    assert reload(job).state == JobState.QUEUED
    assert [message.topic for message in sent] == ["wake"]


def test_without_beat_a_lost_worker_is_found_by_another(quick: Callable[..., Job], workers: SlotWorkers) -> None:
    job = quick(max_steps=60)
    first = workers.start("slot", environment=SLOW)
    wait_for(lambda: job.points.exists(), what="a step")
    workers.start("slot", 1, environment=FAST)
    first.kill()
    # Nobody calls the sweep and no lease is changed here: the second worker finds the expired lease by itself.
    ended = wait_until_final(job)
    assert ended.state == JobState.SUCCEEDED, describe(job)
    assert list(job.attempts.order_by("number").values_list("outcome", flat=True)) == ["lost", "succeeded"]
    assert weights(ended) == expected_weights(job)
    assert broken_invariants() == []


def test_announcements_that_wait_together_leave_as_one_message(
    quick: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        quick(str(number))
    OutboxMessage.objects.update(sent_at=None, attempts=0)
    sent: list[OutboxMessage] = []
    monkeypatch.setattr(outbox, "send", sent.append)
    assert outbox.relay() == 3
    assert len(sent) == 1
    assert outbox.relay() == 0


def test_two_relays_at_once_send_a_message_once(team: Team, bob: User, quick: Callable[..., Job]) -> None:
    quick()
    for _ in range(10):
        OutboxMessage.objects.update(sent_at=None, attempts=0)
        assert sorted(in_threads([outbox.relay, outbox.relay])) == [0, 1]


def test_messages_that_were_sent_long_ago_are_removed_and_unsent_ones_never(quick: Callable[..., Job]) -> None:
    quick("old"), quick("unsent"), quick("new")
    old, unsent, new = OutboxMessage.objects.order_by("pk")
    days = timedelta(days=outbox.KEEP_DAYS + 1)
    OutboxMessage.objects.filter(pk=old.pk).update(sent_at=lifecycle.database_now() - days)
    OutboxMessage.objects.filter(pk=unsent.pk).update(sent_at=None, created_at=lifecycle.database_now() - days)
    assert outbox.prune() == 1
    assert list(OutboxMessage.objects.order_by("pk")) == [unsent, new]

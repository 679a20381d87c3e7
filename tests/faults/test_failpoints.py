"""Each window in which a process can die is hit once on a job, and afterwards everything is as if nothing had been."""

from __future__ import annotations

import hashlib
import json
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from django.conf import settings

from jobs import lifecycle, sweeping
from jobs.lifecycle import POISON_ATTEMPTS
from jobs.models import Job, JobState, OutboxMessage
from studio import storage
from studio.accounts.models import Team, User
from studio.datasets.models import DatasetVersion
from tests.faults.invariants import broken_invariants
from tests.faults.quick import (
    FAST,
    SLOW,
    describe,
    expected_weights,
    expire_leases,
    reload,
    wait_for_step,
    wait_until_final,
    weights,
)
from tests.faults.quick_app import quick_celery_worker
from tests.faults.slot_workers import SlotWorkers
from tests.jobs.making import make_worker
from tests.processes import held, wait_for
from tests.tiny import tiny_rows
from workers.failpoints import POINTS, failpoint, switch_on

pytestmark = pytest.mark.django_db(transaction=True)

IN_A_SLOT = [
    "claim.before_commit", "claim.after_commit", "trainer.before_start", "trainer.after_start", "heartbeat.before",
    "heartbeat.before_commit", "progress.before_commit", "finish.before", "register.before_keep",
    "register.files_kept", "register.before_commit", "register.after_commit",
]  # fmt: skip
IN_A_FAILURE = ["retry.before_commit", "retry.after_commit"]
IN_A_DRAIN = ["hand_back.before_commit", "hand_back.after_commit"]
IN_A_REAPER = ["reap.before_commit", "reap.after_commit"]
IN_A_SUBMIT = ["submit.before_commit", "submit.after_commit"]
IN_A_STOP = ["stop.before_commit", "stop.after_commit"]
IN_A_RELAY = ["outbox.before_send", "outbox.after_send"]
IN_AN_UPLOAD = ["upload.before_keep", "upload.files_kept", "upload.after_commit"]
IN_THE_TRAINER = [name for name in POINTS if name.startswith(("training.", "checkpoint."))]
# As many windows of one job as may pass without a step gained: with one more it would be poison, and rightly so.
FEW = POISON_ATTEMPTS - 1
FEW_WINDOWS = [IN_THE_TRAINER[start : start + FEW] for start in range(0, len(IN_THE_TRAINER), FEW)]
ALONE = ["wake.received", "fail.before_commit", "cancelled.before_commit"]


def check(job: Job) -> None:
    """The job has one product, that of an undisturbed run, and no invariant is broken."""
    assert reload(job).state == JobState.SUCCEEDED, describe(job)
    assert weights(reload(job)) == expected_weights(job)
    assert broken_invariants() == []


def test_every_failpoint_is_in_the_code_once_and_in_a_test() -> None:
    sources = [path for folder in ("jobs", "studio", "workers") for path in (settings.ROOT / folder).rglob("*.py")]
    texts = [path.read_text() for path in sources]
    placed = [name for text in texts for name in re.findall(r'failpoint(?:\(|, )"([a-z_.]+)"', text)]
    assert len(POINTS) >= 25
    assert sorted(placed) == sorted(POINTS)
    tested = [
        *IN_A_SLOT, *IN_A_FAILURE, *IN_A_DRAIN, *IN_A_REAPER, *IN_A_SUBMIT, *IN_A_STOP, *IN_A_RELAY, *IN_AN_UPLOAD,
        *IN_THE_TRAINER, *ALONE,
    ]  # fmt: skip
    assert sorted(tested) == sorted(POINTS)


def test_a_failpoint_does_nothing_unless_asked_and_then_once(tmp_path: Path) -> None:
    failpoint("claim.after_commit")
    try:
        switch_on("claim.after_commit=raise:ENOSPC;finish.before=raise:MemoryError", tmp_path)
        with pytest.raises(OSError, match="No space left"):
            failpoint("claim.after_commit")
        failpoint("claim.after_commit")
        failpoint("claim.before_commit")
        with pytest.raises(MemoryError):
            failpoint("finish.before")
        with pytest.raises(ValueError, match=r"no failpoint claim\.afterwards"):
            switch_on("claim.afterwards=kill")
        with pytest.raises(ValueError, match="no failpoint action"):
            switch_on("claim.after_commit=explode")
    finally:
        switch_on("")


@pytest.mark.parametrize("point", IN_A_SLOT)
def test_a_worker_killed_there_costs_no_job_and_doubles_none(
    point: str, quick: Callable[..., Job], workers: SlotWorkers
) -> None:
    job = quick()
    workers.start("slot", failpoints=f"{point}=kill").wait()
    assert workers.has_fired(point)
    expire_leases()
    workers.start("slot")
    wait_until_final(job)
    check(job)


def test_a_database_that_fails_once_in_each_window_costs_no_job(
    quick: Callable[..., Job], workers: SlotWorkers
) -> None:
    job = quick()
    failing = ";".join(f"{point}=raise:django.db.OperationalError" for point in IN_A_SLOT)
    workers.start("slot", failpoints=failing, settings={"MAX_ATTEMPTS": 50})
    wait_until_final(job)
    check(job)
    assert [point for point in IN_A_SLOT if not workers.has_fired(point)] == []


@pytest.mark.parametrize("point", IN_A_FAILURE)
def test_a_worker_killed_while_it_queues_a_failed_attempt_again_costs_no_job(
    point: str, quick: Callable[..., Job], workers: SlotWorkers
) -> None:
    job = quick()
    workers.start("slot", failpoints=f"training.last_step=kill;{point}=kill").wait()
    assert workers.has_fired(point)
    expire_leases()
    workers.start("slot")
    wait_until_final(job)
    check(job)
    assert reload(job).failures_counted == 1


def test_a_worker_killed_while_it_gives_a_job_up_gives_it_up_later(
    quick: Callable[..., Job], workers: SlotWorkers
) -> None:
    job = quick()
    fails = {"QUICK_TRAINER_FAILS": "bad_recipe"}
    workers.start("slot", failpoints="fail.before_commit=kill", environment=fails).wait()
    assert workers.has_fired("fail.before_commit")
    assert reload(job).state == JobState.RUNNING
    expire_leases()
    workers.start("slot", environment=fails)
    ended = wait_until_final(job)
    assert (ended.state, ended.failure_message, ended.adapter) == (JobState.FAILED, "It cannot be done.", None)
    assert broken_invariants() == []


@pytest.mark.parametrize("point", IN_A_DRAIN)
def test_a_worker_killed_while_it_hands_a_job_back_costs_no_job(
    point: str, quick: Callable[..., Job], workers: SlotWorkers
) -> None:
    job = quick(max_steps=60)
    first = workers.start("slot", failpoints=f"{point}=kill", environment=SLOW)
    wait_for_step(job, 3)
    first.send(signal.SIGTERM)
    first.wait()
    assert workers.has_fired(point)
    expire_leases()
    workers.start("slot", environment=FAST)
    wait_until_final(job)
    check(job)
    assert job.attempts.order_by("number").last().from_step >= 3


@pytest.mark.parametrize("point", IN_A_REAPER)
def test_a_reaper_killed_there_takes_each_job_back_once(
    point: str, quick: Callable[..., Job], workers: SlotWorkers
) -> None:
    jobs = [quick("first"), quick("second")]
    for slot, job in enumerate(jobs):
        assert lifecycle.claim(job, make_worker(slot)) is not None
    expire_leases()
    workers.start("reap", failpoints=f"{point}=kill").wait()
    assert workers.has_fired(point)

    def nobody_holds_one() -> bool:
        # Again and again: Postgres may be about to find out that the reaper is dead, and keep its row locked till then.
        lifecycle.reap_expired()
        return not any(reload(job).state == JobState.RUNNING for job in jobs)

    wait_for(nobody_holds_one, what="the reap")
    assert {(reload(job).state, reload(job).attempt) for job in jobs} == {(JobState.RETRY_WAIT, 2)}
    workers.start("slot")
    for job in jobs:
        wait_until_final(job)
        check(job)


@pytest.mark.parametrize("point", IN_A_SUBMIT)
def test_a_submit_that_was_killed_and_sent_again_makes_one_job_and_one_announcement(
    point: str, team: Team, bob: User, workers: SlotWorkers
) -> None:
    workers.start("submit", team.pk, bob.pk, "the same key", failpoints=f"{point}=kill").wait()
    assert workers.has_fired(point)
    is_committed = point == "submit.after_commit"
    assert (Job.objects.count(), OutboxMessage.objects.count()) == ((1, 1) if is_committed else (0, 0))
    again = workers.start("submit", team.pk, bob.pk, "the same key").result()
    job = Job.objects.get()
    assert again == str(job.pk)
    sweeping.sweep()
    assert not OutboxMessage.objects.filter(sent_at=None).exists()
    workers.start("slot")
    wait_until_final(job)
    check(job)


@pytest.mark.parametrize("point", IN_A_STOP)
def test_a_wish_to_stop_is_there_whole_or_not_at_all_when_its_request_is_killed(
    point: str, bob: User, quick: Callable[..., Job], workers: SlotWorkers
) -> None:
    job = quick(max_steps=100)
    slot = workers.start("slot")
    wait_for_step(job, 1)
    with held(slot.trainers()):
        workers.start("cancel", job.pk, bob.pk, "now", failpoints=f"{point}=kill").wait()
    assert workers.has_fired(point)
    ended = wait_until_final(job)
    asked = ended.events.filter(text__contains="asked to stop now").exists()
    assert (ended.state, asked) in {(JobState.CANCELLED, True), (JobState.SUCCEEDED, False)}
    assert asked == (point == "stop.after_commit")
    assert broken_invariants() == []


def test_a_worker_killed_while_it_cancels_leaves_a_job_that_the_reaper_cancels(
    bob: User, quick: Callable[..., Job], workers: SlotWorkers
) -> None:
    job = quick(max_steps=1000)
    first = workers.start("slot", failpoints="cancelled.before_commit=kill")
    wait_for_step(job, 1)
    lifecycle.ask_stop(job, bob, "now")
    first.wait()
    assert workers.has_fired("cancelled.before_commit")
    assert reload(job).state == JobState.CANCELLING
    expire_leases()
    sweeping.sweep()
    assert reload(job).state == JobState.CANCELLED
    assert broken_invariants() == []


@pytest.mark.parametrize("point", IN_A_RELAY)
def test_a_relay_killed_there_leaves_the_message_to_the_next(
    point: str, quick: Callable[..., Job], workers: SlotWorkers
) -> None:
    job = quick()
    OutboxMessage.objects.update(sent_at=None)
    workers.start("sweep", failpoints=f"{point}=kill").wait()
    assert workers.has_fired(point)
    assert OutboxMessage.objects.filter(sent_at=None).count() == 1

    def is_sent() -> bool:
        # Again and again: Postgres may be about to find out that the relay is dead, and keep its locks till then.
        workers.start("sweep").wait()
        return not OutboxMessage.objects.filter(sent_at=None).exists()

    wait_for(is_sent, what="the next relay")
    workers.start("slot")
    wait_until_final(job)
    check(job)


def test_a_worker_killed_by_a_wake_up_takes_the_job_without_it_when_it_is_back(
    quick: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STUDIO_FAILPOINTS", "wake.received=kill")
    monkeypatch.setenv("STUDIO_FAILPOINTS_ONCE", str(tmp_path))
    job = quick()
    with quick_celery_worker(tmp_path / "first.log") as first:
        wait_for(lambda: first.poll() is not None, what="the death of the worker")
    assert (tmp_path / "wake.received").exists()
    with quick_celery_worker(tmp_path / "second.log"):
        wait_until_final(job)
    check(job)


@pytest.mark.parametrize("point", IN_AN_UPLOAD)
def test_an_upload_that_was_killed_and_sent_again_makes_one_version(
    point: str, team: Team, bob: User, workers: SlotWorkers
) -> None:
    content = "".join(json.dumps(row) + "\n" for row in tiny_rows(30))
    workers.start("upload", team.pk, bob.pk, content, failpoints=f"{point}=kill").wait()
    assert workers.has_fired(point)
    assert DatasetVersion.objects.count() == (1 if point == "upload.after_commit" else 0)
    again = workers.start("upload", team.pk, bob.pk, content).result()
    version = DatasetVersion.objects.get()
    assert again == version.pk
    kept = storage.blob_path(version.sha256).read_bytes()
    assert hashlib.sha256(kept).hexdigest() == version.sha256 == hashlib.sha256(content.encode()).hexdigest()


def kill_trainer_in_windows(points: list[str], queue: Callable[..., Job], workers: SlotWorkers) -> None:
    """A real training whose trainers are killed once in each of these windows, beside one that nothing disturbs."""
    disturbed = queue("same", max_steps=15)
    killing = ";".join(f"{point}=kill" for point in points)
    workers.start("slot", is_real=True, failpoints=killing, settings={"MAX_ATTEMPTS": 50})
    ended = wait_until_final(disturbed, seconds=550)
    assert ended.state == JobState.SUCCEEDED, describe(disturbed)
    assert [point for point in points if not workers.has_fired(point)] == []
    deaths = disturbed.attempts.filter(outcome="failed", failure_code="process_lost", signal=signal.SIGKILL)
    assert deaths.count() == len(points) == ended.failures_counted
    undisturbed = wait_until_final(queue("same", max_steps=15))
    made = [
        (storage.adapter_folder(job.adapter.folder) / "adapter_model.safetensors").read_bytes()
        for job in (ended, undisturbed)
    ]
    assert made[0] == made[1]
    assert broken_invariants() == []


def test_a_trainer_killed_in_windows_of_its_own_makes_the_adapter_of_an_undisturbed_one(
    queue: Callable[..., Job], workers: SlotWorkers
) -> None:
    points = ["checkpoint.before_rename", "checkpoint.after_rename", "training.before_exit"]
    kill_trainer_in_windows(points, queue, workers)


@pytest.mark.slow
@pytest.mark.parametrize("points", FEW_WINDOWS, ids=",".join)
def test_a_trainer_killed_in_each_of_its_windows_makes_the_adapter_of_an_undisturbed_one(
    points: list[str], queue: Callable[..., Job], workers: SlotWorkers
) -> None:
    kill_trainer_in_windows(points, queue, workers)

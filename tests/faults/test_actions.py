"""What people do to jobs that really train: pause and resume, finish with what there is, drain a worker."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from jobs import draining
from jobs.actions import ActionError
from jobs.models import Job, JobState, Worker
from jobs.queueing import cancel_job, pause_job, resume_job
from studio.accounts.models import Team, User
from tests.faults.test_worker_deaths import wait_for_step, wait_until_final, weights_digest
from tests.processes import celery_worker, kill_tree, trainers_of, wait_for, with_steps_of

pytestmark = pytest.mark.django_db(transaction=True)

PATIENCE = 240


def wait_for_state(job: Job, *states: JobState) -> Job:
    wait_for(lambda: Job.objects.get(pk=job.pk).state in states, seconds=PATIENCE, what=f"{job.name} {states}")
    return Job.objects.get(pk=job.pk)


def worker_of_slot(slot: int) -> Worker:
    wait_for(lambda: Worker.objects.filter(slot=slot).exists(), what=f"the worker of slot {slot}")
    return Worker.objects.filter(slot=slot).latest("started_at")


def test_a_job_that_was_paused_twice_ends_with_the_same_bytes_and_frees_its_device_meanwhile(
    queue: Callable[..., Job], bob: User, tmp_path: Path
) -> None:
    disturbed = queue("disturbed", max_steps=100, epochs=20)
    with celery_worker("gpu", tmp_path / "slow.log", environment=with_steps_of(0.2)) as worker:
        step = 7
        for turn in (1, 2):
            wait_for_step(disturbed, step)
            assert pause_job(disturbed, bob)
            paused = wait_for_state(disturbed, JobState.PAUSED)
            assert (paused.worker, paused.lease_until, paused.stop_mode, paused.failures_counted) == (None, None, "", 0)
            assert step <= paused.checkpoint_step < 100, "the checkpoint is of the step at which it was asked, or later"
            assert not trainers_of(worker.pid)
            if turn == 1:
                assert wait_until_final(queue("meanwhile", max_steps=3)).state == JobState.SUCCEEDED
                assert resume_job(disturbed, bob)
                step = paused.checkpoint_step + 3
    assert resume_job(disturbed, bob)
    undisturbed = queue("undisturbed", max_steps=100, epochs=20)
    with celery_worker("gpu", tmp_path / "worker.log"):
        disturbed, undisturbed = wait_until_final(disturbed), wait_until_final(undisturbed)
    assert (undisturbed.state, disturbed.state) == (JobState.SUCCEEDED, JobState.SUCCEEDED)
    assert weights_digest(disturbed) == weights_digest(undisturbed)
    assert list(disturbed.attempts.order_by("number").values_list("outcome", flat=True)) == [
        "stopped", "stopped", "succeeded"
    ]  # fmt: skip
    began = list(disturbed.attempts.order_by("number").values_list("from_step", flat=True))
    assert began[0] == 0
    assert 7 <= began[1] < began[2] < 100


def test_a_job_that_is_paused_while_it_finishes_is_done_or_paused_and_never_both(
    queue: Callable[..., Job], bob: User, tmp_path: Path
) -> None:
    job = queue(max_steps=10)
    with celery_worker("gpu", tmp_path / "worker.log"):
        wait_for(lambda: Job.objects.get(pk=job.pk).step >= 9, what="the last steps")
        try:
            pause_job(job, bob)
        except ActionError:
            assert Job.objects.get(pk=job.pk).state == JobState.SUCCEEDED, "a pause is refused to what has ended alone"
        stands = wait_for_state(job, JobState.PAUSED, JobState.SUCCEEDED)
        assert (stands.adapter_id is not None) == (stands.state == JobState.SUCCEEDED)
        if stands.state == JobState.PAUSED:
            resume_job(job, bob)
        job = wait_until_final(job)
    assert (job.state, job.stop_mode) == (JobState.SUCCEEDED, "")
    assert job.points.values("step").distinct().count() == 10


def test_a_worker_that_dies_before_it_can_pause_leaves_the_job_paused(
    queue: Callable[..., Job], bob: User, tmp_path: Path
) -> None:
    job = queue(max_steps=60, epochs=10)
    with celery_worker("gpu", tmp_path / "first.log", environment=with_steps_of(0.2)) as worker:
        wait_for_step(job, 7)
        for trainer in trainers_of(worker.pid):
            trainer.suspend()  # it cannot obey any more
        pause_job(job, bob)
        kill_tree(worker.pid)
    assert Job.objects.get(pk=job.pk).state == JobState.RUNNING
    with celery_worker("gpu", tmp_path / "second.log"):
        paused = wait_for_state(job, JobState.PAUSED)
        assert paused.failures_counted == 0
        assert 5 <= paused.checkpoint_step < 60
        resume_job(job, bob)
        job = wait_until_final(job)
    assert job.state == JobState.SUCCEEDED
    # Not before it: a checkpoint that its worker had no time to tell of is found all the same.
    assert job.attempts.latest("number").from_step >= paused.checkpoint_step


def test_a_paused_job_can_be_finished_with_what_it_has_learned(
    queue: Callable[..., Job], bob: User, tmp_path: Path
) -> None:
    job = queue(max_steps=5000, epochs=100, checkpoint_every_steps=1000)
    with celery_worker("gpu", tmp_path / "worker.log"):
        wait_for_step(job, 4)
        pause_job(job, bob)
        step = wait_for_state(job, JobState.PAUSED).checkpoint_step
        assert step >= 4
        assert cancel_job(job, bob, "keep")
        job = wait_until_final(job)
    assert job.state == JobState.SUCCEEDED
    assert job.adapter.stopped_at_step == step
    assert job.points.latest("step").step == step, "not a step more was trained"


def test_a_drained_worker_hands_its_job_back_and_takes_none_until_that_ends(
    queue: Callable[..., Job], team: Team, alice: User, tmp_path: Path
) -> None:
    job = queue(max_steps=120, epochs=20)
    slow = with_steps_of(0.05)
    with celery_worker("gpu", tmp_path / "first.log", environment=slow):
        wait_for_step(job, 7)
        draining.drain_worker(worker_of_slot(0), "now", team=team, user=alice)
        handed_back = wait_for_state(job, JobState.QUEUED)
        assert handed_back.checkpoint_step >= 7
        assert handed_back.failures_counted == 0
        with celery_worker("gpu", tmp_path / "second.log", slot=1, environment=slow):
            wait_for(lambda: job.attempts.filter(number=2).exists(), seconds=PATIENCE, what="the second attempt")
            assert job.attempts.get(number=2).worker == worker_of_slot(1)
            wait_for_step(job, handed_back.checkpoint_step + 2)
            draining.drain_worker(worker_of_slot(1), "now", team=team, user=alice)
            wait_for_state(job, JobState.QUEUED)
        draining.end_draining(worker_of_slot(0), team=team, user=alice)
        job = wait_until_final(job)
    assert job.state == JobState.SUCCEEDED
    assert [attempt.worker.slot for attempt in job.attempts.order_by("number")] == [0, 1, 0]


def test_a_worker_that_drains_after_its_job_finishes_it_and_takes_no_other(
    queue: Callable[..., Job], team: Team, alice: User, tmp_path: Path
) -> None:
    first, second = queue("first", max_steps=80, epochs=20), queue("second", max_steps=3)
    with celery_worker("gpu", tmp_path / "worker.log", environment=with_steps_of(0.05)):
        wait_for_step(first, 2)
        draining.drain_worker(worker_of_slot(0), "after_job", team=team, user=alice)
        assert wait_until_final(first).state == JobState.SUCCEEDED
        seen = worker_of_slot(0).last_seen
        wait_for(lambda: worker_of_slot(0).last_seen > seen, what="another look at the queue")
        assert Job.objects.get(pk=second.pk).attempt == 0
        draining.end_draining(worker_of_slot(0), team=team, user=alice)
        assert wait_until_final(second).state == JobState.SUCCEEDED
    assert first.attempts.count() == 1

"""Jobs that really train, and everything that can kill them: nothing is lost, nothing is doubled."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import redis
from django.conf import settings

from jobs import scheduling
from jobs.models import Job, JobSample, JobState, Worker
from jobs.queueing import cancel_job
from studio import storage
from studio.accounts.models import User
from tests.processes import celery_worker, kill_tree, trainers_of, wait_for, with_steps_of

pytestmark = pytest.mark.django_db(transaction=True)

WEIGHTS = "adapter_model.safetensors"


def weights_digest(job: Job) -> str:
    folder = storage.adapter_folder(job.adapter.folder)
    return hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()


def samples_of(job: Job) -> list[tuple[int, int, str]]:
    """(step, index of the prompt, answer) of everything that the job's model has answered while it trained."""
    rows = JobSample.objects.filter(prompt__job=job).order_by("step", "prompt__index")
    return list(rows.values_list("step", "prompt__index", "answer"))


def wait_until_final(job: Job) -> Job:
    wait_for(lambda: Job.objects.get(pk=job.pk).is_final(), seconds=180, what=f"the end of {job.name}")
    return Job.objects.select_related("adapter").get(pk=job.pk)


def wait_for_step(job: Job, step: int) -> None:
    wait_for(lambda: job.points.filter(step__gte=step).exists(), what=f"step {step}")


def test_a_job_trains_on_a_real_worker_and_lands_in_the_catalogue(queue: Callable[..., Job], tmp_path: Path) -> None:
    with celery_worker("gpu", tmp_path / "worker.log"):
        job = wait_until_final(queue(max_steps=10))
    assert (job.state, job.failure_message) == (JobState.SUCCEEDED, "")
    assert job.points.count() == 10
    assert {score.evaluation for score in job.adapter.scores.all()} >= {"loss"}
    names = {path.name for path in storage.adapter_folder(job.adapter.folder).iterdir()}
    assert {WEIGHTS, "adapter_config.json", "README.md", "result.json"} <= names


def test_kill_9_of_the_trainer_and_of_the_worker_gives_the_same_adapter_as_no_kill(
    queue: Callable[..., Job], tmp_path: Path
) -> None:
    disturbed, undisturbed = queue("disturbed"), queue("undisturbed")
    with celery_worker("gpu", tmp_path / "first.log", environment=with_steps_of(0.3)) as worker:
        wait_for_step(disturbed, 8)
        trainers_of(worker.pid)[0].send_signal(signal.SIGKILL)
        wait_for(lambda: disturbed.attempts.filter(ended_at=None, number=2).exists(), what="the second attempt")
        wait_for(lambda: disturbed.points.filter(attempt=2, step__gte=15).exists(), what="step 15 of it")
        kill_tree(worker.pid)
    assert Job.objects.get(pk=disturbed.pk).state == JobState.RUNNING
    with celery_worker("gpu", tmp_path / "second.log"):
        disturbed, undisturbed = wait_until_final(disturbed), wait_until_final(undisturbed)
    assert (undisturbed.state, disturbed.state) == (JobState.SUCCEEDED, JobState.SUCCEEDED)
    assert weights_digest(disturbed) == weights_digest(undisturbed)
    outcomes = list(disturbed.attempts.order_by("number").values_list("outcome", "failure_code"))
    assert outcomes == [("failed", "process_lost"), ("lost", "worker_lost"), ("succeeded", "")]
    answers = samples_of(undisturbed)
    assert sorted({step for step, _index, _answer in answers}) == list(range(0, 45, 5))
    assert samples_of(disturbed) == answers, "none is lost, none is doubled"
    last = disturbed.attempts.order_by("number").last()
    assert last.from_step > 0, "the last attempt began at a checkpoint, not at the beginning"


def test_of_two_jobs_the_second_waits_says_why_and_runs(queue: Callable[..., Job], tmp_path: Path) -> None:
    first, second = queue("first", max_steps=80, epochs=20), queue("second", max_steps=5)
    assert scheduling.explain_wait(second) == "No worker is running. Start one, and the job begins by itself."
    with celery_worker("gpu", tmp_path / "worker.log", environment=with_steps_of(0.05)):
        wait_for_step(first, 3)
        assert "“first” is running" in scheduling.explain_wait(Job.objects.get(pk=second.pk))
        assert scheduling.queue_position(second) == 1
        assert {wait_until_final(first).state, wait_until_final(second).state} == {JobState.SUCCEEDED}


def test_a_stopped_job_ends_soon_and_leaves_no_trainer(queue: Callable[..., Job], bob: User, tmp_path: Path) -> None:
    job = queue(max_steps=5000, epochs=100, checkpoint_every_steps=1000)
    with celery_worker("gpu", tmp_path / "worker.log") as worker:
        wait_for_step(job, 2)
        cancel_job(job, bob, "now")
        wait_until_final(job)
        assert not trainers_of(worker.pid)
    job.refresh_from_db()
    assert (job.state, job.adapter) == (JobState.CANCELLED, None)


def test_stop_and_keep_gives_the_adapter_of_the_last_step(queue: Callable[..., Job], bob: User, tmp_path: Path) -> None:
    job = queue(max_steps=5000, epochs=100, checkpoint_every_steps=1000)
    with celery_worker("gpu", tmp_path / "worker.log"):
        wait_for_step(job, 3)
        cancel_job(job, bob, "keep")
        job = wait_until_final(job)
    assert job.state == JobState.SUCCEEDED
    assert 3 <= job.adapter.stopped_at_step < 5000


def test_sigterm_hands_the_job_back_and_another_worker_goes_on(queue: Callable[..., Job], tmp_path: Path) -> None:
    job = queue(max_steps=60, epochs=10)
    with celery_worker("gpu", tmp_path / "first.log", environment=with_steps_of(0.2)) as worker:
        wait_for_step(job, 7)
        os.kill(worker.pid, signal.SIGTERM)
        worker.wait(120)
    job.refresh_from_db()
    assert (job.state, job.failures_counted) == (JobState.QUEUED, 0)
    assert list(Worker.objects.values_list("is_draining", flat=True)) == [True]
    with celery_worker("gpu", tmp_path / "second.log"):
        job = wait_until_final(job)
    assert job.state == JobState.SUCCEEDED
    assert job.attempts.get(number=2).from_step >= 7


def test_losing_everything_in_redis_harms_no_job(queue: Callable[..., Job], tmp_path: Path) -> None:
    running, waiting = queue("running", max_steps=30), queue("waiting", max_steps=5)
    with celery_worker("gpu", tmp_path / "worker.log"):
        wait_for_step(running, 3)
        redis.Redis.from_url(settings.REDIS_URL).flushall()
        assert {wait_until_final(running).state, wait_until_final(waiting).state} == {JobState.SUCCEEDED}
    assert running.points.count() == 30

"""Warm trainers on a real worker: who gets one, and that losing one loses nothing."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import uuid
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from jobs.models import Job, JobState, Worker
from jobs.queueing import queue_job
from studio import storage
from studio.accounts.models import Team, User
from studio.datasets.inspecting import inspect
from studio.datasets.uploads import receive_upload
from tests.processes import celery_worker, trainers_of, wait_for
from tests.tiny import tiny_rows
from workers.recipe import Recipe

pytestmark = pytest.mark.django_db(transaction=True)


def finished(job: Job) -> str:
    """The digest of the adapter of a job that was waited for."""
    wait_for(lambda: Job.objects.get(pk=job.pk).is_final(), seconds=300, what=f"the end of {job.name}")
    job = Job.objects.select_related("adapter").get(pk=job.pk)
    assert (job.state, job.attempt, job.failures_counted) == (JobState.SUCCEEDED, 1, 0), job.failure_message
    folder = storage.adapter_folder(job.adapter.folder)
    return hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()


def warm_trainer(worker: subprocess.Popen[bytes], team: Team) -> psutil.Process:
    """The one trainer that the worker holds for a team, once its row says so."""
    wait_for(lambda: Worker.objects.filter(warm_team=team).exists(), what=f"a trainer warm for {team}")
    (trainer,) = trainers_of(worker.pid)
    assert "--resident" in trainer.cmdline()
    return trainer


def for_another_team(job: Job, team: Team, user: User) -> Job:
    """The same job of another team, with a dataset of its own."""
    content = "".join(json.dumps(row) + "\n" for row in tiny_rows(120)).encode()
    version = receive_upload(team=team, user=user, file_name="theirs.jsonl", chunks=[content])
    inspect(version.pk)
    version.refresh_from_db()
    return queue_job(
        team=team, user=user, recipe=Recipe.from_dict(job.recipe), base_model=job.base_model, dataset_version=version,
        idempotency_key=uuid.uuid4().hex,
    )  # fmt: skip


def test_a_teams_next_job_runs_in_the_same_process_and_another_teams_in_a_fresh_one(
    queue: Callable[..., Job], team: Team, other_team: Team, charlie: User, tmp_path: Path
) -> None:
    with celery_worker("gpu", tmp_path / "worker.log", environment={"STUDIO_WARM_SECONDS": "600"}) as worker:
        job = queue("first", max_steps=6)
        first = finished(job)
        trainer = warm_trainer(worker, team)
        second = finished(queue("second", max_steps=6))
        assert warm_trainer(worker, team) == trainer
        theirs = finished(for_another_team(job, other_team, charlie))
        other = warm_trainer(worker, other_team)
        assert other != trainer
        assert not trainer.is_running()
        # The recipes differ in nothing that training sees.
        assert first == second == theirs
        # An idle one is worth nothing to anybody's job: its end is not noticed.
        other.send_signal(signal.SIGKILL)
        assert finished(for_another_team(job, other_team, charlie)) == first
        pid = warm_trainer(worker, other_team).pid
        assert pid != other.pid
        worker.send_signal(signal.SIGTERM)
        worker.wait(120)
        assert not psutil.pid_exists(pid)

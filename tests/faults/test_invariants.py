"""Each invariant, broken on purpose, is named; and a life without a fault breaks none."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
import redis
from django.conf import settings as django_settings
from django.db import connection
from django.db.models.functions import Now
from django.utils import timezone

from jobs import lifecycle, progress, running
from jobs.models import Job, JobAttempt, JobState, MetricPoint
from studio import storage
from studio.accounts.models import Team, User
from studio.catalogue.models import Adapter
from tests.factories import make_adapter_folder, make_base_model, make_dataset_version, make_recipe, make_result
from tests.faults.invariants import broken_invariants, find_trainers
from tests.jobs.making import make_worker
from tests.processes import wait_for
from workers.digests import file_sha256
from workers.events import MessageEvent

pytestmark = pytest.mark.django_db(transaction=True)

MakeJob = Callable[..., Job]


@pytest.fixture
def queued(data_dir: Path, team: Team, bob: User) -> Callable[[], Job]:
    """A waiting job with a dataset and a base model of its own."""

    def queued() -> Job:
        base_model, version = make_base_model(), make_dataset_version(team, bob)
        recipe = make_recipe(base_model, version).to_dict()
        job = Job.objects.create(
            team=team, created_by=bob, name="support", recipe=recipe, asked_recipe=recipe, base_model=base_model,
            dataset_version=version, not_before=timezone.now(), idempotency_key=str(uuid.uuid4()),
        )  # fmt: skip
        lifecycle.add_event(job.pk, 0, "Queued.")
        return job

    return queued


def claimed(job: Job) -> Job:
    found = lifecycle.claim(job, make_worker())
    assert found is not None
    return found


def point(job: Job, step: int) -> MetricPoint:
    return MetricPoint(job_id=job.pk, attempt=job.attempt, step=step, loss=1.0, at=timezone.now())


def succeed(job: Job) -> Job:
    """The job's product by the product's own function, from a folder as a trainer leaves it."""
    made = storage.adapter_folder(make_adapter_folder(result=make_result()))
    source = storage.job_folder(job.pk) / "attempts" / str(job.attempt) / "adapter"
    source.parent.mkdir(parents=True, exist_ok=True)
    made.replace(source)
    running.register(job, source)
    return Job.objects.select_related("adapter").get(pk=job.pk)


def only(sentences: list[str], number: str) -> str:
    """The one sentence, which must be of this invariant."""
    assert [sentence.split(":")[0] for sentence in sentences] == [number], sentences
    return sentences[0]


def test_nothing_is_broken_by_claims_reaps_retries_and_success(queued: Callable[[], Job]) -> None:
    job = claimed(queued())
    lifecycle.store_progress(job.pk, job.attempt, [point(job, 1)], [("info", "Step 1.")])
    progress.add(job.pk, job.attempt, MessageEvent(text="Step 1."))
    Job.objects.filter(pk=job.pk).update(lease_until=Now() - timedelta(seconds=1))
    assert lifecycle.reap_expired() == 1
    Job.objects.filter(pk=job.pk).update(not_before=Now())
    job = claimed(job)
    lifecycle.retry_later(job.pk, job.attempt, code="process_lost", message="Lost.", counted=True)
    Job.objects.filter(pk=job.pk).update(not_before=Now())
    job = succeed(claimed(job))
    assert (job.state, job.attempt) == (JobState.SUCCEEDED, 4)
    assert broken_invariants() == []


def test_a_product_without_files_is_named(queued: Callable[[], Job]) -> None:
    job = succeed(claimed(queued()))
    shutil.rmtree(storage.adapter_folder(job.adapter.folder))
    sentences = broken_invariants(digests=False)
    assert "has no files" in only(sentences, "I1")


def test_a_second_adapter_of_one_job_is_named(queued: Callable[[], Job]) -> None:
    job = succeed(claimed(queued()))
    second = Adapter.objects.get(pk=job.adapter.pk)
    second.pk, second.version, second.folder = None, 2, f"{job.team_id}/{job.pk}-7"
    second.save()
    assert str(second.pk) in only(broken_invariants(), "I1")


def test_files_of_no_product_are_named(queued: Callable[[], Job]) -> None:
    job = succeed(claimed(queued()))
    stray = storage.adapter_folder(f"{job.team_id}/{job.pk}-9")
    stray.mkdir()
    assert f"{job.pk}-9" in only(broken_invariants(), "I1")


def test_two_attempts_with_a_product_are_named(queued: Callable[[], Job]) -> None:
    job = succeed(claimed(queued()))
    JobAttempt.objects.create(
        job=job, number=2, started_at=timezone.now(), ended_at=timezone.now(), outcome="succeeded"
    )  # fmt: skip
    Job.objects.filter(pk=job.pk).update(attempt=2)
    assert "2 attempts" in only(broken_invariants(), "I1")


def test_an_expired_lease_is_named_while_a_reaper_lives(queued: Callable[[], Job]) -> None:
    job = claimed(queued())
    Job.objects.filter(pk=job.pk).update(lease_until=Now() - timedelta(minutes=1))
    assert str(job.pk) in only(broken_invariants(), "I2")
    assert broken_invariants(a_reaper_lives=False) == []


def test_patience_waits_for_what_is_about_to_come_right(queued: Callable[[], Job]) -> None:
    job = claimed(queued())
    Job.objects.filter(pk=job.pk).update(lease_until=Now() - timedelta(seconds=1) - timedelta(minutes=1))
    lifecycle.reap_expired()
    assert broken_invariants(patience=30) == []


def test_a_number_that_skips_or_stands_still_is_named(queued: Callable[[], Job]) -> None:
    job = claimed(queued())
    lifecycle.retry_later(job.pk, job.attempt, code="process_lost", message="Lost.", counted=True)
    Job.objects.filter(pk=job.pk).update(attempt=5)
    assert "at attempt 5" in only(broken_invariants(), "I3")


def test_an_attempt_that_never_ends_and_one_without_outcome_are_named(queued: Callable[[], Job]) -> None:
    job = claimed(queued())
    lifecycle.retry_later(job.pk, job.attempt, code="process_lost", message="Lost.", counted=True)
    JobAttempt.objects.filter(job=job).update(ended_at=None, outcome="")
    assert "has not ended" in only(broken_invariants(), "I3")
    JobAttempt.objects.filter(job=job).update(ended_at=timezone.now())
    assert 'its outcome is ""' in only(broken_invariants(), "I3")


def test_a_curve_point_after_the_end_is_named(queued: Callable[[], Job]) -> None:
    job = claimed(queued())
    lifecycle.retry_later(job.pk, job.attempt, code="process_lost", message="Lost.", counted=True)
    MetricPoint.objects.bulk_create([point(job, 1), point(job, 2)])
    assert "stored 2 points after" in only(broken_invariants(), "I4")


def test_a_curve_point_of_an_attempt_that_never_began_is_named(queued: Callable[[], Job]) -> None:
    job = claimed(queued())
    job.attempt = 3
    MetricPoint.objects.bulk_create([point(job, 1)])
    assert "attempt 3, which never began" in only(broken_invariants(), "I4")


def test_an_event_of_an_attempt_that_was_taken_back_is_named(queued: Callable[[], Job]) -> None:
    job = claimed(queued())
    Job.objects.filter(pk=job.pk).update(lease_until=Now() - timedelta(seconds=1))
    lifecycle.reap_expired()
    lifecycle.add_event(job.pk, 1, "Checkpoint at step 5, 0.1 MB.")
    assert "of attempt 1, after one of attempt 2" in only(broken_invariants(), "I4")


def test_live_progress_after_the_end_is_named(queued: Callable[[], Job]) -> None:
    job = claimed(queued())
    lifecycle.retry_later(job.pk, job.attempt, code="process_lost", message="Lost.", counted=True)
    ended_at = JobAttempt.objects.get(job=job).ended_at
    with redis.Redis.from_url(django_settings.REDIS_URL) as client:
        late = int(ended_at.timestamp() * 1000) + 5
        client.xadd(progress.stream_key(job.pk), {"attempt": 1, "event": "{}"}, id=f"{late}-0")
    assert "published 1 entries after" in only(broken_invariants(), "I4")
    assert broken_invariants(redis_answers=False) == []


def test_a_gap_in_the_events_is_named(queued: Callable[[], Job]) -> None:
    job = claimed(queued())
    lifecycle.store_progress(job.pk, job.attempt, [], [("info", "a"), ("info", "b")])
    job.events.filter(sequence=3).delete()
    assert "numbers [3]" in only(broken_invariants(), "I5")


@contextmanager
def trainer_like(job: Job, *, orphaned: bool = False) -> Iterator[int]:
    """A process that looks like the job's trainer: of this process, or of a parent that is gone."""
    words = ["--out", str(storage.job_folder(job.pk)), "--supervised"]
    sleeping = [sys.executable, "-c", "import time; time.sleep(600)", *words]
    if not orphaned:
        process = subprocess.Popen(sleeping)
        pid = process.pid
    else:
        start = f"import subprocess as s; print(s.Popen({sleeping!r}, stdout=s.DEVNULL, stderr=s.DEVNULL).pid)"
        pid = int(subprocess.run([sys.executable, "-c", start], capture_output=True, check=True).stdout)
        process = None
    try:
        wait_for(lambda: any(trainer.process.pid == pid for trainer in find_trainers()), what="the process")
        yield pid
    finally:
        for trainer in find_trainers():
            if trainer.process.pid == pid:
                trainer.process.kill()
        if process is not None:
            process.wait()


def test_a_trainer_without_a_live_supervisor_is_named(queued: Callable[[], Job]) -> None:
    job = claimed(queued())
    with trainer_like(job):
        assert broken_invariants() == []
    with trainer_like(job, orphaned=True) as pid:
        assert f"trainer {pid}" in only(broken_invariants(), "I6")


def test_two_trainers_in_one_slot_are_named(queued: Callable[[], Job]) -> None:
    first, second = claimed(queued()), claimed(queued())
    with trainer_like(first), trainer_like(second):
        assert "holds 2 trainers" in only(broken_invariants(), "I7")


def test_a_trainer_of_a_job_that_has_ended_is_named(queued: Callable[[], Job]) -> None:
    job = succeed(claimed(queued()))
    with trainer_like(job):
        assert "which has succeeded" in only(broken_invariants(), "I7")


def test_a_trainer_that_waits_for_its_next_job_is_found_by_its_log(
    queued: Callable[[], Job],
) -> None:
    job = succeed(claimed(queued()))
    log = storage.job_folder(job.pk) / "attempts" / "1" / "trainer.log"
    with log.open("ab") as printed:
        command = [sys.executable, "-c", "import time; time.sleep(600)", "--resident", "--supervised"]
        process = subprocess.Popen(command, stdout=printed)
    try:
        wait_for(find_trainers, what="the process")
        assert [(trainer.job_id, trainer.stays) for trainer in find_trainers()] == [(job.pk, True)]
        assert broken_invariants() == []
    finally:
        process.kill()
        process.wait()


def make_checkpoint(job: Job, name: str) -> Path:
    folder = storage.job_folder(job.pk) / "checkpoints" / name
    folder.mkdir(parents=True)
    weights = folder / "adapter.safetensors"
    weights.write_bytes(b"weights")
    listed = {"path": weights.name, "size": 7, "sha256": file_sha256(weights)}
    (folder / "MANIFEST.json").write_text(json.dumps({"files": [listed]}))
    return weights


def test_a_damaged_checkpoint_is_named(queued: Callable[[], Job]) -> None:
    job = claimed(queued())
    make_checkpoint(job, "5-1")
    weights = make_checkpoint(job, "10-1")
    assert broken_invariants() == []
    weights.write_bytes(b"Weights")
    assert "checkpoint 10-1" in only(broken_invariants(), "I9")
    weights.write_bytes(b"")
    assert "has 0 bytes instead of 7" in only(broken_invariants(), "I9")
    weights.unlink()
    assert "is missing" in only(broken_invariants(), "I9")


def test_a_damaged_product_is_named(queued: Callable[[], Job]) -> None:
    job = succeed(claimed(queued()))
    with (storage.adapter_folder(job.adapter.folder) / "README.md").open("a") as card:
        card.write("!")
    assert "README.md" in only(broken_invariants(), "I9")


def test_points_are_judged_by_their_commit_where_the_server_keeps_its_time(queued: Callable[[], Job]) -> None:
    with connection.cursor() as cursor:
        cursor.execute("SHOW track_commit_timestamp")
        is_tracked = cursor.fetchone()[0] == "on"
    job = claimed(queued())
    early = point(job, 1)
    early.at -= timedelta(minutes=1)
    lifecycle.retry_later(job.pk, job.attempt, code="process_lost", message="Lost.", counted=True)
    MetricPoint.objects.bulk_create([early])
    # Heard of before the end and stored after it: only the server's own times can show that.
    assert [sentence.split(":")[0] for sentence in broken_invariants()] == (["I4"] if is_tracked else [])

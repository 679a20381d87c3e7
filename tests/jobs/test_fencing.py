"""What an attempt leaves behind when it was taken back: nothing in the stream, nothing among the products."""

from __future__ import annotations

import select
import sys
import threading
from datetime import timedelta

import pytest
import redis
from django.conf import settings as django_settings
from django.db import OperationalError
from django.db.models.functions import Now

from jobs import lifecycle, progress, running
from jobs.lifecycle import FencedError
from jobs.models import Job, JobState
from jobs.products import product_key
from jobs.progress import Publisher, stream_key
from jobs.supervising import Link, Outcome, _watch, boot_clock
from jobs.trainers import Trainer
from studio import storage
from studio.accounts.models import Team, User
from tests.factories import make_adapter_folder, make_result
from tests.jobs.making import make_running_job, make_worker
from tests.processes import wait_for
from workers.events import MessageEvent

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def job(data_dir: object, team: Team, bob: User) -> Job:
    return make_running_job(team, bob)


def published(job: Job) -> list[int]:
    """The attempt of each entry of the job's stream."""
    entries = redis.Redis.from_url(django_settings.REDIS_URL).xrange(stream_key(job.pk))
    return [int(fields[b"attempt"]) for _, fields in entries]


def expire_lease(job: Job) -> None:
    Job.objects.filter(pk=job.pk).update(lease_until=Now() - timedelta(seconds=1))


def claim_again(job: Job) -> Job:
    Job.objects.filter(pk=job.pk).update(not_before=Now())
    claimed = lifecycle.claim(job, make_worker(1))
    assert claimed is not None
    return claimed


def leave_product(job: Job) -> None:
    """The files of a finished product where its attempt puts them, as a kill before the commit leaves them."""
    made = storage.adapter_folder(make_adapter_folder(result=make_result()))
    target = storage.adapter_folder(product_key(job, job.attempt))
    target.parent.mkdir(parents=True, exist_ok=True)
    made.replace(target)


def trained(job: Job) -> object:
    """A finished adapter in the folder of the job's attempt."""
    made = storage.adapter_folder(make_adapter_folder(result=make_result()))
    source = storage.job_folder(job.pk) / "attempts" / str(job.attempt) / "adapter"
    source.parent.mkdir(parents=True, exist_ok=True)
    return made.replace(source)


def test_the_stream_takes_nothing_from_an_attempt_below_the_newest(job: Job) -> None:
    progress.add(job.pk, 1, MessageEvent(text="first"))
    progress.add(job.pk, 3, MessageEvent(text="third"))
    progress.add(job.pk, 1, MessageEvent(text="late"))
    assert published(job) == [1, 3]


def test_the_stream_takes_nothing_from_an_attempt_that_was_taken_back(job: Job) -> None:
    progress.add(job.pk, job.attempt, MessageEvent(text="in time"))
    expire_lease(job)
    assert lifecycle.reap_expired() == 1
    progress.add(job.pk, job.attempt, MessageEvent(text="late"))
    assert published(job) == [1]
    again = claim_again(job)
    progress.add(job.pk, again.attempt, MessageEvent(text="in time"))
    assert published(job) == [1, 3]


def test_what_is_read_after_the_lease_has_run_out_is_neither_published_nor_stored(job: Job) -> None:
    says = MessageEvent(text="said while the supervisor was paused").model_dump_json()
    script = (
        "import os, sys, time\n"
        f"os.write(int(sys.argv[sys.argv.index('--events') + 1]), {says!r}.encode() + b'\\n')\n"
        "time.sleep(600)\n"
    )
    link, publisher = Link(job.pk, job.attempt), Publisher(job.pk, job.attempt)
    trainer = Trainer([sys.executable, "-c", script], storage.job_folder(job.pk) / "trainer.log")
    try:
        wait_for(lambda: select.select([trainer.lines.descriptor], [], [], 0)[0], what="the trainer's words")
        link.shared.renewed_at = boot_clock() - django_settings.LEASE_SECONDS
        publisher.start()
        heard: list[object] = []
        outcome = Outcome()
        _watch(trainer, outcome, link, publisher, lambda: False, heard.append)
    finally:
        trainer.kill()
    publisher.finish()
    assert (outcome.is_fenced, trainer.process.returncode) == (True, -9)
    # Its own first word is that it begins; of the trainer's there is none.
    assert (heard, link.rows.empty()) == ([], True)
    assert len(published(job)) <= 1


def test_a_publisher_that_has_finished_sends_nothing_more(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, answers, sent = threading.Event(), threading.Event(), []

    def slow(_job: object, _attempt: int, event: object) -> None:
        begun.set()
        assert answers.wait(60)
        sent.append(event)

    monkeypatch.setattr(progress, "FINISH_SECONDS", 0.2)
    monkeypatch.setattr(progress, "add", slow)
    publisher = Publisher(job.pk, job.attempt)
    publisher.start()
    for text in ("waiting", "waiting too"):
        publisher.publish(MessageEvent(text=text))
    assert begun.wait(60)
    publisher.finish()
    answers.set()
    publisher.join(60)
    assert len(sent) == 1, "the one that was under way, and no other"


def test_files_of_a_lost_attempt_go_when_it_is_taken_back(job: Job) -> None:
    leave_product(job)
    expire_lease(job)
    lifecycle.reap_expired()
    assert not storage.adapter_folder(product_key(job, 1)).exists()


def test_files_of_earlier_attempts_go_with_the_next_one_and_its_own_stay(job: Job) -> None:
    leave_product(job)
    lifecycle.retry_later(job.pk, job.attempt, code="internal", message="Lost.", counted=True)
    again = claim_again(job)
    running.prepare_folder(again)
    assert not storage.adapter_folder(product_key(job, 1)).exists()
    leave_product(job)  # by a worker that was paused in the middle of it
    running.register(again, trained(again))
    assert Job.objects.get(pk=job.pk).adapter.folder == product_key(job, 2)
    assert storage.adapter_folder(product_key(job, 2)).exists()
    assert not storage.adapter_folder(product_key(job, 1)).exists()


def test_a_fenced_attempt_leaves_no_product(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    product = trained(job)

    def taken_back_meanwhile(*_: object) -> None:
        expire_lease(job)
        lifecycle.reap_expired()

    monkeypatch.setattr(lifecycle, "heartbeat", taken_back_meanwhile)
    with pytest.raises(FencedError):
        running.register(job, product)
    assert not storage.adapter_folder(product_key(job, 1)).exists()


def test_a_lease_that_could_not_be_renewed_costs_no_retry(job: Job) -> None:
    running.finish(job, Outcome(is_fenced=True, is_unsure=True))
    job.refresh_from_db()
    assert (job.state, job.failures_counted) == (JobState.RETRY_WAIT, 0)
    assert job.attempts.get().failure_code == "database"


def test_a_lease_that_could_not_be_renewed_is_nobodys_once_the_job_was_taken_back(job: Job) -> None:
    expire_lease(job)
    lifecycle.reap_expired()
    with pytest.raises(FencedError):
        running.finish(job, Outcome(is_fenced=True, is_unsure=True))
    assert job.attempts.get().outcome == "lost"


def test_a_database_that_does_not_answer_at_the_end_costs_no_retry(
    job: Job, monkeypatch: pytest.MonkeyPatch, settings: object
) -> None:
    def no_answer(*_: object) -> None:
        raise OperationalError("the database system is starting up")

    monkeypatch.setattr(running, "supervise", lambda *_args, **_options: Outcome(exit_status=0))
    monkeypatch.setattr(running, "finish", no_answer)
    settings.LEASE_SECONDS = 3
    running.run_job(job)
    job.refresh_from_db()
    assert (job.state, job.failures_counted) == (JobState.RETRY_WAIT, 0)
    assert job.attempts.get().failure_code == "database"


def test_a_busy_worker_takes_jobs_back_from_lost_ones(job: Job, team: Team, bob: User) -> None:
    lost = make_running_job(team, bob, name="lost")
    expire_lease(lost)
    with Link(job.pk, job.attempt):
        wait_for(lambda: Job.objects.get(pk=lost.pk).state == JobState.RETRY_WAIT, what="the reap")
    assert Job.objects.get(pk=job.pk).state == JobState.RUNNING

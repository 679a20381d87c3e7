"""The states of a job, each transition against real Postgres."""

from __future__ import annotations

import threading
from datetime import timedelta

import pytest
from django.conf import settings
from django.db import IntegrityError, connection, transaction
from django.db.models import F
from django.db.models.functions import Now

from jobs import lifecycle, scheduling
from jobs.actions import ActionError
from jobs.lifecycle import FencedError, Progress
from jobs.models import Job, JobState, MetricPoint
from studio.accounts.models import Team, User
from tests.jobs.making import make_job, make_running_job, make_worker


def let_lease_expire(job: Job) -> None:
    Job.objects.filter(pk=job.pk).update(lease_until=Now() - timedelta(seconds=1))


def test_a_claim_takes_the_lease_and_raises_the_attempt_in_one_step(team: Team, bob: User) -> None:
    job = make_running_job(team, bob)
    assert (job.state, job.attempt) == (JobState.RUNNING, 1)
    seconds = (job.lease_until - lifecycle.database_now()).total_seconds()
    assert settings.LEASE_SECONDS - 5 < seconds <= settings.LEASE_SECONDS
    assert job.attempts.get().number == 1


def test_a_job_can_be_claimed_once(team: Team, bob: User) -> None:
    job = make_job(team, bob)
    assert lifecycle.claim(job, make_worker(0)) is not None
    assert lifecycle.claim(job, make_worker(1)) is None


@pytest.mark.django_db(transaction=True)
def test_of_many_workers_that_claim_at_once_one_gets_the_job(team: Team, bob: User) -> None:
    won: list[Job] = []
    for turn in range(20):
        make_job(team, bob, name=f"job {turn}")
        workers = [make_worker(slot) for slot in range(6)]
        start = threading.Barrier(len(workers))

        def race(worker: object, start: threading.Barrier = start) -> None:
            start.wait()
            job = scheduling.next_job(worker)
            if job is not None:
                won.append(job)
            connection.close()

        threads = [threading.Thread(target=race, args=(worker,)) for worker in workers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == turn + 1
    assert len({job.pk for job in won}) == 20
    assert all(job.attempt == 1 for job in won)


def test_a_heartbeat_renews_the_lease_and_carries_the_wish_to_stop(team: Team, bob: User) -> None:
    job = make_running_job(team, bob)
    let_lease_expire(job)
    lifecycle.ask_stop(job, bob, "keep")
    answer = lifecycle.heartbeat(job.pk, 1, Progress("training", 3, 10, 7.0, {"num_steps": 10}))
    assert (answer.state, answer.stop_mode) == (JobState.CANCELLING, "keep")
    job.refresh_from_db()
    assert job.lease_until > lifecycle.database_now()
    assert (job.phase, job.step, job.num_steps) == ("training", 3, 10)


def test_a_lost_worker_changes_nothing_any_more(team: Team, bob: User) -> None:
    job = make_running_job(team, bob)
    let_lease_expire(job)
    assert lifecycle.reap_expired() == 1
    late = [
        lambda: lifecycle.heartbeat(job.pk, 1),
        lambda: lifecycle.store_progress(job.pk, 1, [MetricPoint(job=job, attempt=1, step=1, at=Now())], []),
        lambda: lifecycle.fail(job.pk, 1, code="x", message="x", next_step=""),
        lambda: lifecycle.retry_later(job.pk, 1, code="x", message="x", counted=True),
        lambda: lifecycle.hand_back(job.pk, 1, reason="x"),
        lambda: lifecycle.cancelled(job.pk, 1),
    ]
    for write in late:
        with pytest.raises(FencedError), transaction.atomic():
            write()
    job.refresh_from_db()
    assert (job.state, job.attempt, job.failures_counted) == (JobState.RETRY_WAIT, 2, 1)
    assert not job.points.exists()
    assert job.attempts.get().outcome == "lost"


def test_a_worker_that_was_replaced_cannot_write_beside_its_successor(team: Team, bob: User) -> None:
    job = make_running_job(team, bob)
    let_lease_expire(job)
    lifecycle.reap_expired()
    Job.objects.filter(pk=job.pk).update(not_before=Now())
    successor = lifecycle.claim(job, make_worker(1))
    assert successor is not None
    assert successor.attempt == 3
    with pytest.raises(FencedError):
        lifecycle.heartbeat(job.pk, 1)
    lifecycle.heartbeat(job.pk, 3)


def test_reaping_twice_queues_a_job_once(team: Team, bob: User) -> None:
    job = make_running_job(team, bob)
    let_lease_expire(job)
    assert [lifecycle.reap_expired(), lifecycle.reap_expired()] == [1, 0]
    job.refresh_from_db()
    assert job.attempt == 2


def test_a_stopping_job_whose_worker_is_gone_is_cancelled_not_queued(team: Team, bob: User) -> None:
    job = make_running_job(team, bob)
    lifecycle.ask_stop(job, bob, "now")
    let_lease_expire(job)
    lifecycle.reap_expired()
    job.refresh_from_db()
    assert job.state == JobState.CANCELLED
    assert job.finished_at is not None


def test_stop_and_keep_outlives_the_worker_that_was_to_do_it(team: Team, bob: User) -> None:
    job = make_running_job(team, bob)
    lifecycle.ask_stop(job, bob, "keep")
    let_lease_expire(job)
    lifecycle.reap_expired()
    job.refresh_from_db()
    assert job.state == JobState.RETRY_WAIT
    Job.objects.filter(pk=job.pk).update(not_before=Now())
    successor = lifecycle.claim(job, make_worker(1))
    assert (successor.state, successor.stop_mode) == (JobState.CANCELLING, "keep")
    lifecycle.fail(job.pk, successor.attempt, code="out_of_memory", message="It does not fit.", next_step="")
    job.refresh_from_db()
    assert (job.state, job.failure_message) == (JobState.FAILED, "It does not fit."), "its reason is not thrown away"


def test_what_is_being_discarded_cannot_be_kept_any_more(team: Team, bob: User) -> None:
    job = make_running_job(team, bob)
    lifecycle.ask_stop(job, bob, "now")
    with pytest.raises(ActionError, match="cannot be kept any more"):
        lifecycle.ask_stop(job, bob, "keep")
    job.refresh_from_db()
    assert job.stop_mode == "now"


def test_a_disk_that_stays_full_is_tried_ever_more_seldom_and_is_no_poison(team: Team, bob: User) -> None:
    job, waits = make_job(team, bob), []
    for _ in range(4):
        Job.objects.filter(pk=job.pk).update(not_before=Now())
        claimed = lifecycle.claim(job, make_worker())
        lifecycle.retry_later(job.pk, claimed.attempt, code="disk_full", message="The disk is full.", counted=False)
        job.refresh_from_db()
        waits.append((job.not_before - lifecycle.database_now()).total_seconds())
    assert job.state == JobState.RETRY_WAIT
    assert waits == sorted(waits)
    assert waits[-1] > 20 * waits[0]


def test_a_waiting_job_is_cancelled_at_once_and_a_final_one_stays(team: Team, bob: User) -> None:
    job = make_job(team, bob)
    assert lifecycle.ask_stop(job, bob, "now")
    job.refresh_from_db()
    assert job.state == JobState.CANCELLED
    assert not lifecycle.ask_stop(job, bob, "now")


def test_a_job_that_gains_no_step_in_three_attempts_is_given_up(team: Team, bob: User) -> None:
    job = make_job(team, bob)
    for _ in range(lifecycle.POISON_ATTEMPTS):
        Job.objects.filter(pk=job.pk).update(not_before=Now())
        claimed = lifecycle.claim(job, make_worker())
        assert claimed is not None
        lifecycle.retry_later(job.pk, claimed.attempt, code="crashed", message="It crashed.", counted=True)
    job.refresh_from_db()
    assert job.state == JobState.FAILED
    assert "Given up after 3" in job.failure_message


def test_a_job_that_gains_steps_is_tried_until_its_retries_are_used_up(team: Team, bob: User) -> None:
    job = make_job(team, bob)
    tries = 0
    while job.state != JobState.FAILED:
        Job.objects.filter(pk=job.pk).update(not_before=Now())
        claimed = lifecycle.claim(job, make_worker())
        assert claimed is not None
        tries += 1
        point = MetricPoint(job=job, attempt=claimed.attempt, step=tries * 10, loss=1.0, at=lifecycle.database_now())
        lifecycle.store_progress(job.pk, claimed.attempt, [point], [])
        lifecycle.retry_later(job.pk, claimed.attempt, code="crashed", message="It crashed.", counted=True)
        job.refresh_from_db()
    assert tries == settings.MAX_ATTEMPTS


def test_faults_of_our_own_servers_use_up_no_retry(team: Team, bob: User) -> None:
    job = make_running_job(team, bob)
    lifecycle.retry_later(job.pk, 1, code="disk_full", message="The disk is full.", counted=False)
    job.refresh_from_db()
    assert (job.state, job.failures_counted) == (JobState.RETRY_WAIT, 0)


def test_a_drained_worker_hands_its_job_back_without_a_counted_failure(team: Team, bob: User) -> None:
    job = make_running_job(team, bob)
    lifecycle.hand_back(job.pk, 1, reason="Its worker stops for maintenance.")
    job.refresh_from_db()
    assert (job.state, job.failures_counted, job.worker) == (JobState.QUEUED, 0, None)
    assert lifecycle.claim(job, make_worker(1)) is not None


def test_the_events_of_a_job_have_no_gap(team: Team, bob: User) -> None:
    job = make_running_job(team, bob)
    lifecycle.store_progress(job.pk, 1, [], [("info", "one"), ("warning", "two")])
    lifecycle.ask_stop(job, bob, "now")
    lifecycle.cancelled(job.pk, 1)
    assert list(job.events.values_list("sequence", flat=True)) == [1, 2, 3, 4, 5, 6]


def test_the_database_refuses_a_running_job_without_a_lease(team: Team, bob: User) -> None:
    job = make_running_job(team, bob)
    with pytest.raises(IntegrityError), transaction.atomic():
        Job.objects.filter(pk=job.pk).update(lease_until=None)


def test_the_database_refuses_success_without_a_product(team: Team, bob: User) -> None:
    job = make_running_job(team, bob)
    with pytest.raises(IntegrityError), transaction.atomic():
        Job.objects.filter(pk=job.pk).update(state=JobState.SUCCEEDED, lease_until=None)


def test_a_later_attempt_counts_for_a_step_that_two_attempts_reached(team: Team, bob: User) -> None:
    job = make_running_job(team, bob)
    now = lifecycle.database_now()
    lifecycle.store_progress(job.pk, 1, [MetricPoint(job=job, attempt=1, step=5, loss=2.0, at=now)], [])
    lifecycle.store_progress(job.pk, 1, [MetricPoint(job=job, attempt=1, step=5, loss=1.5, at=now)], [])
    assert job.points.get(step=5).loss == 1.5
    Job.objects.filter(pk=job.pk).update(attempt=F("attempt") + 1)
    lifecycle.store_progress(job.pk, 2, [MetricPoint(job=job, attempt=2, step=5, loss=1.4, at=now)], [])
    assert job.points.filter(step=5).count() == 2


@pytest.mark.parametrize("final", [JobState.CANCELLED, JobState.FAILED])
@pytest.mark.parametrize("state", [JobState.QUEUED, JobState.RETRY_WAIT, JobState.PAUSED, JobState.FAILED, "cancelled"])
def test_no_statement_whatever_changes_a_final_state(final: str, state: str, team: Team, bob: User) -> None:
    job = make_running_job(team, bob)
    lifecycle.fail(job.pk, 1, code="x", message="It cannot be done.", next_step="")
    if final == JobState.CANCELLED:
        job = make_job(team, bob)
        lifecycle.ask_stop(job, bob, "now")
    before = Job.objects.get(pk=job.pk).state
    assert before == final
    if state == final:
        Job.objects.filter(pk=job.pk).update(state=state, priority=3)  # no change of state is none
        return
    with pytest.raises(IntegrityError, match="is final"), transaction.atomic():
        Job.objects.filter(pk=job.pk).update(state=state)
    assert Job.objects.get(pk=job.pk).state == final


def test_no_statement_whatever_lowers_a_fencing_token(team: Team, bob: User) -> None:
    job = make_running_job(team, bob)
    with pytest.raises(IntegrityError, match="cannot fall"), transaction.atomic():
        Job.objects.filter(pk=job.pk).update(attempt=0)


def test_an_attempt_remembers_how_its_trainer_ended(team: Team, bob: User) -> None:
    job = make_running_job(team, bob)
    lifecycle.note_exit(job.pk, 1, None)
    assert job.attempts.values_list("exit_status", "signal").get() == (None, None)
    lifecycle.note_exit(job.pk, 1, -11)
    assert job.attempts.values_list("exit_status", "signal").get() == (None, 11)
    lifecycle.note_exit(job.pk, 1, 1)
    assert job.attempts.values_list("exit_status", "signal").get() == (1, None)

"""Workers and trainers that die, stop, freeze, lose their way to the database or their sense of time."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from django.conf import settings
from django.db import connection
from django.db.models import Max

from jobs import lifecycle, sweeping
from jobs.actions import ActionError
from jobs.models import Job, JobState, MetricPoint
from jobs.queueing import cancel_job
from studio import storage
from studio.accounts.models import User
from studio.catalogue.models import Adapter
from tests.faults.cutting import Proxy
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
from tests.processes import has_ended, kill_tree, test_environment, trainers_of, wait_for

pytestmark = pytest.mark.django_db(transaction=True)


def check(job: Job) -> None:
    assert reload(job).state == JobState.SUCCEEDED, describe(job)
    assert weights(reload(job)) == expected_weights(job)
    assert broken_invariants(patience=20) == []


def kill_trainers(job: Job, workers: SlotWorkers, times: int) -> None:
    """kill -9 of the trainer some random steps after it went on, again and again."""
    rng = random.Random(4)
    slot = workers.start("slot", settings={"MAX_ATTEMPTS": 1000})

    def has_reached(step: int) -> bool:
        Job.objects.filter(pk=job.pk, state=JobState.RETRY_WAIT).update(not_before=lifecycle.database_now())
        slot.send(signal.SIGUSR1)
        assert not slot.is_gone(), describe(job)
        assert not reload(job).is_final(), describe(job)
        return bool(slot.trainers()) and job.points.filter(step__gte=step).exists()

    for number in range(1, times + 1):
        # Further than before: three attempts that gain no step are given up as they should be.
        step = (job.points.aggregate(last=Max("step"))["last"] or 0) + rng.randint(1, 9)
        wait_for(lambda step=step: has_reached(step), what=f"step {step}")
        for trainer in slot.trainers():
            trainer.kill()
        wait_for(lambda number=number: job.attempts.filter(signal=signal.SIGKILL).count() == number, what="its record")
    wait_until_final(job, seconds=400)


def test_a_trainer_killed_at_random_moments_costs_no_step(quick: Callable[..., Job], workers: SlotWorkers) -> None:
    job = quick(max_steps=150, every=1)
    kill_trainers(job, workers, times=3)
    check(job)
    died = job.attempts.filter(signal=signal.SIGKILL)
    assert set(died.values_list("outcome", "failure_code")) == {("failed", "process_lost")}


@pytest.mark.slow
def test_a_trainer_killed_50_times_at_random_moments_costs_no_step(
    quick: Callable[..., Job], workers: SlotWorkers
) -> None:
    job = quick(max_steps=2500, every=1)
    kill_trainers(job, workers, times=50)
    check(job)


@pytest.mark.parametrize("whole", [False, True], ids=["supervisor alone", "everything at once"])
def test_a_killed_worker_takes_its_trainer_along_and_its_job_is_taken_back_after_the_lease(
    whole: bool, quick: Callable[..., Job], tmp_path: Path
) -> None:
    job = quick(max_steps=120, every=5)
    with quick_celery_worker(tmp_path / "first.log", **SLOW) as worker:
        wait_for_step(job, 6)
        [trainer] = trainers_of(worker.pid)
        if whole:
            kill_tree(worker.pid)
        else:
            os.kill(worker.pid, signal.SIGKILL)
        wait_for(lambda: has_ended(trainer), what="its trainer's end")
    held = reload(job)
    assert (held.state, held.attempt) == (JobState.RUNNING, 1)
    with quick_celery_worker(tmp_path / "second.log", **FAST):
        wait_for(lambda: reload(job).attempt >= 2, what="the end of the lease")
        wait_until_final(job)
    check(job)
    lost, last = job.attempts.order_by("number")
    assert (lost.outcome, lost.number, last.number) == ("lost", 1, 3)
    assert last.from_step >= 5


def test_sigterm_drains_a_worker_within_its_time(quick: Callable[..., Job], tmp_path: Path) -> None:
    job = quick(max_steps=100_000, every=100_000)
    with quick_celery_worker(tmp_path / "worker.log") as worker:
        wait_for_step(job, 3)
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(120) == 0
    handed = reload(job)
    assert (handed.state, handed.attempt, handed.failures_counted) == (JobState.QUEUED, 1, 0)
    assert job.attempts.get().outcome == "stopped"
    assert broken_invariants() == []
    with quick_celery_worker(tmp_path / "second.log"):
        wait_for(lambda: job.attempts.filter(number=2, from_step__gte=3).exists(), what="going on from its checkpoint")


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGQUIT])
def test_a_second_signal_ends_a_draining_worker_at_once_and_its_job_can_go_on(
    second: signal.Signals, quick: Callable[..., Job], tmp_path: Path
) -> None:
    job = quick(max_steps=120, every=5)
    with quick_celery_worker(tmp_path / "first.log", QUICK_TRAINER_DEAF="1", **SLOW) as worker:
        wait_for_step(job, 6)
        [trainer] = trainers_of(worker.pid)
        worker.send_signal(signal.SIGTERM)
        wait_for(lambda: "Warm shutdown" in (tmp_path / "first.log").read_text(), what="the drain")
        worker.send_signal(second)
        # Its trainer hears no wish to stop, so a worker that waited for it would wait for the whole job.
        worker.wait(120)
        wait_for(lambda: has_ended(trainer), what="its trainer's end")
    assert not reload(job).is_final()
    expire_leases()
    with quick_celery_worker(tmp_path / "second.log", **FAST):
        wait_until_final(job)
    check(job)


def test_a_worker_that_was_frozen_for_longer_than_its_lease_writes_nothing_when_it_thaws(
    quick: Callable[..., Job], workers: SlotWorkers
) -> None:
    job = quick(max_steps=160, every=5)
    zombie = workers.start("slot", environment=SLOW)
    wait_for_step(job, 6)
    # The supervisor freezes; its trainer goes on talking into the pipe.
    zombie.send(signal.SIGSTOP)
    workers.start("slot", 1, environment=FAST)
    wait_for(lambda: job.attempts.filter(number=3).exists(), what="the replacement")
    zombie.send(signal.SIGCONT)
    wait_for(lambda: not zombie.trainers(), what="the end of the zombie's trainer")
    wait_until_final(job)
    check(job)
    assert not zombie.is_gone(), "it looks for other work"
    written = MetricPoint.objects.filter(job=job, attempt=1)
    assert not written.filter(at__gt=job.attempts.get(number=1).ended_at).exists()
    assert Adapter.objects.count() == 1


def test_a_worker_frozen_just_before_it_registers_makes_no_second_adapter(
    quick: Callable[..., Job], workers: SlotWorkers
) -> None:
    job = quick()
    zombie = workers.start("slot", failpoints="register.before_keep=pause:1")
    wait_for(lambda: workers.has_fired("register.before_keep"), what="the moment before registering")
    zombie.send(signal.SIGSTOP)
    expire_leases()
    sweeping.sweep()
    workers.start("slot", 1)
    wait_until_final(job)
    zombie.send(signal.SIGCONT)
    follower = quick("follower")
    wait_until_final(follower)
    # Whoever takes it, the zombie has thawed: it drains, which it does only after its last word on the first job.
    zombie.send(signal.SIGTERM)
    zombie.wait()
    check(job)
    check(follower)
    assert Adapter.objects.count() == 2


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    folder = Path(tempfile.mkdtemp(prefix="ps-"))
    way = Proxy(folder, Path(connection.settings_dict["HOST"]))
    yield way
    way.close()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("how", ["cut", "fall_silent"])
def test_a_worker_that_cannot_reach_the_database_ends_its_trainer_before_its_lease_ends(
    how: str, quick: Callable[..., Job], workers: SlotWorkers, proxy: Proxy, tmp_path: Path
) -> None:
    database = connection.settings_dict
    url = "postgres://{USER}:{PASSWORD}@{host}/{NAME}".format(**database, host=quote(str(proxy.folder), safe=""))
    (tmp_path / "away").mkdir()
    away = SlotWorkers(tmp_path / "away", test_environment() | {"DATABASE_URL": url})
    try:
        job = quick(max_steps=200, every=5)
        # A longer lease than elsewhere leaves more time between the trainer's end and its own.
        slot = away.start("slot", settings={"LEASE_SECONDS": 10}, environment=SLOW)
        wait_for_step(job, 6)
        getattr(proxy, how)()
        wait_for(lambda: not slot.trainers(), what="the end of its trainer")
        ended_at = lifecycle.database_now()
        held = reload(job)
        assert (held.state, held.attempt) == (JobState.RUNNING, 1), "nobody else has taken it"
        assert ended_at < held.lease_until
        workers.start("slot", 1, environment=FAST)
        wait_until_final(job)
        check(job)
        proxy.mend()
        if how == "cut":
            follower = quick("follower")
            wait_until_final(follower)
            check(follower)
    finally:
        away.stop()


def test_a_job_whose_trainer_dies_before_its_first_step_is_given_up_and_keeps_everything(
    quick: Callable[..., Job], workers: SlotWorkers
) -> None:
    job = quick()
    workers.start("slot", environment={"QUICK_TRAINER_POISON": "1"})
    ended = wait_until_final(job)
    assert (ended.state, ended.failure_code, ended.attempt) == (JobState.FAILED, "poison", 3), describe(job)
    assert "Given up after 3 failed attempts" in ended.failure_message
    assert ended.failure_next_step
    assert list(job.attempts.values_list("signal", flat=True)) == [signal.SIGSEGV] * 3
    kept = storage.job_folder(job.pk) / "attempts"
    assert sorted(path.parent.name for path in kept.glob("*/trainer.log")) == ["1", "2", "3"]
    assert broken_invariants() == []


def test_cancelling_while_the_adapter_is_being_registered_gives_one_end_and_not_two(
    quick: Callable[..., Job], workers: SlotWorkers, bob: User
) -> None:
    for number, point in enumerate(("register.before_keep", "register.files_kept", "register.before_commit")):
        job = quick(point)
        slot = workers.start("slot", number, failpoints=f"{point}=pause:1.5")
        wait_for(lambda point=point: workers.has_fired(point), what=point)
        with contextlib.suppress(ActionError):  # It has just succeeded: the wish came too late, and says so.
            cancel_job(reload(job), bob, "now")
        ended = wait_until_final(job)
        assert (ended.state, ended.adapter is not None) in {(JobState.CANCELLED, False), (JobState.SUCCEEDED, True)}
        slot.send(signal.SIGTERM)
        slot.wait()
        assert broken_invariants(patience=20) == [], point


@pytest.mark.parametrize("point", ["trainer.before_start", "checkpoint.before_rename", "training.before_package"])
def test_cancelling_in_other_moments_ends_in_cancelled(
    point: str, quick: Callable[..., Job], workers: SlotWorkers, bob: User
) -> None:
    # The first two come long before the last step: the wish is there by then, however late it is.
    job = quick(max_steps=40 if point == "training.before_package" else 4000, every=4)
    slot = workers.start("slot", failpoints=f"{point}=pause:2")
    wait_for(lambda: workers.has_fired(point), what=point)
    with contextlib.suppress(ActionError):
        cancel_job(reload(job), bob, "now")
    ended = wait_until_final(job)
    # A trainer that packages already may be quicker than the wish; then it is done, and there is one product.
    allowed = {JobState.CANCELLED, JobState.SUCCEEDED} if point == "training.before_package" else {JobState.CANCELLED}
    assert ended.state in allowed, describe(job)
    slot.send(signal.SIGTERM)
    slot.wait()
    assert broken_invariants(patience=20) == []


def test_cancelling_a_queued_job_ends_it_at_once(quick: Callable[..., Job], bob: User) -> None:
    job = quick()
    assert cancel_job(job, bob, "now")
    assert reload(job).state == JobState.CANCELLED
    assert broken_invariants() == []


def test_a_job_whose_worker_dies_right_after_the_wish_to_stop_is_cancelled_and_not_queued(
    quick: Callable[..., Job], workers: SlotWorkers, bob: User
) -> None:
    job = quick(max_steps=1000)
    first = workers.start("slot")
    wait_for_step(job, 2)
    first.send(signal.SIGSTOP)  # so that it cannot obey before it dies
    cancel_job(job, bob, "now")
    first.kill()
    workers.start("slot", 1)
    # By the lease, and by the second worker alone.
    wait_for(lambda: reload(job).is_final(), what="the cancellation")
    ended = reload(job)
    assert (ended.state, ended.adapter) == (JobState.CANCELLED, None)
    assert job.attempts.get().outcome == "lost"
    assert broken_invariants(patience=20) == []


@pytest.mark.parametrize("hours", [1, -1])
def test_a_worker_whose_clock_is_an_hour_off_keeps_its_lease_and_takes_nobody_elses(
    hours: int, quick: Callable[..., Job], workers: SlotWorkers
) -> None:
    of_the_right_time, of_the_wrong_time = quick("right", max_steps=160), quick("wrong", max_steps=160)
    workers.start("slot")
    wait_for(lambda: reload(of_the_right_time).state == JobState.RUNNING, what="the first claim")
    workers.start("slot", 1, clock_hours=hours)
    for job in (of_the_right_time, of_the_wrong_time):
        ended = wait_until_final(job)
        assert (ended.state, ended.attempt) == (JobState.SUCCEEDED, 1), describe(job)
        # What the worker measures carries its own clock; what decides, the database's.
        assert abs((ended.finished_at - lifecycle.database_now()).total_seconds()) < 600
        assert weights(ended) == expected_weights(job)
    shifted = abs(MetricPoint.objects.filter(job=of_the_wrong_time).first().at - ended.finished_at).total_seconds()
    assert shifted > 3000, "the clock was really off"
    assert settings.LEASE_SECONDS < 600

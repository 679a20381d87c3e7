"""Who gets a free device, through the claim itself: shares, limits, memory, jobs that did not fit, ageing."""

from __future__ import annotations

import threading
from datetime import timedelta
from typing import Any

import pytest
from django.db import connection
from django.utils import timezone

from jobs import lifecycle, scheduling
from jobs.fair_share import AGEING
from jobs.models import Job, JobState, LastStart, TeamQuota, Usage, UsageHour, Worker
from jobs.scheduling import HOLD_AFTER
from studio.accounts.models import Role, Team, User
from studio.catalogue.models import BaseModel
from tests.conftest import make_member
from tests.jobs.making import make_job, make_running_job, make_worker

GIBIBYTE = 1024**3


def queue(team: Team, user: User, name: str, *, gib: float = 0, gpus: int = 1, **changes: Any) -> Job:
    job = make_job(team, user, name=name)
    needs = {"gpus": gpus, "memory_bytes": round(gib * GIBIBYTE)}
    Job.objects.filter(pk=job.pk).update(needs=needs, **changes)
    return Job.objects.get(pk=job.pk)


def device(slot: int = 0, *, gib: float = 80, free: float | None = None, **changes: Any) -> Worker:
    worker = make_worker(slot)
    values = {
        "memory_bytes": round(gib * GIBIBYTE),
        "free_memory_bytes": round((gib if free is None else free) * GIBIBYTE),
    }
    Worker.objects.filter(pk=worker.pk).update(**(values | changes))
    worker.refresh_from_db()
    return worker


def use(team: Team, user: User, hours: float) -> None:
    Usage.objects.create(team=team, user=user, device_seconds=3600 * hours, decayed_at=timezone.now())


def take(worker: Worker) -> str | None:
    job = scheduling.next_job(worker)
    return job.name if job is not None else None


def end(name: str) -> None:
    job = Job.objects.get(name=name)
    lifecycle.fail(job.pk, job.attempt, code="test", message="Over.", next_step="")


@pytest.fixture
def dora(team: Team) -> User:
    return make_member("dora", team, Role.TRAINER)


def test_the_team_that_has_used_less_goes_first(team: Team, bob: User, other_team: Team, charlie: User) -> None:
    use(team, bob, hours=3)
    use(other_team, charlie, hours=2)
    queue(team, bob, "ours")
    queue(other_team, charlie, "theirs")
    assert [take(device(slot)) for slot in range(3)] == ["theirs", "ours", None]


def test_use_is_weighed_by_the_teams_share(team: Team, bob: User, other_team: Team, charlie: User) -> None:
    use(team, bob, hours=3)
    use(other_team, charlie, hours=2)
    TeamQuota.objects.create(team=team, share=2)
    queue(other_team, charlie, "theirs")
    queue(team, bob, "ours")
    assert take(device()) == "ours"


def test_in_a_team_the_person_who_has_used_less_goes_first(team: Team, bob: User, dora: User) -> None:
    use(team, bob, hours=1)
    queue(team, bob, "bob's")
    queue(team, dora, "dora's")
    assert take(device()) == "dora's"


def test_what_a_running_job_should_still_take_counts_already(
    team: Team, bob: User, other_team: Team, charlie: User
) -> None:
    for number in (1, 2):
        queue(team, bob, f"ours {number}", expected_seconds=3600)
    queue(other_team, charlie, "theirs", expected_seconds=60)
    assert [take(device(slot)) for slot in range(3)] == ["ours 1", "theirs", "ours 2"]


def test_priority_goes_before_shares_and_the_teams_own_order_before_its_people(
    team: Team, bob: User, dora: User, other_team: Team, charlie: User
) -> None:
    use(team, bob, hours=9)
    queue(other_team, charlie, "theirs")
    queue(team, dora, "late", team_rank=1)
    queue(team, bob, "early", team_rank=-1)
    queue(team, bob, "urgent", priority=1)
    assert [take(device(slot)) for slot in range(4)] == ["urgent", "theirs", "early", "late"]


def test_a_team_at_its_running_limit_waits_and_another_goes(
    team: Team, bob: User, other_team: Team, charlie: User
) -> None:
    TeamQuota.objects.create(team=team, max_running_jobs=1)
    use(other_team, charlie, hours=9)
    first, second = queue(team, bob, "first"), queue(team, bob, "second")
    queue(other_team, charlie, "theirs")
    assert [take(device(slot)) for slot in range(3)] == ["first", "theirs", None]
    Job.objects.filter(pk=first.pk).update(seconds_left=600)
    assert scheduling.explain_wait(second) == "Your team runs 1 of its 1 job. “first” should end in about 10 min."
    end("first")
    assert take(device(4)) == "second"


def test_a_team_that_has_used_up_its_hours_waits_until_some_leave_the_window(team: Team, bob: User) -> None:
    TeamQuota.objects.create(team=team, max_gpu_hours=5, window_days=2)
    hour = timezone.now().replace(minute=0, second=0, microsecond=0)
    UsageHour.objects.create(team=team, hour=hour - timedelta(hours=30), device_seconds=2 * 3600)
    UsageHour.objects.create(team=team, hour=hour - timedelta(hours=10), device_seconds=4 * 3600)
    job = queue(team, bob, "patient")
    assert take(device()) is None
    frees = timezone.localtime(hour - timedelta(hours=30) + timedelta(days=2))
    said = scheduling.explain_wait(job)
    assert said.startswith("Your team has used 6.0 of its 5 GPU-hours in the last 2 days. Hours are free again from")
    assert f"from {frees:%H:%M}" in said
    starts_at = scheduling.look_at_queue([job]).starts_at(job)
    assert starts_at is not None
    assert abs(starts_at - frees) < timedelta(seconds=1)
    UsageHour.objects.filter(hour=hour - timedelta(hours=30)).update(hour=hour - timedelta(hours=49))
    assert take(device(1)) == "patient"


@pytest.mark.django_db(transaction=True)
def test_claims_at_once_do_not_pass_a_limit_and_never_share_a_job(transactional_db: None) -> None:
    team = Team.objects.create(name="Busy", slug="busy")
    user = make_member("erin", team, Role.TRAINER)
    TeamQuota.objects.create(team=team, max_running_jobs=3)
    for number in range(12):
        queue(team, user, f"job {number}")
    workers = [device(slot) for slot in range(8)]
    start, claimed = threading.Barrier(len(workers)), []

    def claim(worker: Worker) -> None:
        try:
            start.wait(60)
            claimed.append(scheduling.next_job(worker))
        finally:
            connection.close()

    threads = [threading.Thread(target=claim, args=(worker,)) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    taken = [job.pk for job in claimed if job is not None]
    assert len(claimed) == 8
    assert len(taken) == len(set(taken)) == 3
    assert Job.objects.filter(state=JobState.RUNNING).count() == 3


@pytest.mark.django_db(transaction=True)
def test_a_job_that_somebody_holds_is_passed_without_waiting(transactional_db: None) -> None:
    team = Team.objects.create(name="Busy", slug="busy")
    user = make_member("erin", team, Role.TRAINER)
    held = queue(team, user, "held")
    queue(team, user, "free")
    is_held, is_over = threading.Event(), threading.Event()

    def hold() -> None:
        from django.db import transaction

        try:
            with transaction.atomic():
                Job.objects.select_for_update().get(pk=held.pk)
                is_held.set()
                is_over.wait(60)
        finally:
            connection.close()

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        assert is_held.wait(60)
        assert take(device()) == "free"
    finally:
        is_over.set()
        thread.join(60)


def test_a_job_is_not_given_to_a_device_without_enough_free_memory(team: Team, bob: User) -> None:
    job = queue(team, bob, "large", gib=60)
    busy = device(free=20, memory_users=[{"name": "python", "process_id": 4711, "num_bytes": 60 * GIBIBYTE}],
                  used_by_others_bytes=60 * GIBIBYTE)  # fmt: skip
    assert take(busy) is None
    job.refresh_from_db()
    assert scheduling.explain_wait(job) == (
        "Needs about 60.0 GiB, and CPU, 2 cores (test-host#0) has 20.0 GiB free now:"
        " outside this studio, python (process 4711) holds 60.0 GiB. It gets the next one that is large enough."
    )
    Worker.objects.update(free_memory_bytes=70 * GIBIBYTE, memory_users=[], used_by_others_bytes=0)
    assert take(busy) == "large"


def test_a_job_for_two_gpus_is_not_given_to_a_slot_with_one(team: Team, bob: User) -> None:
    job = queue(team, bob, "wide", gpus=2)
    assert take(device()) is None
    assert scheduling.explain_wait(job).startswith("Needs 2 GPUs, and no worker gives a job more than 1.")
    assert take(device(1, num_gpus=2)) == "wide"


def test_a_job_that_fits_no_device_says_so_and_holds_nobody_up(team: Team, bob: User) -> None:
    job = queue(team, bob, "huge", gib=141)
    queue(team, bob, "small", gib=1)
    assert take(device()) == "small"
    job.refresh_from_db()
    assert job.owed_since is None
    assert scheduling.explain_wait(job).startswith(
        "Needs about 141.0 GiB, and the largest device, CPU, 2 cores, has 80.0 GiB."
    )


def test_a_smaller_job_passes_one_that_does_not_fit_and_that_one_is_owed_the_next_device(
    team: Team, bob: User, other_team: Team, charlie: User
) -> None:
    large = device(0, gib=80)
    small = device(1, gib=24)
    queue(other_team, charlie, "runs")
    assert take(large) == "runs"
    big = queue(team, bob, "big", gib=60)
    queue(team, bob, "little", gib=4)
    assert take(small) == "little"
    big.refresh_from_db()
    assert big.owed_since is not None
    end("runs")
    end("little")
    # By now its team has used more, and would not be first in turn.
    Usage.objects.filter(user=bob).update(device_seconds=9e5)
    Usage.objects.filter(user=charlie).update(device_seconds=0)
    queue(other_team, charlie, "theirs", gib=4)
    assert take(large) == "big"
    assert Job.objects.get(name="big").owed_since is None


def test_a_device_that_others_on_its_machine_hold_back_is_kept_free_for_the_big_job(team: Team, bob: User) -> None:
    one, two = device(0, gib=80), device(1, gib=80)
    queue(team, bob, "runs", gib=30, expected_seconds=1000)
    assert take(two) == "runs"
    Worker.objects.update(free_memory_bytes=50 * GIBIBYTE)  # one host: its memory is shared
    big = queue(team, bob, "big", gib=70, expected_seconds=9000)
    queue(team, bob, "long", gib=10, expected_seconds=5000)
    assert take(one) == "long"
    end("long")
    Job.objects.filter(pk=big.pk).update(owed_since=timezone.now() - HOLD_AFTER)
    queue(team, bob, "longer", gib=10, expected_seconds=5000)
    assert take(one) is None
    queue(team, bob, "short", gib=10, expected_seconds=200)
    assert take(one) == "short"
    end("short")
    end("runs")
    Worker.objects.update(free_memory_bytes=80 * GIBIBYTE)
    assert take(one) == "big"


def test_a_low_priority_rises_with_age_and_at_equal_priority_age_changes_nothing(
    team: Team, bob: User, other_team: Team, charlie: User
) -> None:
    old = timezone.now() - 3 * AGEING
    use(team, bob, hours=5)
    queue(team, bob, "old", not_before=old)
    queue(other_team, charlie, "fresh")
    assert take(device()) == "fresh"
    queue(other_team, charlie, "urgent", priority=1)
    queue(other_team, charlie, "urgent too", priority=1)
    Usage.objects.filter(user=bob).update(device_seconds=0)
    assert take(device(1)) == "old"
    # Served: its age begins anew.
    queue(team, bob, "old too", not_before=old)
    assert LastStart.objects.filter(team=team).exists()
    assert take(device(2)) == "urgent"


def test_a_drained_or_quarantined_worker_takes_nothing_and_the_job_says_so(team: Team, bob: User) -> None:
    job = queue(team, bob, "waits")
    worker = device()
    Worker.objects.update(is_draining=True)
    assert take(worker) is None
    assert "Every worker is being drained for maintenance" in scheduling.explain_wait(job)
    Worker.objects.update(is_draining=False, quarantined_until=timezone.now() + timedelta(minutes=5))
    assert take(worker) is None
    assert "Every worker is being drained or in quarantine" in scheduling.explain_wait(job)
    Worker.objects.update(quarantined_until=timezone.now() - timedelta(seconds=1))
    assert take(worker) == "waits"


def test_a_warm_base_decides_between_jobs_of_one_person_only(team: Team, bob: User, dora: User) -> None:
    warm = BaseModel.objects.create(name="warm", folder="/nowhere", revision="2" * 64)
    use(team, dora, hours=1)
    queue(team, bob, "cold")
    queue(team, bob, "fits the trainer", base_model=warm)
    queue(team, dora, "fits too", base_model=warm)
    worker = device(warm_base=warm, warm_team=team)
    assert [take(worker) for _ in range(3)] == ["fits the trainer", "cold", "fits too"]


def test_a_job_that_was_passed_for_a_warm_base_for_long_is_passed_no_more(team: Team, bob: User) -> None:
    warm = BaseModel.objects.create(name="warm", folder="/nowhere", revision="2" * 64)
    queue(team, bob, "cold", not_before=timezone.now() - scheduling.WARM_PATIENCE)
    queue(team, bob, "fits the trainer", base_model=warm)
    assert take(device(warm_base=warm, warm_team=team)) == "cold"


def test_a_base_that_is_warm_for_another_team_decides_nothing(
    team: Team, bob: User, other_team: Team, charlie: User
) -> None:
    warm = BaseModel.objects.create(name="warm", folder="/nowhere", revision="2" * 64)
    queue(team, bob, "cold")
    queue(team, bob, "would fit", base_model=warm)
    assert take(device(warm_base=warm, warm_team=other_team)) == "cold"


def test_a_rank_says_nothing_beside_another_teams(team: Team, bob: User, other_team: Team, charlie: User) -> None:
    first = queue(team, bob, "came first")
    queue(other_team, charlie, "ranked", team_rank=-5)
    assert scheduling.queue_position(first) == 1
    assert take(device()) == "came first"


def test_it_says_of_other_teams_only_how_many_go_first_and_by_which_rule(
    team: Team, bob: User, other_team: Team, charlie: User
) -> None:
    make_running_job(team, bob, name="ours runs")
    use(team, bob, hours=4)
    for number in range(2):
        queue(other_team, charlie, f"secret merger {number}")
    job = queue(team, bob, "waits")
    said = scheduling.explain_wait(job)
    assert said.endswith("2 jobs of other teams, which have used less of their share lately, go first.")
    Job.objects.filter(team=other_team).update(priority=1)
    assert scheduling.explain_wait(job).endswith("2 jobs of other teams, with a higher priority, go first.")
    assert "secret" not in said


def test_a_paused_job_and_one_that_is_not_to_start_yet_say_so(team: Team, bob: User) -> None:
    device()
    paused = queue(team, bob, "paused", state=JobState.PAUSED)
    assert scheduling.explain_wait(paused).startswith("Paused")
    later = queue(team, bob, "later", not_before=timezone.now() + timedelta(hours=2))
    assert scheduling.explain_wait(later).startswith("Is not to start before")


def test_the_likely_start_follows_from_what_runs_and_what_is_ahead(team: Team, bob: User) -> None:
    runs = make_running_job(team, bob, name="runs")
    Job.objects.filter(pk=runs.pk).update(seconds_left=600)
    first = queue(team, bob, "first", expected_seconds=1200)
    second = queue(team, bob, "second", expected_seconds=1200)
    snapshot = scheduling.look_at_queue([first, second])
    now = snapshot.standing.now
    assert snapshot.starts_at(first) == now + timedelta(seconds=600)
    assert snapshot.starts_at(second) == now + timedelta(seconds=1800)
    assert snapshot.seconds_of_work == 3000

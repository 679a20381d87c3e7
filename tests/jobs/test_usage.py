"""What an attempt costs a person and a team."""

from __future__ import annotations

from datetime import datetime, timedelta
from math import log

import pytest
from django.db.models import Sum
from django.utils import timezone

from jobs import lifecycle, usage
from jobs.models import Job, JobAttempt, Usage, UsageHour
from studio.accounts.models import Team, User
from tests.jobs.making import make_job, make_running_job


def end_attempt(job: Job, *, started: datetime, ended: datetime) -> None:
    JobAttempt.objects.filter(job=job, number=job.attempt).update(started_at=started, ended_at=ended)
    usage.charge(job.pk, job.attempt)


def test_an_attempt_that_ends_is_charged_to_its_person_and_team(team: Team, bob: User) -> None:
    job = make_running_job(team, bob)
    JobAttempt.objects.filter(job=job).update(started_at=timezone.now() - timedelta(hours=2))
    lifecycle.hand_back(job.pk, job.attempt, reason="Handed back.")
    charged = Usage.objects.get(team=team, user=bob)
    assert charged.device_seconds == pytest.approx(7200, rel=0.01)
    assert UsageHour.objects.filter(team=team).aggregate(sum=Sum("device_seconds"))["sum"] == pytest.approx(7200, abs=2)
    assert 3 <= UsageHour.objects.count() + 1 <= 4


def test_usage_halves_in_a_half_life(team: Team, bob: User) -> None:
    now = timezone.now()
    past = now - usage.HALF_LIFE
    end_attempt(make_running_job(team, bob), started=past - timedelta(seconds=1000), ended=past)
    end_attempt(make_running_job(team, bob), started=now - timedelta(seconds=10), ended=now)
    assert Usage.objects.get(team=team, user=bob).device_seconds == pytest.approx(500 + 10, rel=0.001)


def test_an_older_end_that_is_charged_later_counts_no_more_than_in_its_order(team: Team, bob: User) -> None:
    now = timezone.now()
    past = now - usage.HALF_LIFE
    end_attempt(make_running_job(team, bob), started=now - timedelta(seconds=10), ended=now)
    end_attempt(make_running_job(team, bob), started=past - timedelta(seconds=1000), ended=past)
    charged = Usage.objects.get(team=team, user=bob)
    assert charged.decayed_at == now
    assert charged.device_seconds == pytest.approx(510, rel=0.001)


def test_the_weight_of_a_stretch_is_the_integral_of_the_decay() -> None:
    half_life = usage.HALF_LIFE.total_seconds()
    num_slices = 20_000
    width = 2 * half_life / num_slices
    summed = sum(usage.faded(width, (index + 0.5) * width) for index in range(num_slices))
    assert usage.weight_of_stretch(2 * half_life) == pytest.approx(summed, rel=1e-6)
    assert usage.weight_of_stretch(1e12) == pytest.approx(half_life / log(2))


def test_a_job_on_two_gpus_costs_twice_as_much(team: Team, bob: User) -> None:
    job = make_job(team, bob)
    Job.objects.filter(pk=job.pk).update(needs={"gpus": 2, "memory_bytes": 5})
    job.refresh_from_db()
    assert (job.num_gpus, job.memory_bytes) == (2, 5)
    JobAttempt.objects.create(job=job, number=0, started_at=timezone.now())
    now = timezone.now()
    end_attempt(job, started=now - timedelta(seconds=100), ended=now)
    assert Usage.objects.get(user=bob).device_seconds == pytest.approx(200, rel=0.001)

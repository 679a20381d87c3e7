"""Durations learned from finished jobs that follow a known law (tests/bench/durations.py)."""

from __future__ import annotations

import math
from datetime import timedelta
from io import StringIO

import pytest
from django.core.management import call_command
from django.utils import timezone

from jobs import durations
from jobs.durations import learn, pooled_ratios
from jobs.experience import expected_seconds
from jobs.finished import Features, finished_jobs
from jobs.models import Job
from jobs.queueing import queue_job
from studio.accounts.models import Team, User
from tests.bench.durations import BASES, DEVICES, NOISE, make_finished_jobs, median_errors, true_seconds
from tests.jobs.making import make_job, make_recipe

ESTIMATE = {"seconds_low": 200.0, "seconds_high": 300.0, "num_tokens": 100_000, "device": "CPU, 2 cores"}


def expected(team: Team) -> float:
    found = expected_seconds(team, ESTIMATE, method="lora", base_model="tiny")
    assert found is not None
    return found


def test_without_finished_jobs_it_is_the_engines_estimate(team: Team) -> None:
    assert expected(team) == 250
    assert expected_seconds(team, {}, method="lora", base_model="tiny") is None


def test_without_jobs_of_its_own_a_team_gets_the_median_of_all_on_that_device(
    team: Team, other_team: Team, charlie: User
) -> None:
    make_finished_jobs(other_team, charlie, 40, seed=1, ended=timezone.now())
    pooled = pooled_ratios(finished_jobs(Job.objects.all()))
    assert expected(team) == pytest.approx(250 * math.exp(pooled["CPU, 2 cores"]))
    assert expected(team) > 2 * 250
    unknown = expected_seconds(team, ESTIMATE | {"device": "NVIDIA L4"}, method="lora", base_model="tiny")
    assert unknown == 250


def test_too_few_jobs_of_others_say_nothing(team: Team, other_team: Team, charlie: User) -> None:
    make_finished_jobs(other_team, charlie, durations.MIN_POOLED - 1, seed=1, ended=timezone.now())
    assert expected(team) == 250


def test_the_error_falls_with_the_teams_finished_jobs(team: Team, bob: User) -> None:
    now = timezone.now()
    make_finished_jobs(team, bob, 30, seed=2, ended=now)
    untaught, _ = median_errors(team, 30)
    make_finished_jobs(team, bob, 8, seed=3, ended=now - timedelta(days=1))
    _, few = median_errors(team, 30)
    make_finished_jobs(team, bob, 100, seed=4, ended=now - timedelta(days=2))
    _, many = median_errors(team, 30)
    assert many < few < untaught
    # The noise alone gives a median error of 0.67 standard deviations.
    assert many < 2 * 0.67 * NOISE + 0.05


def test_it_learns_what_a_method_and_a_base_cost(team: Team, bob: User) -> None:
    make_finished_jobs(team, bob, 150, seed=5, ended=timezone.now())
    finished = finished_jobs(Job.objects.all())
    prediction = learn(finished, finished)
    for method in ("lora", "qlora", "prefix"):
        for base in BASES:
            for device in DEVICES:
                features = Features(2500, 1e6, method, base, device)
                law = true_seconds(2500, 1e6, method, base, device)
                assert prediction.expected(features) == pytest.approx(law, rel=0.25), features


def test_a_queued_job_is_given_its_expected_duration(team: Team, bob: User) -> None:
    assert make_job(team, bob).expected_seconds is None  # it has no estimate
    plain = make_job(team, bob)
    recipe = make_recipe("with an estimate")
    job = queue_job(
        team=team, user=bob, recipe=recipe, base_model=plain.base_model, dataset_version=plain.dataset_version,
        idempotency_key="with an estimate", estimate=ESTIMATE | {"total_bytes": 5},
    )  # fmt: skip
    assert (job.expected_seconds, job.memory_bytes) == (250, 5)


def test_the_command_prints_the_error_on_held_out_jobs(team: Team, bob: User) -> None:
    said = StringIO()
    call_command("durations", stdout=said)
    assert "nothing to measure on" in said.getvalue()
    make_finished_jobs(team, bob, 60, seed=6, ended=timezone.now())
    said = StringIO()
    call_command("durations", stdout=said)
    assert "60 finished jobs, 12 held out" in said.getvalue()
    by_estimate, learned = durations.held_out_errors(finished_jobs(Job.objects.all()))
    assert sum(learned) < sum(by_estimate) / 2

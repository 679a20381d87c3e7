"""The queue page: the real order, reasons, likely starts, and nothing of other teams' jobs."""

from __future__ import annotations

import re

import pytest
from django.test import Client
from django.utils import timezone
from pytest_django import DjangoAssertNumQueries

from jobs import scheduling
from jobs.models import Job, JobState, TeamQuota
from jobs.showing import DASH
from studio.accounts.models import Team, User
from tests.jobs.making import make_job, make_running_job, make_worker


def text_of(client: Client, path: str = "/jobs/queue/") -> str:
    answer = client.get(path)
    assert answer.status_code == 200
    return " ".join(re.sub(r"<[^>]+>", " ", answer.content.decode()).split())


def test_waiting_jobs_stand_in_their_real_order_with_reason_and_likely_start(
    bob_client: Client, team: Team, bob: User, other_team: Team, charlie: User
) -> None:
    running = make_running_job(team, bob, name="runs")
    Job.objects.filter(pk=running.pk).update(seconds_left=600, step=30, num_steps=60, phase="training")
    make_job(team, bob, name="ours")
    make_job(other_team, charlie, name="secret merger")
    page = text_of(bob_client)
    assert "1 device · 0 free" in page
    assert "step 30 of 60, 50 %" in page
    # The other team has used nothing yet, so its job is first although it came last.
    assert re.search(r"1 A job of another team 2 ours .* Waits for a free device: “runs” is running", page)
    assert re.search(r"≈ (\w+ \d+ \w+ )?\d\d:\d\d", page)


def test_nothing_of_another_teams_jobs_is_shown(
    bob_client: Client, team: Team, bob: User, other_team: Team, charlie: User
) -> None:
    hidden = [make_running_job(other_team, charlie, name="secret merger")]
    hidden += [make_job(other_team, charlie, name=f"secret plan {number}") for number in range(3)]
    make_job(team, bob, name="ours")
    content = bob_client.get("/jobs/queue/").content.decode()
    assert "A job of another team" in content
    assert "secret" not in content
    assert "charlie" not in content
    assert not any(str(job.pk) in content for job in hidden)


def test_neighbouring_jobs_of_other_teams_share_a_row(
    bob_client: Client, team: Team, bob: User, other_team: Team, charlie: User
) -> None:
    make_worker()
    for number in range(3):
        make_job(other_team, charlie, name=f"theirs {number}")
    Job.objects.update(priority=1)
    make_job(team, bob, name="ours")
    assert f"1{DASH}3 3 jobs of other teams 4 ours" in text_of(bob_client)


def test_a_paused_job_stands_apart_and_says_so(bob_client: Client, team: Team, bob: User) -> None:
    job = make_job(team, bob, name="resting")
    Job.objects.filter(pk=job.pk).update(state=JobState.PAUSED)
    page = text_of(bob_client)
    assert re.search(rf"Paused .* {DASH} resting .* Paused: it keeps its checkpoint", page)


def test_the_page_says_the_limit_that_holds_a_team_back(bob_client: Client, team: Team, bob: User) -> None:
    TeamQuota.objects.create(team=team, max_running_jobs=1)
    make_running_job(team, bob, name="runs")
    make_worker(1)
    make_job(team, bob, name="held back")
    assert scheduling.next_job(make_worker(2)) is None
    assert "Your team runs 1 of its 1 job." in text_of(bob_client)


def test_an_empty_queue_says_what_to_do(bob_client: Client) -> None:
    page = text_of(bob_client)
    assert "No worker is running" in page
    assert "Nothing is queued" in page


def test_the_list_alone_is_sent_when_it_refreshes_itself(bob_client: Client, team: Team, bob: User) -> None:
    make_job(team, bob)
    headers = {"HX-Request": "true", "HX-Target": "job-queue"}
    content = bob_client.get("/jobs/queue/", headers=headers).content.decode()
    assert content.lstrip().startswith('<section id="job-queue"')
    assert "<html" not in content


@pytest.mark.parametrize("number", [1, 40])
def test_the_page_costs_at_most_eight_queries(
    bob_client: Client,
    team: Team,
    bob: User,
    other_team: Team,
    charlie: User,
    number: int,
    django_assert_max_num_queries: DjangoAssertNumQueries,
) -> None:
    make_running_job(team, bob, name="runs")
    TeamQuota.objects.create(team=team, max_gpu_hours=1e-9)
    for _ in range(number):
        make_job(team, bob)
        make_job(other_team, charlie)
    Job.objects.filter(state=JobState.QUEUED).update(not_before=timezone.now())
    with django_assert_max_num_queries(8):
        assert bob_client.get("/jobs/queue/").status_code == 200

from __future__ import annotations

import re
from datetime import timedelta

from django.test import Client
from django.urls import reverse
from django.utils import timezone

from jobs.home import MAX_ROWS
from jobs.models import JobState
from studio.accounts.models import Role, Team, User
from studio.catalogue.models import BaseModel
from studio.datasets.models import DatasetVersion
from tests.conftest import make_member, signed_in
from tests.factories import make_adapter
from tests.jobs.conftest import MakeJob


def test_the_checklist_counts_what_the_team_has_really_done(
    alice_client: Client, base_model: BaseModel, team: Team, alice: User
) -> None:
    assert "0 of 3" in alice_client.get(reverse("home")).text


def test_the_checklist_moves_with_the_first_dataset_and_job(
    alice_client: Client, version: DatasetVersion, make_job: MakeJob
) -> None:
    assert "1 of 3" in alice_client.get(reverse("home")).text
    make_job()
    assert "2 of 3" in alice_client.get(reverse("home")).text


def test_it_goes_away_when_all_is_done_and_the_newest_model_is_shown(
    alice_client: Client, make_job: MakeJob, team: Team, alice: User, base_model: BaseModel, version: DatasetVersion
) -> None:
    adapter = make_adapter(team, alice, name="my-adapter", base_model=base_model, dataset_version=version)
    make_job(state=JobState.SUCCEEDED, adapter=adapter)
    page = alice_client.get(reverse("home")).text
    assert "Get started" not in page
    assert "my-adapter" in page
    assert "1.92 → 1.32" in page


def test_a_failure_needs_somebody_until_it_is_run_again(alice_client: Client, make_job: MakeJob) -> None:
    failed = make_job("broken", state=JobState.FAILED, failure_message="No space left.", finished_at=timezone.now())
    page = alice_client.get(reverse("home")).text
    assert "Needs you" in page
    assert "No space left." in page
    make_job("again", parent=failed)
    assert "Needs you" not in alice_client.get(reverse("home")).text


def test_a_job_that_was_run_again_often_is_shown_once(alice_client: Client, make_job: MakeJob) -> None:
    waiting = make_job("first-try", state=JobState.RETRY_WAIT)
    for number in range(3):
        make_job(f"child-{number}", parent=waiting)
    assert alice_client.get(reverse("home")).text.count(">first-try</a>") == 1


def test_what_runs_and_what_is_next_is_shown_however_much_waits_or_failed(
    alice_client: Client, make_job: MakeJob
) -> None:
    make_job("first-in-queue")
    make_job("runs", state=JobState.RUNNING, attempt=1, lease_until=timezone.now() + timedelta(minutes=5))
    for number in range(40):
        make_job(f"waits-{number}")
        make_job(f"failed-{number}", state=JobState.FAILED, finished_at=timezone.now())
    page = alice_client.get(reverse("home")).text
    shown = re.findall(r">(runs|first-in-queue|waits-\d+)</a>", page)
    assert shown == ["runs", "first-in-queue", *(f"waits-{number}" for number in range(MAX_ROWS - 2))]
    assert re.findall(r">(failed-\d+)</a>", page) == [f"failed-{39 - number}" for number in range(MAX_ROWS)]
    assert "the whole queue" in page
    assert "all failed jobs" in page


def test_another_team_starts_with_nothing(charlie_client: Client, make_job: MakeJob) -> None:
    make_job("secret-name")
    page = charlie_client.get(reverse("home")).text
    assert "0 of 3" in page
    assert "secret-name" not in page


def test_a_viewer_is_offered_no_button_that_refuses(team: Team) -> None:
    page = signed_in(make_member("vera", team, Role.VIEWER)).get(reverse("home")).text
    assert reverse("jobs:new") not in page

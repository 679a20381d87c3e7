from __future__ import annotations

from django.test import Client
from django.urls import reverse
from django.utils import timezone

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


def test_another_team_starts_with_nothing(charlie_client: Client, make_job: MakeJob) -> None:
    make_job("secret-name")
    page = charlie_client.get(reverse("home")).text
    assert "0 of 3" in page
    assert "secret-name" not in page


def test_a_viewer_is_offered_no_button_that_refuses(team: Team) -> None:
    page = signed_in(make_member("vera", team, Role.VIEWER)).get(reverse("home")).text
    assert reverse("jobs:new") not in page

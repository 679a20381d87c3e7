"""The licence of a dataset: given with the upload or later, on the page and over the API."""

from __future__ import annotations

import pytest
from django.test import Client

from studio.accounts.models import ApiToken, AuditEvent, Team, User
from studio.datasets.models import Dataset
from tests.factories import make_dataset_version

pytestmark = pytest.mark.django_db


def test_a_licence_is_chosen_on_the_page_and_written_to_the_audit_log(
    team: Team, bob: User, bob_client: Client
) -> None:
    version = make_dataset_version(team, bob)
    address = f"/datasets/{version.dataset_id}/licence/"
    assert bob_client.post(address, {"licence": "cc-by-sa-4.0"}).status_code == 302
    assert "<strong>CC BY-SA 4.0</strong>" in bob_client.get(version.get_absolute_url()).content.decode()
    bob_client.post(address, {"licence": "no-such"})
    assert Dataset.objects.get().licence == "cc-by-sa-4.0"
    event = AuditEvent.objects.get(action="dataset.licence_changed")
    assert event.details == {"before": "", "after": "cc-by-sa-4.0"}


def test_another_team_changes_nothing(team: Team, bob: User, charlie_client: Client) -> None:
    version = make_dataset_version(team, bob)
    assert charlie_client.post(f"/datasets/{version.dataset_id}/licence/", {"licence": "mit"}).status_code == 404
    assert Dataset.objects.get().licence == ""


def test_the_api_takes_only_licences_that_there_are(team: Team, bob: User) -> None:
    version = make_dataset_version(team, bob)
    _, secret = ApiToken.issue(team=team, user=bob, name="x", scopes=["read", "write"])
    headers = {"Authorization": f"Bearer {secret}"}
    address = f"/api/v1/datasets/{version.dataset_id}/"
    kept = Client().patch(address, {"licence": "mit"}, content_type="application/json", headers=headers)
    assert kept.json()["licence"] == "mit"
    refused = Client().patch(address, {"licence": "mine"}, content_type="application/json", headers=headers)
    assert refused.status_code == 422

"""A team's share and limits: who may set them, by page and by API, and that it is written down."""

from __future__ import annotations

from datetime import timedelta

import pytest
from django.test import Client
from django.utils import timezone

from jobs.models import JobAttempt, TeamQuota
from studio.accounts.models import ApiToken, AuditEvent, Team, User
from tests.conftest import signed_in
from tests.jobs.making import make_running_job

VALUES = {
    "share": "2", "max_running_jobs": "3", "max_gpu_hours": "10.5", "window_days": "14", "price_per_gpu_hour": "2.5",
    "currency": "EUR", "device_prices": "",
}  # fmt: skip


def call(client: Client, user: User, team: Team, body: object = None) -> tuple[int, dict[str, object]]:
    _token, secret = ApiToken.issue(team=team, user=user, name="limits", scopes=["read", "write"])
    headers = {"Authorization": f"Bearer {secret}"}
    if body is None:
        answer = client.get("/api/v1/limits/", headers=headers)
    else:
        answer = client.put("/api/v1/limits/", body, content_type="application/json", headers=headers)
    return answer.status_code, answer.json()


def test_an_admin_sets_the_limits_on_the_page_and_it_is_written_down(alice_client: Client, team: Team) -> None:
    answer = alice_client.post("/jobs/limits/", VALUES, follow=True)
    assert "Limits and prices are saved" in answer.content.decode()
    quota = TeamQuota.objects.get(team=team)
    assert (quota.share, quota.max_running_jobs, quota.max_gpu_hours, quota.window_days) == (2, 3, 10.5, 14)
    event = AuditEvent.objects.get(action="limits.changed")
    assert event.details["max_running_jobs"] == [None, 3]
    assert event.details["price_per_gpu_hour"] == [None, "2.5"]


def test_saving_the_same_limits_again_writes_nothing_down(alice_client: Client) -> None:
    for _ in range(2):
        alice_client.post("/jobs/limits/", VALUES)
    assert AuditEvent.objects.filter(action="limits.changed").count() == 1


def test_a_trainer_sees_the_limits_and_may_not_set_them(bob_client: Client, team: Team) -> None:
    assert "Leads and admins of the team change these." in bob_client.get("/jobs/limits/").content.decode()
    assert bob_client.post("/jobs/limits/", VALUES).status_code == 403
    assert not TeamQuota.objects.exists()


@pytest.mark.parametrize(("field", "value"), [("share", "0"), ("max_running_jobs", "0"), ("window_days", "0")])
def test_a_limit_that_makes_no_sense_is_refused_beside_its_field(alice_client: Client, field: str, value: str) -> None:
    answer = alice_client.post("/jobs/limits/", VALUES | {field: value})
    assert answer.status_code == 422
    assert f'id="id_{field}_error"' in answer.content.decode()
    assert not TeamQuota.objects.exists()


def test_the_page_shows_what_the_window_has_used_and_cost(alice_client: Client, team: Team, bob: User) -> None:
    TeamQuota.objects.create(team=team, max_running_jobs=3, price_per_gpu_hour="2.5", currency="EUR")
    job = make_running_job(team, bob)
    JobAttempt.objects.filter(job=job).update(started_at=timezone.now() - timedelta(hours=4))
    page = alice_client.get("/jobs/limits/").content.decode()
    assert "1 of 3" in page
    assert "10.00\N{NO-BREAK SPACE}EUR" in page
    assert "bob" in page


def test_a_token_of_an_admin_sets_the_limits_and_one_of_a_trainer_only_reads_them(
    client: Client, team: Team, alice: User, bob: User
) -> None:
    status, shown = call(client, alice, team, {"share": 4, "max_running_jobs": 2})
    assert (status, shown["share"], shown["max_running_jobs"], shown["max_gpu_hours"]) == (200, 4, 2, None)
    status, refused = call(client, bob, team, {"share": 100})
    assert (status, refused["error"]["code"]) == (403, "role_missing")  # type: ignore[index]
    assert call(client, bob, team)[1]["share"] == 4
    assert AuditEvent.objects.get(action="limits.changed").token is not None


def test_another_team_has_its_own_limits(
    client: Client, team: Team, alice: User, other_team: Team, charlie: User
) -> None:
    call(client, alice, team, {"share": 4})
    assert call(client, charlie, other_team)[1]["share"] == 1
    assert "Limits and costs of Legal" in signed_in(charlie).get("/jobs/limits/").content.decode()

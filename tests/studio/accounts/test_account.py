from __future__ import annotations

import pytest
from django.test import Client

from studio.accounts.models import Membership, Role, Team, User
from tests.conftest import PASSWORD, signed_in

pytestmark = pytest.mark.django_db


def test_a_person_changes_their_name(alice: User, alice_client: Client) -> None:
    answer = alice_client.post("/account/name/", {"first_name": "Alice", "last_name": "Liddell"}, follow=True)
    assert "Your name is saved." in answer.text
    alice.refresh_from_db()
    assert alice.display_name() == "Alice Liddell"


def test_changing_the_password_needs_the_old_one_and_ends_other_sessions(alice: User, alice_client: Client) -> None:
    other = signed_in(alice)
    new = {"new_password1": "brand new battery 7", "new_password2": "brand new battery 7"}
    refused = alice_client.post("/account/password/", {"old_password": "wrong", **new})
    assert refused.status_code == 422
    assert other.get("/account/").status_code == 200
    assert alice_client.post("/account/password/", {"old_password": PASSWORD, **new}).status_code == 302
    assert alice_client.get("/account/").status_code == 200
    assert other.get("/account/").status_code == 302
    alice.refresh_from_db()
    assert alice.check_password("brand new battery 7")


def test_somebody_who_came_by_link_sets_a_first_password(team: Team) -> None:
    user = User.objects.create_user("dora")
    client = signed_in(user)
    assert "Set a password" in client.get("/account/").text
    short = client.post("/account/password/", {"new_password1": "short", "new_password2": "short"})
    assert short.status_code == 422
    assert "at least 10 characters" in short.text
    long = {"new_password1": "long enough now 5", "new_password2": "long enough now 5"}
    assert client.post("/account/password/", long).status_code == 302
    user.refresh_from_db()
    assert user.check_password("long enough now 5")


def test_ending_sessions_keeps_this_one(alice: User, alice_client: Client) -> None:
    other = signed_in(alice)
    assert alice_client.post("/account/sessions/end/").status_code == 302
    assert alice_client.get("/account/").status_code == 200
    assert other.get("/account/").status_code == 302


def test_a_person_without_a_team_is_told_whom_to_ask(db: None) -> None:
    client = signed_in(User.objects.create_user("dora"))
    answer = client.get("/team/members/", follow=True)
    assert answer.request["PATH_INFO"] == "/no-team/"
    assert "dora" in answer.text
    assert client.get("/account/").status_code == 200


def test_a_person_switches_between_their_teams_only(
    alice: User, alice_client: Client, other_team: Team, team: Team
) -> None:
    assert alice_client.post("/team/switch/", {"team": other_team.pk}).status_code == 404
    Membership.objects.create(user=alice, team=other_team, role=Role.VIEWER)
    assert alice_client.post("/team/switch/", {"team": other_team.pk}).status_code == 302
    assert "Members of Legal" in alice_client.get("/team/members/").text
    assert alice_client.post("/team/switch/", {"team": team.pk}).status_code == 302
    assert "Members of Support" in alice_client.get("/team/members/").text
    for nonsense in ("", "x", "9" * 30, "-1"):
        assert alice_client.post("/team/switch/", {"team": nonsense}).status_code == 404

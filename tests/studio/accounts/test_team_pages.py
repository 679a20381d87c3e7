from __future__ import annotations

import re

import pytest
from django.test import Client

from studio.accounts.models import ApiToken, AuditEvent, LoginLink, Membership, Role, Team, User, record
from tests.conftest import signed_in

pytestmark = pytest.mark.django_db


def membership_of(user: User) -> Membership:
    return Membership.objects.get(user=user)


def test_an_admin_invites_somebody_who_then_signs_in(team: Team, alice_client: Client) -> None:
    answer = alice_client.post("/team/members/", {"username": "dora", "role": "viewer"})
    assert "no-store" in answer["Cache-Control"]
    link = re.search(r"/login/link/[\w-]+/", answer.text)
    assert link is not None
    assert link[0] not in alice_client.get("/team/members/").text
    dora = Client()
    assert dora.post(link[0]).status_code == 302
    seen = dora.get("/team/members/").text
    assert "Members of Support" in seen
    assert "Add a person" not in seen, "a viewer looks and adds nobody"
    assert AuditEvent.objects.get(action="member.invited").object_name == "dora"


def test_somebody_with_an_account_is_added_without_a_link(team: Team, alice_client: Client, charlie: User) -> None:
    answer = alice_client.post("/team/members/", {"username": "Charlie", "role": "viewer"}, follow=True)
    assert "is in the team now" in answer.text
    assert not LoginLink.objects.exists()
    assert charlie.teams.count() == 2


@pytest.mark.parametrize("form", [{"username": "bob", "role": "viewer"}, {"username": "x y", "role": "viewer"},
                                  {"username": "dora", "role": "king"}, {}])  # fmt: skip
def test_an_impossible_invitation_says_why_and_changes_nothing(
    bob: User, alice_client: Client, form: dict[str, str]
) -> None:
    before = Membership.objects.count()
    answer = alice_client.post("/team/members/", form)
    assert answer.status_code == 422
    assert "error-summary" in answer.text
    assert Membership.objects.count() == before


def test_the_last_admin_stays_one(alice: User, alice_client: Client, bob: User) -> None:
    mine = membership_of(alice)
    for url, data in ((f"/team/members/{mine.pk}/role/", {"role": "viewer"}), (f"/team/members/{mine.pk}/remove/", {})):
        assert "is the only admin" in alice_client.post(url, data, follow=True).text
        mine.refresh_from_db()
        assert mine.role == Role.ADMIN
    Membership.objects.filter(user=bob).update(role=Role.ADMIN)
    alice_client.post(f"/team/members/{mine.pk}/role/", {"role": "viewer"})
    mine.refresh_from_db()
    assert mine.role == Role.VIEWER


def test_a_disabled_admin_does_not_count_as_one(alice: User, alice_client: Client, bob: User) -> None:
    Membership.objects.filter(user=bob).update(role=Role.ADMIN)
    User.objects.filter(pk=bob.pk).update(is_active=False)
    assert (
        "is the only admin" in alice_client.post(f"/team/members/{membership_of(alice).pk}/remove/", follow=True).text
    )


def test_who_is_removed_sees_nothing_more_and_their_tokens_die(
    team: Team, alice_client: Client, bob: User, bob_client: Client
) -> None:
    _, secret = ApiToken.issue(team=team, user=bob, name="x", scopes=["read"])
    assert bob_client.get("/team/members/").status_code == 200
    alice_client.post(f"/team/members/{membership_of(bob).pk}/remove/")
    assert bob_client.get("/team/members/")["Location"] == "/no-team/"
    assert ApiToken.find(secret) is None


def test_a_new_link_kills_the_unused_one(alice_client: Client, bob: User) -> None:
    old = LoginLink.create_for(bob)
    answer = alice_client.post(f"/team/members/{membership_of(bob).pk}/link/")
    assert LoginLink.redeem(old) is None
    link = re.search(r"/login/link/([\w-]+)/", answer.text)
    assert link is not None
    assert LoginLink.redeem(link[1]) == bob


def test_an_admin_gets_no_link_into_other_teams(team: Team, alice_client: Client, charlie: User) -> None:
    here = Membership.objects.create(user=charlie, team=team, role=Role.VIEWER)
    answer = alice_client.post(f"/team/members/{here.pk}/link/", follow=True)
    assert "in other teams too" in answer.text
    assert not LoginLink.objects.exists()


def test_a_trainer_looks_and_changes_nothing(bob_client: Client, alice: User) -> None:
    assert "Add a person" not in bob_client.get("/team/members/").text
    mine = membership_of(alice).pk
    for url in ("/team/members/", f"/team/members/{mine}/role/", f"/team/members/{mine}/remove/",
                f"/team/members/{mine}/link/", "/team/tokens/", "/team/tokens/1/revoke/"):  # fmt: skip
        answer = bob_client.post(url, {"username": "x", "role": "viewer"})
        assert answer.status_code == 403, url
        assert "needs the role admin" in answer.text
    assert bob_client.get("/team/audit/").status_code == 403


def test_another_teams_members_and_tokens_do_not_exist(charlie_client: Client, alice: User, team: Team) -> None:
    token, _ = ApiToken.issue(team=team, user=alice, name="x", scopes=["read"])
    mine = membership_of(alice).pk
    for url in (f"/team/members/{mine}/role/", f"/team/members/{mine}/remove/", f"/team/members/{mine}/link/",
                f"/team/tokens/{token.pk}/revoke/"):  # fmt: skip
        assert charlie_client.post(url, {"role": "viewer"}).status_code == 404, url
    assert membership_of(alice).role == Role.ADMIN
    assert "alice" not in charlie_client.get("/team/members/").text


def test_a_token_is_shown_once_with_a_curl_that_works(alice: User, alice_client: Client) -> None:
    answer = alice_client.post("/team/tokens/", {"name": "ci", "scopes": ["read"]})
    secret = re.search(r"pst_[\w-]{40,}", answer.text)
    assert secret is not None
    assert "no-store" in answer["Cache-Control"]
    assert "curl --header" in answer.text
    assert "http://testserver/api/v1/me" in answer.text
    assert secret[0] not in alice_client.get("/team/tokens/").text
    assert secret[0] not in str(list(ApiToken.objects.values()))
    me = Client(headers={"Authorization": f"Bearer {secret[0]}"}).get("/api/v1/me")
    assert me.json()["token"]["name"] == "ci"
    alice_client.post(f"/team/tokens/{ApiToken.objects.get().pk}/revoke/")
    assert Client(headers={"Authorization": f"Bearer {secret[0]}"}).get("/api/v1/me").status_code == 401


def test_a_token_without_name_or_scope_is_not_made(alice_client: Client) -> None:
    for form in ({"name": "", "scopes": ["read"]}, {"name": "x"}, {"name": "x", "scopes": ["root"]}):
        assert alice_client.post("/team/tokens/", form).status_code == 422
    assert not ApiToken.objects.exists()


def test_the_audit_page_filters_and_pages(team: Team, other_team: Team, alice: User, bob: User) -> None:
    for number in range(60):
        record("dataset.uploaded", team=team, user=bob, target=bob, number=number)
    record("adapter.downloaded", team=team, user=alice, target=alice)
    record("secret.of_others", team=other_team, user=None)
    client = signed_in(alice)
    first = client.get("/team/audit/").text
    assert "adapter.downloaded" in first
    assert "secret.of_others" not in first
    assert first.count("<tr>") == 51
    older = re.search(r'rel="next" href="(\?[^"]+)"', first)
    assert older is not None
    second = client.get(f"/team/audit/{older[1].replace('&amp;', '&')}").text
    assert second.count("<tr>") == 12
    assert client.get("/team/audit/?person=alice").text.count("<tr>") == 2
    assert client.get("/team/audit/?action=dataset.uploaded&person=alice").text.count("<tr>") == 0
    assert client.get("/team/audit/?before=abc").status_code == 200


@pytest.mark.parametrize("url", ["/team/members/", "/team/tokens/", "/team/audit/", "/account/"])
def test_a_page_takes_few_queries_however_much_there_is(
    team: Team, alice: User, url: str, django_assert_max_num_queries: object
) -> None:
    for number in range(20):
        user = User.objects.create_user(f"u{number}")
        Membership.objects.create(user=user, team=team, role=Role.VIEWER)
        ApiToken.issue(team=team, user=user, name="x", scopes=["read"])
        record("x.y", team=team, user=user)
    client = signed_in(alice)
    with django_assert_max_num_queries(8):  # type: ignore[operator]
        assert client.get(url).status_code == 200

from __future__ import annotations

from datetime import timedelta

import pytest
import redis
from django.conf import settings as django_settings
from django.test import Client
from django.utils import timezone

from studio.accounts.models import AuditEvent, LoginLink, Team, User
from studio.accounts.throttling import MOST_PER_ACCOUNT, MOST_PER_ADDRESS
from tests.conftest import PASSWORD

pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def no_attempts_yet() -> None:
    with redis.Redis.from_url(django_settings.REDIS_URL) as client:
        for key in client.scan_iter("login-attempts:*"):
            client.delete(key)


def try_password(client: Client, username: str, password: str, **more: str) -> object:
    return client.post("/login/", {"username": username, "password": password, **more})


def test_the_right_password_signs_in_with_a_new_session(alice: User) -> None:
    client = Client()
    client.get("/login/")
    client.session["planted"] = True
    before = client.session.session_key
    answer = try_password(client, "alice", PASSWORD)
    assert (answer.status_code, answer["Location"]) == (302, "/")
    assert client.session.session_key != before
    assert client.session["_auth_user_id"] == str(alice.pk)
    assert AuditEvent.objects.filter(action="login.password", user=alice).count() == 1


def test_a_wrong_password_and_an_unknown_name_get_the_same_answer(alice: User) -> None:
    wrong, unknown = (try_password(Client(), name, "not this one") for name in ("alice", "nobody-here"))
    assert wrong.status_code == unknown.status_code == 422
    for answer in (wrong, unknown):
        assert "do not belong together" in answer.text
        assert "_auth_user_id" not in answer.client.session
    # The CSRF token is masked anew in every answer; the name is what was typed.
    lines = [
        [line.replace(name, "") for line in answer.text.splitlines() if "csrf" not in line.lower()]
        for answer, name in ((wrong, "alice"), (unknown, "nobody-here"))
    ]
    assert lines[0] == lines[1]


def test_an_unknown_name_is_not_kept_for_it_may_be_a_password(db: None) -> None:
    try_password(Client(), "hunter2-typed-in-the-wrong-field", "x")
    event = AuditEvent.objects.get(action="login.failed")
    assert (event.team, event.object_name, event.details) == (None, "", {"throttled": False})


def test_guessing_one_account_ends_in_a_wait_even_with_the_right_password(alice: User) -> None:
    for _ in range(MOST_PER_ACCOUNT):
        assert try_password(Client(), "alice", "guess").status_code == 422
    answer = try_password(Client(), "alice", PASSWORD)
    assert answer.status_code == 429
    assert 0 < int(answer["Retry-After"]) <= 15 * 60
    assert "too many attempts" in answer.text.lower()


def test_a_name_that_does_not_exist_waits_like_one_that_does(db: None) -> None:
    for _ in range(MOST_PER_ACCOUNT):
        try_password(Client(), "ghost", "guess")
    assert try_password(Client(), "ghost", "guess").status_code == 429


def test_guessing_many_accounts_from_one_address_ends_in_a_wait(alice: User) -> None:
    for number in range(MOST_PER_ADDRESS):
        redis_answer = Client(REMOTE_ADDR="192.0.2.7").post("/login/", {"username": f"u{number}", "password": "x"})
        assert redis_answer.status_code == 422
    assert Client(REMOTE_ADDR="192.0.2.7").post("/login/", {"username": "alice", "password": "x"}).status_code == 429
    assert Client(REMOTE_ADDR="192.0.2.8").post("/login/", {"username": "alice", "password": "x"}).status_code == 422


def test_the_right_password_forgets_the_attempts_before(alice: User) -> None:
    for _ in range(MOST_PER_ACCOUNT - 1):
        try_password(Client(), "alice", "guess")
    assert try_password(Client(), "alice", PASSWORD).status_code == 302
    assert try_password(Client(), "alice", "guess").status_code == 422


def test_without_redis_people_still_sign_in(alice: User, settings: object) -> None:
    settings.REDIS_URL = "redis://127.0.0.1:1/0"  # type: ignore[attr-defined]
    assert try_password(Client(), "alice", PASSWORD).status_code == 302


@pytest.mark.parametrize(
    ("wanted", "got"),
    [
        ("/jobs/?state=running", "/jobs/?state=running"),
        ("https://evil.example/", "/"),
        ("//evil.example/", "/"),
        ("javascript:alert(1)", "/"),
        ("http:///evil.example", "/"),
        ("/\\evil.example", "/"),
    ],
)
def test_it_goes_on_only_to_this_site(alice: User, wanted: str, got: str) -> None:
    assert try_password(Client(), "alice", PASSWORD, next=wanted)["Location"] == got


def test_a_disabled_account_does_not_sign_in(alice: User) -> None:
    User.objects.filter(pk=alice.pk).update(is_active=False)
    assert try_password(Client(), "alice", PASSWORD).status_code == 422


def test_a_link_signs_in_once(alice: User) -> None:
    secret = LoginLink.create_for(alice)
    client = Client()
    # A preview opens the link, and opens it again: still good.
    assert client.get(f"/login/link/{secret}/").status_code == 200
    assert client.head(f"/login/link/{secret}/").status_code == 200
    assert "_auth_user_id" not in client.session
    assert client.post(f"/login/link/{secret}/").status_code == 302
    assert client.session["_auth_user_id"] == str(alice.pk)
    again = Client().post(f"/login/link/{secret}/")
    assert again.status_code == 410
    assert "_auth_user_id" not in again.client.session


def test_an_old_link_and_an_invented_one_are_dead(alice: User) -> None:
    secret = LoginLink.create_for(alice, lifetime=-timedelta(seconds=1))
    assert Client().post(f"/login/link/{secret}/").status_code == 410
    assert Client().post("/login/link/invented/").status_code == 410


def test_a_link_is_stored_hashed_only(alice: User) -> None:
    secret = LoginLink.create_for(alice)
    assert secret not in str(list(LoginLink.objects.values()))


def test_a_link_of_somebody_else_replaces_the_session(alice: User, bob: User, team: Team) -> None:
    client = Client()
    client.force_login(alice)
    session = client.session
    session["of_alice"] = 1
    session.save()
    client.post(f"/login/link/{LoginLink.create_for(bob)}/")
    assert client.session["_auth_user_id"] == str(bob.pk)
    assert "of_alice" not in client.session


def test_signing_out_takes_a_post_with_a_token(alice: User) -> None:
    client = Client(enforce_csrf_checks=True)
    client.force_login(alice)
    assert client.get("/logout/").status_code == 405
    refused = client.post("/logout/")
    assert refused.status_code == 403
    assert "could not be checked" in refused.text
    assert "_auth_user_id" in client.session
    plain = Client()
    plain.force_login(alice)
    assert plain.post("/logout/").status_code == 302
    assert "_auth_user_id" not in plain.session


def test_login_pages_are_not_cached(alice: User) -> None:
    assert "no-store" in Client().get("/login/")["Cache-Control"]
    assert "no-store" in Client().get(f"/login/link/{LoginLink.create_for(alice)}/")["Cache-Control"]


def test_links_expire_within_their_lifetime(alice: User) -> None:
    LoginLink.create_for(alice)
    link = LoginLink.objects.get()
    assert link.expires_at <= timezone.now() + LoginLink.LIFETIME

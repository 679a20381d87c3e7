"""Every URL there is, asked by strangers and by the other team. A new URL is covered by being there."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest
from django.conf import settings as django_settings
from django.test import Client
from django.urls import URLPattern, URLResolver, get_resolver

from studio.accounts.models import ApiToken, Membership, Team, User
from studio.datasets.models import Dataset, DatasetVersion, VersionState

# Pages for people who are not signed in, and probes for machines.
PUBLIC = {"login/", "login/link/<str:secret>/", "livez", "readyz", "webhooks/mail/stop/<str:token>/"}
# Takes a POST and sends everybody to the login page.
REDIRECTS = {"logout/"}

pytestmark = pytest.mark.django_db


def routes(resolver: URLResolver | None = None, prefix: str = "") -> Iterator[str]:
    for one in (resolver or get_resolver()).url_patterns:
        route = prefix + str(one.pattern).removeprefix("^")
        if isinstance(one, URLPattern):
            yield route
        else:
            yield from routes(one, route)


def filled(route: str, values: dict[str, str]) -> str:
    """A route as a path, each <converter:name> by the value of its name or of its converter."""
    path = "/"
    rest = route
    while "<" in rest:
        before, _, tail = rest.partition("<")
        inside, _, rest = tail.partition(">")
        converter, _, name = inside.rpartition(":")
        defaults = {"int": "1", "uuid": str(uuid.UUID(int=1)), "str": "x", "slug": "x", "path": "x", "": "1"}
        path += before + values.get(name, defaults.get(converter, "1"))
    return path + rest


ROUTES = sorted(set(routes()))


def test_there_are_routes_of_every_app() -> None:
    for beginning in ("team/", "datasets/", "jobs/", "models/", "base-models/", "api/v1/datasets", "api/v1/jobs"):
        assert any(route.startswith(beginning) for route in ROUTES), beginning
    assert set(ROUTES) >= PUBLIC


@pytest.mark.parametrize("route", [route for route in ROUTES if route not in PUBLIC | REDIRECTS])
def test_a_stranger_sees_nothing(route: str) -> None:
    path = filled(route, {})
    client = Client(raise_request_exception=False)
    answers = [getattr(client, verb)(path) for verb in ("get", "post", "put", "patch", "delete")]
    for answer in answers:
        if route.startswith("api/"):
            assert answer.status_code in {401, 404, 405}, (path, answer.status_code)
        else:
            # A page that takes another verb says so before it looks who asks; a stream cannot redirect.
            assert answer.status_code in {302, 404, 405}, (path, answer.status_code)
            if answer.status_code == 302:
                assert answer["Location"].startswith("/login/?next="), path
    assert {answer.status_code for answer in answers} != {405}, path


@pytest.fixture
def things_of_alice(team: Team, alice: User) -> dict[str, str]:
    """Objects of Alice's team by the names that routes give them."""
    dataset = Dataset.objects.create(team=team, name="ours", created_by=alice)
    version = DatasetVersion.objects.create(
        dataset=dataset, number=1, state=VersionState.READY, file_name="x.jsonl", sha256="0" * 64, num_bytes=1,
        created_by=alice,
    )  # fmt: skip
    token, _ = ApiToken.issue(team=team, user=alice, name="x", scopes=["read"])
    return {
        "dataset_id": str(dataset.pk),
        "version_id": str(version.pk),
        "number": "1",
        "membership_id": str(Membership.objects.get(user=alice).pk),
        "token_id": str(token.pk),
    }


OBJECT_NAMES = ("dataset_id", "version_id", "membership_id", "token_id", "job_id", "adapter_id", "review_id")
OBJECT_ROUTES = [route for route in ROUTES if any(f":{name}>" in route for name in OBJECT_NAMES)]


@pytest.mark.parametrize("route", OBJECT_ROUTES)
def test_the_other_team_gets_the_answer_for_what_does_not_exist(
    route: str, things_of_alice: dict[str, str], charlie: User, other_team: Team, charlie_client: Client
) -> None:
    path = filled(route, things_of_alice)
    client = charlie_client
    if route.startswith("api/"):
        _, secret = ApiToken.issue(team=other_team, user=charlie, name="x", scopes=["read", "write"])
        client = Client(headers={"Authorization": f"Bearer {secret}"})
    client.raise_request_exception = False
    nowhere = filled(route, dict.fromkeys(things_of_alice, "999999"))
    for verb in ("get", "post", "put", "patch", "delete"):
        theirs = getattr(client, verb)(path).status_code
        assert theirs == getattr(client, verb)(nowhere).status_code, (verb, path)
        # 400 and 422: a body that is no JSON, or is incomplete, for anybody.
        assert theirs in {400, 404, 405, 422}, (verb, path)


@pytest.mark.parametrize("path", ["/login/", "/livez", "/api/v1/me", "/nothing-here/", "/account/"])
def test_every_answer_has_the_strict_policy(alice_client: Client, path: str) -> None:
    answer = alice_client.get(path)
    parts = [part.split() for part in answer["Content-Security-Policy"].split(";") if part.strip()]
    policy = {name: sources for name, *sources in parts}
    assert policy["default-src"] == ["'self'"]
    assert policy["frame-ancestors"] == policy["object-src"] == policy["base-uri"] == ["'none'"]
    assert "script-src" not in policy, "what default-src allows is enough"
    assert "unsafe" not in answer["Content-Security-Policy"]
    assert answer["X-Content-Type-Options"] == "nosniff"
    assert answer["X-Frame-Options"] == "DENY"
    assert answer["Referrer-Policy"] == "same-origin"


def test_a_missing_page_is_explained(alice_client: Client) -> None:
    answer = alice_client.get("/nothing-here/")
    assert answer.status_code == 404
    assert "belongs to a team that you are not in" in answer.text


def test_a_foreign_host_name_is_refused(db: None) -> None:
    answer = Client(headers={"Host": "rebound.example"}).get("/login/")
    assert answer.status_code == 400
    assert "STUDIO_ALLOWED_HOSTS" in answer.text


def test_probes_say_what_is_there(settings: object) -> None:
    assert Client().get("/livez").json() == {"status": "alive"}
    assert Client().get("/readyz").json() == {"status": "ready", "postgres": True, "redis": True}
    settings.REDIS_URL = "redis://127.0.0.1:1/0"  # type: ignore[attr-defined]
    answer = Client().get("/readyz")
    assert (answer.status_code, answer.json()["redis"]) == (503, False)
    assert django_settings.REDIS_URL not in answer.text


@pytest.mark.parametrize("path", ["/livez", "/readyz"])
def test_a_probe_is_answered_over_plain_http_by_any_host_name_and_nothing_else_is(
    db: None, settings: object, path: str
) -> None:
    settings.SECURE_SSL_REDIRECT = True  # type: ignore[attr-defined]
    client = Client(headers={"Host": "10.0.0.7:8000"})
    assert client.get(path).status_code == 200
    assert client.get(f"{path}/").status_code == 400
    assert client.get("/login/").status_code == 400
    assert Client(headers={"Host": "localhost"}).get("/login/").status_code == 301

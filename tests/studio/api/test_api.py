"""The API's shared half, through a router of the test's own beside the real one."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import pytest
from django.core.exceptions import PermissionDenied
from django.http import Http404, HttpRequest
from django.test import Client, override_settings
from django.urls import include, path
from django.utils import timezone
from ninja import NinjaAPI, Query, Router
from pydantic import Field

from studio.accounts.models import ApiToken, AuditEvent, Membership, Role, Scope, Team, User
from studio.api.auth import ApiRequest, Token, may_read, may_write
from studio.api.errors import ERRORS, install_error_handlers
from studio.api.paging import Page, PageQuery, page_of
from studio.api.schemas import Body, Out
from studio.datasets.models import Dataset
from studio.storage import DiskFullError, TooLargeError
from workers.errors import DatasetError

router = Router()


class ThingOut(Out):
    id: int
    name: str


class ThingBody(Body):
    name: str = Field(max_length=10)
    rank: int = Field(8, ge=1)


class ThingFilters(PageQuery):
    name: str = ""


@router.get("things/", response={200: Page[ThingOut], **ERRORS})
def list_things(request: ApiRequest, filters: Query[ThingFilters]) -> Any:
    return page_of(request.team.datasets.filter(name__contains=filters.name), filters)


@router.post("things/", response={200: ThingOut, **ERRORS}, auth=may_write)
def make_thing(request: ApiRequest, body: ThingBody) -> Any:
    return Dataset.objects.create(team=request.team, name=body.name, created_by=request.user)


@router.delete("things/", auth=Token(Scope.WRITE, Role.ADMIN))
def delete_things(request: ApiRequest) -> dict[str, bool]:
    return {"deleted": True}


RAISES: dict[str, Exception] = {
    "missing": Http404(),
    "forbidden": PermissionDenied("Not here."),
    "explained": DatasetError("Row is broken.", next_step="Mend it.", field="file", line=812),
    "large": TooLargeError("Larger than 5.0 GB."),
    "full": DiskFullError(28, "The disk is full."),
    "bug": RuntimeError("secret detail"),
}


@router.get("raise/{name}")
def raise_error(request: HttpRequest, name: str) -> None:
    raise RAISES[name]


api = NinjaAPI(auth=may_read, docs_url=None, openapi_url=None, urls_namespace="test-api")
install_error_handlers(api)
api.add_router("", router)
urlpatterns = [path("test/", api.urls), path("", include("studio.urls"))]
handler404 = "studio.errors.not_found"

pytestmark = [pytest.mark.django_db, pytest.mark.urls(__name__)]


def bearer(secret: str) -> Client:
    return Client(headers={"Authorization": f"Bearer {secret}"}, raise_request_exception=False)


def issue(team: Team, user: User, *scopes: str) -> tuple[ApiToken, Client]:
    token, secret = ApiToken.issue(team=team, user=user, name="ci", scopes=list(scopes))
    return token, bearer(secret)


@pytest.fixture
def reader(team: Team, alice: User) -> Client:
    return issue(team, alice, "read")[1]


@pytest.fixture
def writer(team: Team, alice: User) -> Client:
    return issue(team, alice, "read", "write")[1]


def test_it_says_who_the_token_is(reader: Client) -> None:
    said = reader.get("/api/v1/me").json()
    assert (said["user"], said["team"], said["role"]) == ("alice", "Support", "admin")
    assert said["token"]["scopes"] == ["read"]


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer pst_wrong", "Basic YTpi", "Bearer  x y"])
def test_a_request_without_a_living_token_gets_a_challenge(db: None, header: str) -> None:
    answer = Client(headers={"Authorization": header} if header else {}).get("/api/v1/me")
    assert answer.status_code == 401
    assert answer["WWW-Authenticate"].startswith("Bearer ")
    assert answer.json()["error"]["code"] == "unauthenticated"


def test_a_session_is_no_key_to_the_api(alice_client: Client) -> None:
    assert alice_client.get("/api/v1/me").status_code == 401


def test_an_expired_a_revoked_and_a_homeless_token_are_refused(team: Team, alice: User) -> None:
    for change in ("expires_at", "revoked_at"):
        token, client = issue(team, alice, "read")
        assert client.get("/api/v1/me").status_code == 200
        ApiToken.objects.filter(pk=token.pk).update(**{change: timezone.now() - timedelta(seconds=1)})
        assert client.get("/api/v1/me").status_code == 401
    _, client = issue(team, alice, "read")
    Membership.objects.filter(user=alice).delete()
    assert client.get("/api/v1/me").status_code == 401


def test_a_token_of_a_disabled_account_is_refused(team: Team, alice: User, reader: Client) -> None:
    User.objects.filter(pk=alice.pk).update(is_active=False)
    assert reader.get("/api/v1/me").status_code == 401


def test_a_reading_token_may_not_write(reader: Client) -> None:
    answer = reader.post("/test/things/", {"name": "x"}, content_type="application/json")
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "scope_missing")
    assert "write" in answer.json()["error"]["message"]
    assert not Dataset.objects.exists()


def test_a_token_may_no_more_than_its_maker(team: Team, bob: User) -> None:
    _, client = issue(team, bob, "read", "write")
    assert client.delete("/test/things/").json()["error"]["code"] == "role_missing"
    Membership.objects.filter(user=bob).update(role=Role.VIEWER)
    answer = client.post("/test/things/", {"name": "x"}, content_type="application/json")
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "role_missing")
    assert client.get("/test/things/").status_code == 200


def test_a_token_in_the_url_is_refused_and_revoked(team: Team, alice: User) -> None:
    token, secret = ApiToken.issue(team=team, user=alice, name="leaky", scopes=["read"])
    answer = Client().get(f"/api/v1/me?token={secret}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "token_in_url")
    assert secret not in answer.text
    token.refresh_from_db()
    assert token.revoked_at is not None
    assert AuditEvent.objects.get(action="token.revoked").team == team
    assert bearer(secret).get("/api/v1/me").status_code == 401


def test_use_is_noted_once_a_minute(team: Team, alice: User) -> None:
    token, client = issue(team, alice, "read")
    client.get("/api/v1/me")
    token.refresh_from_db()
    first = token.last_used_at
    assert first is not None
    client.get("/api/v1/me")
    token.refresh_from_db()
    assert token.last_used_at == first


def test_every_invalid_field_is_named(writer: Client) -> None:
    answer = writer.post("/test/things/", {"name": "x" * 11, "rank": 0}, content_type="application/json")
    assert answer.status_code == 422
    assert {error["field"] for error in answer.json()["errors"]} == {"name", "rank"}
    missing = writer.post("/test/things/", {}, content_type="application/json").json()["error"]
    assert (missing["code"], missing["field"]) == ("missing", "name")


def test_an_unknown_field_is_refused_by_name(writer: Client) -> None:
    answer = writer.post("/test/things/", {"name": "x", "rnak": 4}, content_type="application/json")
    assert answer.status_code == 400
    assert (answer.json()["error"]["code"], answer.json()["error"]["field"]) == ("unknown_field", "rnak")
    answer = writer.get("/test/things/?order_by=password")
    assert answer.status_code == 400
    assert answer.json()["error"]["field"] == "order_by"
    assert "limit, after, name" in answer.json()["error"]["message"]


def test_broken_json_is_said_to_be(writer: Client) -> None:
    answer = writer.post("/test/things/", "{nope", content_type="application/json")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_json")


@pytest.mark.parametrize(
    ("name", "status", "code"),
    [
        ("missing", 404, "not_found"),
        ("forbidden", 403, "forbidden"),
        ("explained", 422, "unreadable_dataset"),
        ("large", 413, "too_large"),
        ("full", 507, "disk_full"),
        ("bug", 500, "internal"),
    ],
)
def test_every_error_has_the_one_form(reader: Client, name: str, status: int, code: str) -> None:
    answer = reader.get(f"/test/raise/{name}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert set(answer.json()["error"]) == {"code", "message", "field", "row", "help"}
    assert "secret detail" not in answer.text


def test_an_explained_error_keeps_its_line_field_and_next_step(reader: Client) -> None:
    error = reader.get("/test/raise/explained").json()["error"]
    assert (error["message"], error["row"], error["field"], error["help"]) == (
        "Row is broken.", 812, "file", "Mend it.",
    )  # fmt: skip


def test_paging_shows_every_row_once_while_rows_arrive(team: Team, alice: User, reader: Client) -> None:
    moment = timezone.now()
    for number in range(7):
        Dataset.objects.create(team=team, name=f"d{number}", created_by=alice)
    # Equal times: only the key breaks the tie.
    Dataset.objects.update(created_at=moment)
    seen: list[str] = []
    after = ""
    while True:
        page = reader.get("/test/things/", {"limit": 3, "after": after}).json()
        seen += [item["name"] for item in page["items"]]
        Dataset.objects.create(team=team, name=f"late{len(seen)}", created_by=alice)
        if page["next"] is None:
            break
        after = page["next"]
    assert seen == [f"d{number}" for number in reversed(range(7))]


@pytest.mark.parametrize("query", ["limit=0", "limit=201", "limit=x"])
def test_a_limit_out_of_bounds_is_refused(reader: Client, query: str) -> None:
    answer = reader.get(f"/test/things/?{query}")
    assert (answer.status_code, answer.json()["error"]["field"]) == (422, "limit")


@pytest.mark.parametrize("cursor", ["%%%", "e30", "WyJ4IiwgIjEiXQ", "WyIyMDI2LTAxLTAxIiwgIngiXQ"])
def test_a_foreign_cursor_is_refused(reader: Client, cursor: str) -> None:
    answer = reader.get("/test/things/", {"after": cursor})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_cursor")


def test_an_unknown_address_of_the_api_answers_in_json(reader: Client) -> None:
    answer = reader.get("/api/v1/nothing/here")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


def test_the_schema_is_for_people_with_an_account_and_for_tokens(alice_client: Client, reader: Client) -> None:
    assert Client().get("/api/v1/openapi.json").status_code == 401
    for client in (alice_client, reader):
        schema = json.loads(client.get("/api/v1/openapi.json").content)
        assert any(name.endswith("/me") for name in schema["paths"])


@override_settings(DEBUG=False)
def test_another_team_sees_an_empty_list(other_team: Team, charlie: User, team: Team, alice: User) -> None:
    Dataset.objects.create(team=team, name="ours", created_by=alice)
    _, client = issue(other_team, charlie, "read")
    assert client.get("/test/things/").json() == {"items": [], "next": None}

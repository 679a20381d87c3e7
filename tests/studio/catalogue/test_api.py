"""The catalogue over REST: the same things as on the pages, for the same people."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from django.test import Client

from studio.accounts.models import ApiToken, AuditEvent, Team, User
from studio.catalogue.models import Adapter, BaseModel
from tests.factories import make_adapter, make_base_model, make_dataset_version
from tests.tiny import make_tiny_base

pytestmark = pytest.mark.usefixtures("data_dir")


@pytest.fixture
def adapter(team: Team, alice: User) -> Adapter:
    return make_adapter(team, alice)


def call(user: User, team: Team, method: str, path: str, body: Any = None, scopes: tuple[str, ...] = ("read",)) -> Any:
    _, secret = ApiToken.issue(team=team, user=user, name="test", scopes=list(scopes))
    return Client().generic(
        method,
        f"/api/v1/{path}",
        data=b"" if body is None else json.dumps(body),
        content_type="application/json",
        headers={"authorization": f"Bearer {secret}"},
    )


def paths_of(adapter: Adapter) -> list[str]:
    return [f"adapters/{adapter.pk}/{part}" for part in ("", "scores/", "samples/", "download/")]


def test_a_teammate_reads_adapter_scores_samples_and_files(adapter: Adapter, team: Team, bob: User) -> None:
    for path in paths_of(adapter):
        assert call(bob, team, "GET", path).status_code == 200, path
    one = call(bob, team, "GET", f"adapters/{adapter.pk}/").json()
    assert one["scores"][0]["is_better"] is True
    assert one["recipe"] == adapter.recipe
    assert one["files"] == adapter.files


def test_it_hides_an_adapter_from_another_team(adapter: Adapter, other_team: Team, charlie: User) -> None:
    for path in paths_of(adapter):
        assert call(charlie, other_team, "GET", path).status_code == 404, path
    assert call(charlie, other_team, "GET", "adapters/").json()["items"] == []


def test_without_a_token_there_is_nothing(adapter: Adapter, alice_client: Client) -> None:
    for path in paths_of(adapter):
        assert alice_client.get(f"/api/v1/{path}").status_code == 401, path


def test_the_list_is_filtered(adapter: Adapter, team: Team, alice: User) -> None:
    other = make_base_model("Other", family="qwen2")
    second = make_adapter(
        team, alice, base_model=other, dataset_version=make_dataset_version(team, alice, name="Plants")
    )
    found = call(alice, team, "GET", f"adapters/?base_model_id={other.pk}").json()["items"]
    assert [one["id"] for one in found] == [second.pk]
    assert len(call(alice, team, "GET", "adapters/?method=lora").json()["items"]) == 2


def test_a_download_is_a_whole_zip_and_an_audit_event_with_the_token(adapter: Adapter, team: Team, bob: User) -> None:
    response = call(bob, team, "GET", f"adapters/{adapter.pk}/download/")
    with zipfile.ZipFile(io.BytesIO(b"".join(response))) as archive:
        assert archive.testzip() is None
    event = AuditEvent.objects.get(action="adapter.downloaded")
    assert (event.user, event.token.name if event.token else None) == (bob, "test")


def test_only_an_admin_with_the_write_scope_registers_a_base_model(
    data_dir: Path, team: Team, alice: User, bob: User
) -> None:
    make_tiny_base(data_dir / "base_models" / "mine")
    body = {"folder": "mine", "name": "Mine"}
    assert call(bob, team, "POST", "base-models/", body, ("read", "write")).status_code == 403
    assert call(alice, team, "POST", "base-models/", body, ("read",)).status_code == 403
    assert not BaseModel.objects.exists()
    made = call(alice, team, "POST", "base-models/", body, ("read", "write"))
    assert made.status_code == 201
    assert call(bob, team, "GET", f"base-models/{made.json()['id']}/").json()["name"] == "Mine"


def test_a_folder_outside_the_roots_is_an_error_at_its_field(team: Team, alice: User) -> None:
    answer = call(alice, team, "POST", "base-models/", {"folder": "/etc", "name": "X"}, ("write",))
    assert answer.status_code == 422
    assert answer.json()["error"]["field"] == "folder"


def test_nul_characters_are_refused_by_field(adapter: Adapter, team: Team, alice: User) -> None:
    filtered = call(alice, team, "GET", "adapters/?method=%00")
    body = {"folder": "/a\0b", "name": "tiny"}
    registered = call(alice, team, "POST", "base-models/", body, scopes=("read", "write"))
    for answer, field in ((filtered, "method"), (registered, "folder")):
        assert answer.status_code == 422, answer.text
        assert answer.json()["error"]["field"] == field
        assert "NUL" in answer.json()["error"]["message"]

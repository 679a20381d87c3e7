"""The REST endpoints of datasets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from django.core.files.uploadedfile import SimpleUploadedFile
from django.test import Client

from studio.accounts.models import ApiToken, Team, User
from tests.studio.datasets.conftest import Upload, good_rows, jsonl


def caller(team: Team, user: User, *scopes: str) -> Client:
    secret = ApiToken.issue(team=team, user=user, name="t", scopes=list(scopes))[1]
    return Client(headers={"authorization": f"Bearer {secret}"})


@pytest.fixture
def api(team: Team, bob: User) -> Client:
    return caller(team, bob, "read", "write")


def test_it_uploads_lists_and_shows(api: Client, data_dir: Path) -> None:
    file = SimpleUploadedFile("faq.jsonl", jsonl(good_rows()))
    made = api.post("/api/v1/datasets/", {"file": file, "name": "FAQ"})
    assert made.status_code == 201, made.content
    assert made.json()["state"] == "inspecting"
    dataset_id = made.json()["dataset_id"]
    listed = api.get("/api/v1/datasets/").json()
    assert [(one["id"], one["name"]) for one in listed["items"]] == [(dataset_id, "FAQ")]
    again = api.post("/api/v1/datasets/", {"file": SimpleUploadedFile("b.jsonl", jsonl(good_rows()))})
    assert (again.status_code, again.json()["already_stored"]) == (200, True)
    more = api.post(
        f"/api/v1/datasets/{dataset_id}/versions/", {"file": SimpleUploadedFile("c.jsonl", jsonl(good_rows(20)))}
    )
    assert (more.status_code, more.json()["number"]) == (201, 2)


def test_a_refusal_has_code_message_and_help(api: Client, data_dir: Path) -> None:
    answer = api.post("/api/v1/datasets/", {"file": SimpleUploadedFile("faq.jsonl", b"\x89PNG\r\n\x1a\n123")})
    assert answer.status_code == 422
    assert answer.json()["error"]["code"] == "wrong_type"
    assert "PNG" in answer.json()["error"]["message"]


def test_problems_preview_and_mapping(api: Client, upload: Upload) -> None:
    version = upload(jsonl([*good_rows(), {"prompt": "x"}]))
    base = f"/api/v1/datasets/{version.dataset_id}/versions/1/"
    assert api.get(base).json()["num_quarantined"] == 1
    problems = api.get(base + "problems/").json()
    assert [(one["line"], one["rule"]) for one in problems["items"]] == [(13, "C102")]
    assert api.get(base + "preview/").json()[0]["messages"][0]["role"] == "user"
    put: Any = {"content_type": "application/json"}
    bad = api.put(base + "mapping/", {"columns": {"prompt": "nope", "completion": "completion"}}, **put)
    assert (bad.status_code, bad.json()["error"]["code"]) == (422, "unknown_column")
    good = api.put(base + "mapping/", {"columns": {"prompt": "completion", "completion": "prompt"}}, **put)
    assert (good.status_code, good.json()["state"]) == (202, "inspecting")


def test_another_team_and_a_reading_token_are_refused(
    upload: Upload, team: Team, bob: User, other_team: Team, charlie: User
) -> None:
    version = upload(jsonl(good_rows()))
    outsider = caller(other_team, charlie, "read", "write")
    base = f"/api/v1/datasets/{version.dataset_id}/"
    for path in (base, base + "versions/1/", base + "versions/1/problems/", base + "versions/1/preview/"):
        assert outsider.get(path).status_code == 404
    assert outsider.delete(base).status_code == 404
    assert outsider.get("/api/v1/datasets/").json()["items"] == []
    assert caller(team, bob, "read").delete(base).status_code == 403
    assert Client().get(base).status_code == 401
    assert caller(team, bob, "read", "write").delete(base).status_code == 204


def test_nul_characters_in_a_filter_or_a_mapping_are_refused_by_field(api: Client, upload: Upload) -> None:
    version = upload(jsonl(good_rows()))
    base = f"/api/v1/datasets/{version.dataset_id}/versions/1/"
    mapped = {"columns": {"prompt": "a\0", "completion": "b"}}
    for answer, field in (
        (api.get("/api/v1/datasets/?name=%00"), "name"),
        (api.get(base + "problems/?rule=%00"), "rule"),
        (api.put(base + "mapping/", mapped, content_type="application/json"), "columns.prompt"),
    ):
        assert answer.status_code == 422, answer.content
        assert answer.json()["error"]["field"] == field
        assert "NUL" in answer.json()["error"]["message"]

"""Rows that are pasted go the way of a file."""

from __future__ import annotations

from pathlib import Path

import pytest
from django.test import Client

from studio.accounts.models import ApiToken, Role, Team, User
from studio.datasets import inspecting
from studio.datasets.models import DatasetVersion
from tests.conftest import make_member, signed_in
from tests.studio.datasets.conftest import good_rows, jsonl

ROWS = jsonl(good_rows()).decode()


@pytest.mark.parametrize(
    ("text", "file_name", "num_usable"),
    [
        (ROWS, "pasted rows.jsonl", 12),
        ("\n " + ROWS.replace("\n", "\r\n"), "pasted rows.jsonl", 12),
        (f"[{ROWS.strip().replace(chr(10), ',')}]", "pasted rows.json", 12),
        ("prompt,completion\n" + "Why?,Because.\n" * 11, "pasted rows.csv", 11),
        ("prompt\tcompletion\r\n" + "Why?\tBecause.\r\n" * 11, "pasted rows.tsv", 11),
    ],
)
def test_pasted_rows_become_a_dataset(
    bob_client: Client, data_dir: Path, text: str, file_name: str, num_usable: int
) -> None:
    answer = bob_client.post("/datasets/upload/paste/", {"rows": text, "name": "FAQ", "licence": "mit"})
    version = DatasetVersion.objects.get()
    assert answer["Location"] == version.get_absolute_url()
    assert (version.file_name, version.dataset.name, version.dataset.licence) == (file_name, "FAQ", "mit")
    inspecting.inspect(version.pk)
    version.refresh_from_db()
    assert version.num_usable == num_usable


def test_the_same_rows_are_stored_once_however_their_lines_end(bob_client: Client, data_dir: Path) -> None:
    bob_client.post("/datasets/upload/paste/", {"rows": ROWS})
    again = bob_client.post("/datasets/upload/paste/", {"rows": ROWS.replace("\n", "\r\n")}, follow=True)
    assert "stored already" in again.content.decode()
    assert DatasetVersion.objects.get().dataset.name == "pasted rows"


def test_what_cannot_be_read_comes_back_with_the_sentence_and_the_text(bob_client: Client, data_dir: Path) -> None:
    answer = bob_client.post("/datasets/upload/paste/", {"rows": "prompt,completion\n", "name": "mine"})
    page = answer.content.decode()
    assert answer.status_code == 422
    assert "prompt,completion" in page
    assert 'value="mine"' in page
    assert bob_client.post("/datasets/upload/paste/", {"rows": "  "}).status_code == 422
    assert bob_client.post("/datasets/upload/paste/", {"rows": "a\0b"}).status_code == 422
    assert not DatasetVersion.objects.exists()


def test_rows_can_be_the_next_version_and_only_of_the_teams_own(
    bob_client: Client, charlie_client: Client, team: Team, bob: User, data_dir: Path
) -> None:
    bob_client.post("/datasets/upload/paste/", {"rows": ROWS})
    dataset = DatasetVersion.objects.get().dataset
    more = {"rows": jsonl(good_rows(20)).decode(), "dataset": dataset.pk}
    assert charlie_client.post("/datasets/upload/paste/", more).status_code == 404
    viewer = signed_in(make_member("victor", team, Role.VIEWER))
    assert viewer.post("/datasets/upload/paste/", more).status_code == 403
    assert bob_client.post("/datasets/upload/paste/", more).status_code == 302
    assert dataset.versions.count() == 2
    assert f'value="{dataset.pk}"' in bob_client.get(f"/datasets/upload/paste/?dataset={dataset.pk}").content.decode()


def test_the_api_takes_rows_as_text(team: Team, bob: User, data_dir: Path) -> None:
    secret = ApiToken.issue(team=team, user=bob, name="t", scopes=["read", "write"])[1]
    api = Client(headers={"authorization": f"Bearer {secret}"})

    def post(body: object) -> tuple[int, dict[str, object]]:
        answer = api.post("/api/v1/datasets/rows/", body, content_type="application/json")
        return answer.status_code, answer.json()

    status, made = post({"rows": ROWS, "name": "FAQ"})
    assert (status, made["file_name"]) == (201, "pasted rows.jsonl")
    assert post({"rows": ROWS})[0] == 200
    status, second = post({"rows": ROWS + ROWS, "dataset_id": made["dataset_id"]})
    assert (status, second["number"]) == (201, 2)
    assert post({"rows": ROWS * 3, "dataset_id": 10**6})[0] == 404
    assert post({"rows": ROWS * 3, "licence": "no such"})[0] == 422
    assert post({"rows": ""})[0] == 422

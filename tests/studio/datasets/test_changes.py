"""What a version changed, on its page and over the API."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from celery import Celery
from django.test import Client

from studio.accounts.models import ApiToken, Team, User
from studio.datasets import changes
from studio.datasets.changes import find_changes
from studio.datasets.models import DatasetVersion
from tests.studio.datasets.conftest import Upload, good_rows, jsonl


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    sent: list[int] = []
    silent = Celery(set_as_current=False)
    monkeypatch.setattr(silent, "send_task", lambda name, arguments, **_: sent.append(arguments[0]))
    monkeypatch.setattr(changes, "current_app", silent)
    return sent


@pytest.fixture
def second(upload: Upload) -> DatasetVersion:
    first = upload(jsonl(good_rows(12)))
    rows = good_rows(14)
    rows[2]["completion"] = "edited"
    return upload(jsonl(rows), dataset=first.dataset)


def test_the_page_asks_a_worker_once_and_then_shows_what_changed(
    second: DatasetVersion, bob_client: Client, asked: list[int],
    django_assert_max_num_queries: Callable[..., Any],
) -> None:  # fmt: skip
    page = f"{second.get_absolute_url()}changes/"
    assert page in bob_client.get(second.get_absolute_url()).content.decode()
    assert "A worker compares" in bob_client.get(page).content.decode()
    bob_client.get(page, headers={"HX-Request": "true"})
    assert asked == [second.pk]
    find_changes(second.pk)
    with django_assert_max_num_queries(8):
        shown = " ".join(bob_client.get(page).content.decode().split())
    assert "Against v1" in shown
    for name, value in (("Added", 2), ("Removed", 0), ("Edited", 1), ("Unchanged", 11)):
        assert f'{name}</dt><dd class="text-xl font-semibold tabular-nums">{value}<' in shown
    assert f'href="{second.get_absolute_url()}rows/3/"' in shown
    assert asked == [second.pk]


def test_a_lost_message_is_sent_again_when_somebody_looks(
    second: DatasetVersion, bob_client: Client, asked: list[int]
) -> None:
    DatasetVersion.objects.filter(pk=second.pk).update(changes={"state": "waiting", "since": 1})
    bob_client.get(f"{second.get_absolute_url()}changes/")
    assert asked == [second.pk]


def test_a_first_version_has_none(second: DatasetVersion, bob_client: Client, asked: list[int]) -> None:
    first = second.dataset.versions.get(number=1)
    assert "first version" in bob_client.get(f"{first.get_absolute_url()}changes/").content.decode()
    find_changes(first.pk)
    assert asked == []


def test_the_api_tells_the_same_and_another_team_nothing(
    second: DatasetVersion, team: Team, bob: User, other_team: Team, charlie: User, charlie_client: Client
) -> None:
    def api(of_team: Team, user: User) -> Client:
        secret = ApiToken.issue(team=of_team, user=user, name="t", scopes=["read"])[1]
        return Client(headers={"authorization": f"Bearer {secret}"})

    address = f"/api/v1/datasets/{second.dataset_id}/versions/2/changes/"
    assert api(team, bob).get(address).json()["state"] == "waiting"
    find_changes(second.pk)
    found = api(team, bob).get(address).json()
    assert (found["state"], found["against"], found["num_added"], found["edited"]) == ("done", 1, 2, [3])
    assert api(team, bob).get(address.replace("/2/", "/1/")).json()["state"] == "first"
    assert api(other_team, charlie).get(address).status_code == 404
    assert charlie_client.get(f"{second.get_absolute_url()}changes/").status_code == 404


def test_a_comparison_that_needs_too_much_is_said_so(
    second: DatasetVersion, bob_client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(changes, "MAX_SECONDS", 0.01)
    find_changes(second.pk)
    page = bob_client.get(f"{second.get_absolute_url()}changes/").content.decode()
    assert "more memory or time" in page

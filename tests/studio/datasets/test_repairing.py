"""A corrected version in one click: a new version with its changes shown, the old one untouched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from django.test import Client

from studio.accounts.models import AuditEvent, Membership, Role, Team, User
from studio.datasets import inspecting, repairing
from studio.datasets.models import DatasetVersion
from tests.studio.datasets.conftest import Upload, good_rows, jsonl
from tests.studio.datasets.test_api import caller

ROWS = [*good_rows(12), {"prompt": " spaced ", "completion": "<b>caf\u00c3\u00a9</b>"}, good_rows(12)[3]]
CONTENT = jsonl(ROWS) + b"{'prompt': 'a', 'completion': 'b'}\n" + b'{"prompt": "cut\n'


def corrected(version: DatasetVersion, user: User, capture: Any) -> DatasetVersion:
    """The corrected version, inspected."""
    with capture(execute=True):
        repairing.repair(version.pk, user.pk)
    made = DatasetVersion.objects.order_by("-pk")[0]
    inspecting.inspect(made.pk)
    made.refresh_from_db()
    return made


def test_one_click_makes_a_new_version_and_shows_every_change(
    upload: Upload, bob: User, bob_client: Client, no_broker: list[int], django_capture_on_commit_callbacks: Any
) -> None:
    version = upload(CONTENT)
    before = version.path().read_bytes()
    page = bob_client.get(f"{version.get_absolute_url()}problems/").content.decode()
    assert "Make a corrected version" in page
    with django_capture_on_commit_callbacks(execute=True):
        answer = bob_client.post(f"{version.get_absolute_url()}repair/", follow=True)
    assert "is being made" in answer.content.decode()
    assert no_broker[-1] == version.pk
    made = corrected(version, bob, django_capture_on_commit_callbacks)
    assert (made.dataset_id, made.number, made.state) == (version.dataset_id, 2, "ready")
    # Twelve good rows, the spaced one and the one in Python's quotes; the row that is cut off is still there.
    assert (made.num_usable, made.num_quarantined) == (14, 1)
    assert made.problem_counts == {"F002": 1}
    assert version.path().read_bytes() == before
    assert made.correction["num_changed"] == 3
    assert made.correction["num_repeated"] == 1
    shown = bob_client.get(f"{made.get_absolute_url()}corrections/").content.decode()
    assert "Line 13" in shown
    assert "&lt;b&gt;café&lt;/b&gt;" in shown
    assert "<b>caf" not in shown
    assert "left out: the same row is there already" in shown
    version.refresh_from_db()
    assert version.correction == {"state": "done", "dataset": version.dataset_id, "number": 2}
    assert set(AuditEvent.objects.values_list("action", flat=True)) >= {"dataset.repair_asked", "dataset.repaired"}


def test_asking_twice_makes_one_version(upload: Upload, alice: User, django_capture_on_commit_callbacks: Any) -> None:
    version = upload(CONTENT)
    corrected(version, alice, django_capture_on_commit_callbacks)
    corrected(version, alice, django_capture_on_commit_callbacks)
    assert version.dataset.versions.count() == 2


def test_other_teams_see_nothing_and_viewers_cannot_ask(
    upload: Upload, bob_client: Client, charlie_client: Client, alice: User, django_capture_on_commit_callbacks: Any
) -> None:
    version = upload(CONTENT)
    made = corrected(version, alice, django_capture_on_commit_callbacks)
    assert charlie_client.post(f"{version.get_absolute_url()}repair/").status_code == 404
    assert charlie_client.get(f"{made.get_absolute_url()}corrections/").status_code == 404
    assert bob_client.get(f"{version.get_absolute_url()}corrections/").status_code == 404
    Membership.objects.filter(user__username="bob").update(role=Role.VIEWER)
    assert bob_client.post(f"{version.get_absolute_url()}repair/").status_code == 403
    assert "Make a corrected version" not in bob_client.get(f"{version.get_absolute_url()}problems/").content.decode()
    assert bob_client.get(f"{made.get_absolute_url()}corrections/").status_code == 200


def test_the_api_asks_the_same_and_refuses_with_the_reason(upload: Upload, team: Team, bob: User) -> None:
    api, reader = caller(team, bob, "read", "write"), caller(team, bob, "read")
    version, clean = upload(CONTENT), upload(jsonl(good_rows(11)))
    url = f"/api/v1/datasets/{version.dataset_id}/versions/1/repair/"
    assert reader.post(url).status_code == 403
    asked = api.post(url)
    assert (asked.status_code, asked.json()["correction"]["state"]) == (202, "queued")
    assert api.post(url).json()["error"]["code"] == "nothing_to_repair"
    refused = api.post(f"/api/v1/datasets/{clean.dataset_id}/versions/1/repair/")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "nothing_to_repair")


def test_what_keeps_a_corrected_version_from_being_made_is_said(
    upload: Upload, bob: User, bob_client: Client, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = upload(CONTENT)
    run = inspecting.run_child
    monkeypatch.setattr(
        inspecting, "run_child",
        lambda module, arguments, seconds: run(module, [*arguments, "--memory-bytes", "1000"], seconds=seconds),
    )  # fmt: skip
    repairing.repair(version.pk, bob.pk)
    version.refresh_from_db()
    assert version.correction["state"] == "failed"
    page = bob_client.get(f"{version.get_absolute_url()}problems/").content.decode()
    assert "It could not be made" in page
    assert "Make a corrected version" in page

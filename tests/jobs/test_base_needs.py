"""What a base model needs on the devices that there are: page, fragment and API, for every team alike."""

from __future__ import annotations

from datetime import timedelta

import pytest
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from jobs.base_needs import known_devices
from jobs.models import Worker
from studio.accounts.models import ApiToken, Team, User
from tests.factories import make_base_model

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("data_dir")]


def make_worker(slot: int, device: str, gibibytes: float, **changes: object) -> Worker:
    values = {
        "host": "gpu", "slot": slot, "process_id": 1, "device": device, "device_kind": "cuda", "version": "1",
        "memory_bytes": int(gibibytes * 2**30), "last_seen": timezone.now() + timedelta(hours=1),
    }  # fmt: skip
    return Worker.objects.create(**(values | changes))


def test_devices_of_a_kind_are_told_of_once_the_largest_first_and_without_workers_this_machine_is() -> None:
    assert [(facts.kind, num) for facts, num in known_devices()] == [("cpu", 0)]
    gone = make_worker(9, "NVIDIA T4", 15, last_seen=timezone.now() - timedelta(days=9))
    assert [(facts.name, num) for facts, num in known_devices()] == [(gone.device, 0)]
    make_worker(0, "NVIDIA L4", 22.17)
    make_worker(1, "NVIDIA L4", 22.19)
    make_worker(2, "NVIDIA H200", 139.8)
    assert [(facts.name, num) for facts, num in known_devices()] == [("NVIDIA H200", 1), ("NVIDIA L4", 2)]


def test_page_fragment_and_api_say_the_same(team: Team, alice: User, alice_client: Client) -> None:
    base = make_base_model()
    make_worker(0, "NVIDIA L4", 22)
    assert f'hx-get="/jobs/needs/{base.pk}/"' in alice_client.get(base.get_absolute_url()).text
    with CaptureQueriesContext(connection) as caught:
        page = alice_client.get(f"/jobs/needs/{base.pk}/")
    assert page.status_code == 200
    assert len(caught) <= 8
    assert "<h1" in page.text
    fragment = alice_client.get(f"/jobs/needs/{base.pk}/", headers={"HX-Request": "true"}).text
    assert fragment.strip().startswith('<div id="base-needs"')
    _, secret = ApiToken.issue(team=team, user=alice, name="x", scopes=["read"])
    told = Client(headers={"authorization": f"Bearer {secret}"}).get(f"/api/v1/base-models/{base.pk}/needs/").json()
    assert [(one["device"], one["num_live"]) for one in told] == [("NVIDIA L4", 1)]
    lora = next(one for one in told[0]["methods"] if one["name"] == "lora")
    assert [need["verdict"] for need in lora["needs"]] == ["fits"] * len(lora["needs"])
    for text in (page.text, fragment):
        assert "NVIDIA L4, 22.0 GiB" in text
        assert f"{lora['needs'][0]['num_bytes'] / 2**30:.2f} GiB" in text


def test_who_is_not_signed_in_and_who_asks_for_no_base_gets_nothing(client: Client, charlie_client: Client) -> None:
    base = make_base_model()
    assert client.get(f"/jobs/needs/{base.pk}/").status_code == 302
    assert charlie_client.get("/jobs/needs/999999/").status_code == 404
    assert client.get(f"/api/v1/base-models/{base.pk}/needs/").status_code == 401

"""The curves of several adapters' jobs: in one answer for a chart, as tables, and for their team alone."""

from __future__ import annotations

from typing import Any

import pytest
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from jobs.curves import MAX_POINTS, MAX_ROWS
from jobs.models import Job, MetricPoint
from studio.accounts.models import Team, User
from tests.factories import make_adapter, make_base_model, make_dataset_version, make_job_for

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("data_dir")]


@pytest.fixture
def make(team: Team, alice: User) -> Any:
    base, version = make_base_model(), make_dataset_version(team, alice)

    def make(name: str, losses: dict[int, tuple[float | None, float | None]]) -> Job:
        adapter = make_adapter(team, alice, name=name, base_model=base, dataset_version=version)
        job: Job = make_job_for(adapter)
        MetricPoint.objects.bulk_create(
            MetricPoint(job=job, attempt=1, step=step, loss=loss, validation_loss=validation, at=timezone.now())
            for step, (loss, validation) in losses.items()
        )
        return job

    return make


def test_the_chart_gets_every_curve_in_the_order_asked_for_and_a_later_attempt_counts(
    make: Any, alice_client: Client
) -> None:
    first = make("first", {1: (2.0, None), 2: (1.5, 1.6), 3: (1.2, None)})
    second = make("second", {1: (3.0, None)})
    MetricPoint.objects.create(job=first, attempt=2, step=3, loss=1.1, validation_loss=1.4, at=timezone.now())
    with CaptureQueriesContext(connection) as caught:
        answer = alice_client.get(f"/jobs/curves.json?adapters={second.adapter_id},{first.adapter_id}")
    assert len(caught) <= 8
    assert answer.json() == {
        "curves": [
            {"label": "second v1", "points": [[1, 3.0, None]]},
            {"label": "first v1", "points": [[1, 2.0, None], [2, 1.5, 1.6], [3, 1.1, 1.4]]},
        ]
    }


def test_a_long_curve_is_thinned_and_keeps_its_validations(make: Any, alice_client: Client) -> None:
    job = make("long", {step: (2.0 - step / 2000, 1.0 if step % 500 == 0 else None) for step in range(1, 2001)})
    [curve] = alice_client.get(f"/jobs/curves.json?adapters={job.adapter_id}").json()["curves"]
    assert len(curve["points"]) <= MAX_POINTS + 4
    assert [point[0] for point in curve["points"] if point[2] is not None] == [500, 1000, 1500, 2000]


def test_the_tables_say_the_same_without_a_chart(make: Any, alice_client: Client) -> None:
    one = make("one", {step: (2.0 / step, 1.0 / step) for step in range(1, 2 * MAX_ROWS + 1)})
    two = make("two", {1: (3.25, None), 9: (2.75, 2.875)})
    page = alice_client.get(f"/jobs/curves/?adapters={one.adapter_id},{two.adapter_id}")
    text = " ".join(page.text.split())
    assert "3.25" in text
    assert "2.875 <span" in text
    assert "at step 9</span>" in text
    assert f"at step {2 * MAX_ROWS}</span>" in text
    rows = page.context["rows"]
    assert len(rows) == MAX_ROWS
    assert (rows[0][0], rows[-1][0]) == (1, 2 * MAX_ROWS)
    compare = alice_client.get(f"/models/compare/?runs={one.adapter_id},{two.adapter_id}").text
    assert f'data-curves="/jobs/curves.json?adapters={one.adapter_id},{two.adapter_id}"' in compare
    assert f'href="/jobs/curves/?adapters={one.adapter_id},{two.adapter_id}"' in compare


def test_another_team_gets_no_curve_and_nonsense_is_nothing(
    make: Any, alice_client: Client, charlie_client: Client, client: Client
) -> None:
    job = make("secret", {1: (2.0, None)})
    assert charlie_client.get(f"/jobs/curves.json?adapters={job.adapter_id}").json() == {"curves": []}
    assert "secret" not in charlie_client.get(f"/jobs/curves/?adapters={job.adapter_id}").text
    assert client.get(f"/jobs/curves.json?adapters={job.adapter_id}").status_code == 302
    for text in ("", "x,,9999999999,-1", "1" * 900, "0"):
        assert alice_client.get("/jobs/curves.json", {"adapters": text}).json() == {"curves": []}
        assert alice_client.get("/jobs/curves/", {"adapters": text}).status_code == 200

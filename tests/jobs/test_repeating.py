"""Running a job again exactly: what is queued, and what is refused with the reason."""

from __future__ import annotations

from typing import Any

import pytest
from django.test import Client
from django.urls import reverse

from jobs.models import Job
from studio.accounts.models import ApiToken, AuditEvent, Role, Team, User
from studio.catalogue.models import Adapter, BaseModel
from studio.datasets.models import DatasetVersion, VersionState
from studio.storage import blob_path
from tests.conftest import make_member, signed_in
from tests.factories import make_adapter, make_job_for, make_result, make_score

pytestmark = [pytest.mark.usefixtures("data_dir"), pytest.mark.django_db]


@pytest.fixture
def job(team: Team, alice: User) -> Job:
    adapter = make_adapter(team, alice, training={"learning_rate": 2e-4})
    asked = {**adapter.recipe, "training": {**adapter.recipe["training"], "learning_rate": "auto"}}
    return make_job_for(adapter, asked_recipe=asked)


def repeat(client: Client, job: Job) -> Any:
    return client.post(reverse("jobs:run_exactly", args=[job.pk]), {"idempotency_key": "once"}, follow=True)


def test_the_very_recipe_is_queued_with_what_auto_had_come_to(job: Job, bob: User, bob_client: Client) -> None:
    answers = [repeat(bob_client, job), repeat(bob_client, job)]
    again = Job.objects.exclude(pk=job.pk).get()
    assert {answer.redirect_chain[-1][0] for answer in answers} == {again.get_absolute_url()}
    assert again.recipe == again.asked_recipe == job.recipe
    assert (again.base_model, again.dataset_version, again.parent) == (job.base_model, job.dataset_version, job)
    assert "Run again exactly by bob" in again.events.get().text
    event = AuditEvent.objects.get(action="job.queued")
    assert (event.user, event.details["parent"]) == (bob, str(job.pk))


def changed_base(job: Job) -> None:
    BaseModel.objects.filter(pk=job.base_model_id).update(revision="f" * 64)


def changed_dataset(job: Job) -> None:
    DatasetVersion.objects.filter(pk=job.dataset_version_id).update(sha256="e" * 64)


def removed_dataset(job: Job) -> None:
    blob_path(job.dataset_version.sha256).unlink()


def unreadable_dataset(job: Job) -> None:
    DatasetVersion.objects.filter(pk=job.dataset_version_id).update(state=VersionState.UNREADABLE)


def stopped_by_a_person(job: Job) -> None:
    Adapter.objects.filter(pk=job.adapter_id).update(stopped_at_step=30)


def method_removed(job: Job) -> None:
    Job.objects.filter(pk=job.pk).update(recipe={**job.recipe, "method": "gone"})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (changed_base, "The base model Tiny has changed"),
        (changed_dataset, "has other contents than the adapter was trained on"),
        (removed_dataset, "was removed from the studio"),
        (unreadable_dataset, "is not ready"),
        (stopped_by_a_person, "at step 30"),
        (method_removed, "gone"),
    ],
)
def test_what_cannot_be_the_same_is_refused_with_the_reason(
    change: Any, reason: str, job: Job, bob_client: Client
) -> None:
    change(job)
    answer = repeat(bob_client, job)
    assert reason in answer.content.decode()
    assert answer.redirect_chain[-1][0].startswith(job.adapter.get_absolute_url())
    assert Job.objects.count() == 1


def test_only_trainers_of_the_team_may(job: Job, team: Team, charlie_client: Client) -> None:
    viewer = signed_in(make_member("vera", team, Role.VIEWER))
    url = reverse("jobs:run_exactly", args=[job.pk])
    assert viewer.post(url).status_code == 403
    assert url not in viewer.get(job.adapter.get_absolute_url()).content.decode()
    assert charlie_client.post(url).status_code == 404
    assert Job.objects.count() == 1


def test_the_api_runs_again_and_refuses_alike(job: Job, team: Team, bob: User) -> None:
    _, secret = ApiToken.issue(team=team, user=bob, name="x", scopes=["read", "write"])
    client = Client(headers={"Authorization": f"Bearer {secret}"})
    answer = client.post(f"/api/v1/jobs/{job.pk}/again-exactly/")
    assert answer.status_code == 201, answer.content
    assert Job.objects.get(pk=answer.json()["id"]).parent == job
    changed_base(job)
    refused = client.post(f"/api/v1/jobs/{job.pk}/again-exactly/")
    assert (refused.status_code, refused.json()["error"]["code"]) == (422, "not_repeatable")


@pytest.fixture
def other_job(team: Team, alice: User) -> Job:
    result = make_result([make_score(-0.2)])
    adapter = make_adapter(team, alice, name="=other", result=result, settings={"rank": 8})
    return make_job_for(adapter)


def diff(client: Client, a: Job, b: Job, **query: str) -> Any:
    return client.get(reverse("jobs:diff"), {"a": str(a.pk), "b": str(b.pk), **query})


def test_two_jobs_differ_in_what_is_shown_and_in_nothing_else(job: Job, other_job: Job, bob_client: Client) -> None:
    answer = diff(bob_client, job, other_job)
    found = {(row.section, row.label): (row.a, row.b) for part in answer.context["sections"] for row in part.rows}
    assert found["Method", "Rank"] == ("16", "8")
    assert found["Training", "Learning rate"] == ("0.0002 (chosen by the studio)", "auto")
    assert found["Scores on held-out rows", "Held-out loss"][0].startswith("1.32 [1.27, 1.37], n = 100")
    assert ("Training", "Batch size") not in found
    assert ("Versions", "torch") not in found
    everything = diff(bob_client, job, other_job, all="1")
    rows = [row for part in everything.context["sections"] for row in part.rows]
    assert {(row.section, row.label) for row in rows} > set(found)
    assert {(row.section, row.label) for row in rows if row.is_different} == set(found)


def test_the_diff_comes_as_csv_that_no_spreadsheet_runs(job: Job, other_job: Job, bob_client: Client) -> None:
    answer = diff(bob_client, job, other_job, format="csv")
    assert answer["Content-Type"].startswith("text/csv")
    head, *lines = b"".join(answer.streaming_content).decode().splitlines()
    assert head == f"section,setting,support {job.pk},'=other {other_job.pk}"
    assert "Method,Rank,16,8" in lines
    assert not any(line.startswith("Versions,") for line in lines)


def test_another_teams_job_is_in_no_diff(job: Job, other_job: Job, charlie_client: Client, bob_client: Client) -> None:
    assert diff(charlie_client, job, other_job).status_code == 404
    assert charlie_client.get(reverse("jobs:diff"), {"a": str(job.pk)}).status_code == 404
    assert "support" not in charlie_client.get(reverse("jobs:diff")).content.decode().split("<main", 1)[1]
    for nonsense in ("x", "\0", "9" * 500):
        assert bob_client.get(reverse("jobs:diff"), {"a": nonsense}).status_code == 404


def test_a_job_offers_its_diff(job: Job, bob_client: Client) -> None:
    for page in (job.get_absolute_url(), job.adapter.get_absolute_url()):
        assert f"{reverse('jobs:diff')}?a={job.pk}" in bob_client.get(page).content.decode()
    alone = bob_client.get(reverse("jobs:diff"), {"a": str(job.pk)})
    assert alone.status_code == 200
    assert f'value="{job.pk}" selected' in alone.content.decode()


def test_the_api_tells_the_differences(job: Job, other_job: Job, team: Team, bob: User) -> None:
    _, secret = ApiToken.issue(team=team, user=bob, name="x", scopes=["read"])
    client = Client(headers={"Authorization": f"Bearer {secret}"})
    rows = client.get("/api/v1/jobs/diff/", {"a": str(job.pk), "b": str(other_job.pk)}).json()
    assert {"section": "Method", "label": "Rank", "a": "16", "b": "8", "is_different": True} in rows
    assert all(row["is_different"] for row in rows)

from __future__ import annotations

from typing import Any

import pytest
from django.test import Client
from django.utils import timezone

from jobs.models import Job, JobState, MetricPoint, Worker
from studio.accounts.models import ApiToken, AuditEvent, Team, User
from studio.catalogue.models import BaseModel
from studio.datasets.models import DatasetVersion
from studio.reviews.policies import PolicySettings, ScanLimit, change_policy, current_policy
from tests.factories import make_dataset_version
from tests.jobs.conftest import MakeJob
from tests.tiny import colour_rows
from tests.workers.test_resolving import SEVEN_B
from workers.methods import methods


def caller(team: Team, user: User, *scopes: str) -> Client:
    _token, secret = ApiToken.issue(team=team, user=user, name="ci", scopes=list(scopes))
    return Client(headers={"authorization": f"Bearer {secret}"})


@pytest.fixture
def bob_api(team: Team, bob: User) -> Client:
    return caller(team, bob, "read", "write")


@pytest.fixture
def charlie_api(other_team: Team, charlie: User) -> Client:
    return caller(other_team, charlie, "read", "write")


def post(client: Client, path: str, body: dict[str, Any], **headers: str) -> Any:
    return client.post(f"/api/v1/{path}", body, content_type="application/json", headers=headers)


def job_body(base_model: BaseModel, version: DatasetVersion, **changes: Any) -> dict[str, Any]:
    return {"name": "api-job", "base_model": base_model.pk, "dataset_version": version.pk, **changes}


def test_a_job_is_queued_once_per_key(bob_api: Client, base_model: BaseModel, version: DatasetVersion) -> None:
    body = job_body(base_model, version, settings={"rank": 8}, training={"epochs": 2})
    first = post(bob_api, "jobs/", body, **{"Idempotency-Key": "one"})
    second = post(bob_api, "jobs/", body, **{"Idempotency-Key": "one"})
    assert (first.status_code, second.status_code) == (201, 200), first.text
    assert first.json()["id"] == second.json()["id"] == str(Job.objects.get().pk)
    job = first.json()
    assert job["recipe"]["settings"]["rank"] == 8
    assert job["asked_recipe"]["training"]["learning_rate"] == "auto"
    assert isinstance(job["recipe"]["training"]["learning_rate"], float)
    assert job["state"] == "queued"
    assert job["queue_position"] == 1


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"training": {"epochs": 1e9}}, "training.epochs"),
        ({"settings": {"rank": -1}}, "settings.rank"),
        ({"settings": {"rnak": 8}}, "settings.rnak"),
        ({"method": "lroa"}, "method"),
        ({"base_model": 10**9}, "base_model"),
        ({"dataset_version": 10**9}, "dataset_version"),
        ({"precision": "nf4"}, "precision"),
        ({"name": ""}, "name"),
    ],
)
def test_a_bad_body_is_refused_by_field(
    bob_api: Client, base_model: BaseModel, version: DatasetVersion, changes: dict[str, Any], field: str
) -> None:
    answer = post(bob_api, "jobs/", job_body(base_model, version) | changes)
    assert answer.status_code == 422, answer.text
    assert answer.json()["error"]["field"] == field
    assert not Job.objects.exists()


def test_full_fine_tuning_that_cannot_fit_is_refused_with_what_fits(
    bob_api: Client, base_model: BaseModel, version: DatasetVersion
) -> None:
    Worker.objects.create(
        host="box", slot=0, process_id=1, device="NVIDIA L4", device_kind="cuda", memory_bytes=24 * 2**30,
        version="1", last_seen=timezone.now(),
    )  # fmt: skip
    tiny = post(bob_api, "jobs/", job_body(base_model, version, method="full"))
    assert tiny.status_code == 201, tiny.text
    assert tiny.json()["estimate"]["instead"]["method"] == "lora"
    assert tiny.json()["estimate"]["instead"]["num_trainable"] < tiny.json()["estimate"]["num_trainable"]
    base_model.shape = SEVEN_B.model_dump(mode="json")
    base_model.save()
    answer = post(bob_api, "jobs/", job_body(base_model, version, method="full"))
    assert answer.status_code == 422
    assert answer.json()["error"]["field"] == "method"
    assert "the card has 24.0 GiB. Choose LoRA, which needs about" in answer.json()["error"]["message"]
    assert Job.objects.count() == 1
    assert post(bob_api, "jobs/", job_body(base_model, version, method="lora")).status_code == 201


def test_the_estimate_of_what_must_fit_and_does_not_says_what_would(
    bob_api: Client, bob_client: Client, base_model: BaseModel, version: DatasetVersion, team: Team, alice: User
) -> None:
    Worker.objects.create(
        host="box", slot=0, process_id=1, device="NVIDIA L4", device_kind="cuda", memory_bytes=24 * 2**30,
        version="1", last_seen=timezone.now(),
    )  # fmt: skip
    base_model.shape = SEVEN_B.model_dump(mode="json")
    base_model.save()
    policy = PolicySettings.from_dict(current_policy(team).settings)
    change_policy(team, PolicySettings(policy.approvals, policy.gates, {"secrets": ScanLimit(0)}), by=alice)
    further = make_dataset_version(team, alice, name="Colours", rows=colour_rows(30))
    body = job_body(base_model, version, mix=[{"dataset_version": further.pk}])
    refused = post(bob_api, "jobs/estimate/", body | {"method": "full"})
    assert (refused.status_code, refused.json()["error"]["field"]) == (422, "method")
    words = [one["words"] for one in refused.json()["suggestions"]]
    assert any("LoRA" in one for one in words), words
    for one in refused.json()["suggestions"]:
        fitting = one["recipe"]
        asked = {name: fitting[name] for name in ("method", "settings", "precision", "training", "split", "evaluation")}
        answer = post(bob_api, "jobs/estimate/", body | asked)
        assert (answer.status_code, answer.json()["verdict"]) == (200, "fits"), answer.text
        assert answer.json()["total_bytes"] == one["num_bytes"]
        assert answer.json()["blocked"] == refused.json()["blocked"]
    assert [(one["dataset_version_id"], one["scan"]) for one in refused.json()["blocked"]] == [
        (version.pk, "secrets"), (further.pk, "secrets")
    ]  # fmt: skip
    assert "was never run on these rows" in refused.json()["blocked"][0]["sentence"]
    form = {"base_model": base_model.pk, "dataset_version": version.pk, "method": "full", "name": "x"}
    panel = bob_client.post("/jobs/estimate/", form | {"mix_version": [further.pk], "mix_weight": ["1"]}).text
    for word in words:
        assert f'aria-label="Use {word}"' in panel
    for blocked in ('id="dataset-blocks"', 'id="mix-blocks-0"'):
        assert "was never run on these rows" in panel.split(blocked)[1].split("</div>")[0]
    bad = post(bob_api, "jobs/estimate/", body | {"precision": "nf4"})
    assert (bad.status_code, bad.json().get("suggestions")) == (422, None)


def test_a_dataset_that_is_too_small_is_refused(bob_api: Client, base_model: BaseModel, team: Team, bob: User) -> None:
    small = make_dataset_version(team, bob, num_rows=5)
    answer = post(bob_api, "jobs/", job_body(base_model, small))
    assert answer.status_code == 422
    assert answer.json()["error"]["code"] == "too_small"


def test_another_teams_token_sees_and_changes_nothing(
    charlie_api: Client, make_job: MakeJob, base_model: BaseModel, version: DatasetVersion
) -> None:
    job = make_job()
    for path in ("", "events/", "points/"):
        assert charlie_api.get(f"/api/v1/jobs/{job.pk}/{path}").status_code == 404
    assert post(charlie_api, f"jobs/{job.pk}/cancel/", {}).status_code == 404
    assert post(charlie_api, f"jobs/{job.pk}/retry/", {}).status_code == 404
    assert post(charlie_api, "jobs/", job_body(base_model, version)).status_code == 422
    assert charlie_api.get("/api/v1/jobs/").json()["items"] == []
    assert Job.objects.get().state == JobState.QUEUED


def test_a_read_token_reads_only(
    team: Team, alice: User, make_job: MakeJob, base_model: BaseModel, version: DatasetVersion
) -> None:
    reader = caller(team, alice, "read")
    job = make_job()
    assert reader.get(f"/api/v1/jobs/{job.pk}/").status_code == 200
    assert post(reader, f"jobs/{job.pk}/cancel/", {}).status_code == 403
    assert post(reader, "jobs/", job_body(base_model, version)).status_code == 403
    assert Client().get("/api/v1/jobs/").status_code == 401


def test_lists_events_and_points(bob_api: Client, make_job: MakeJob) -> None:
    job = make_job("one")
    make_job("two", state=JobState.FAILED, finished_at=timezone.now())
    job.events.create(sequence=1, attempt=0, text="Queued.")
    job.events.create(sequence=2, attempt=0, text="Taken.")
    MetricPoint.objects.create(job=job, attempt=1, step=1, loss=2.5, at=timezone.now())
    names = [item["name"] for item in bob_api.get("/api/v1/jobs/", {"state": "queued"}).json()["items"]]
    assert names == ["one"]
    events = bob_api.get(f"/api/v1/jobs/{job.pk}/events/", {"after": 1}).json()["items"]
    assert [event["text"] for event in events] == ["Taken."]
    points = bob_api.get(f"/api/v1/jobs/{job.pk}/points/").json()
    assert points["points"][0][: 2] == [1, 2.5]  # fmt: skip


def test_stopping_and_running_again(bob_api: Client, make_job: MakeJob) -> None:
    job = make_job()
    assert post(bob_api, f"jobs/{job.pk}/cancel/", {"mode": "now"}).json()["state"] == "cancelled"
    assert post(bob_api, f"jobs/{job.pk}/cancel/", {"mode": "later"}).status_code == 422
    again = post(bob_api, f"jobs/{job.pk}/retry/", {})
    assert again.status_code == 201, again.text
    assert again.json()["parent_id"] == str(job.pk)
    assert post(bob_api, f"jobs/{again.json()['id']}/retry/", {}).status_code == 409


def test_keep_queues_a_waiting_job_with_a_checkpoint_to_finish_and_is_refused_without_one(
    bob_api: Client, make_job: MakeJob
) -> None:
    job = make_job(state=JobState.RETRY_WAIT, attempt=1, step=40)
    answer = post(bob_api, f"jobs/{job.pk}/cancel/", {"mode": "keep"})
    assert (answer.status_code, answer.json()["state"]) == (409, "retry_wait")
    assert answer.json()["error"]["code"] == "job_state"
    assert "nothing to keep" in answer.json()["error"]["message"]
    Job.objects.filter(pk=job.pk).update(checkpoint_step=40)
    for _ in range(2):
        kept = post(bob_api, f"jobs/{job.pk}/cancel/", {"mode": "keep"}).json()
        assert (kept["state"], kept["stop_mode"]) == ("queued", "keep")
    assert post(bob_api, f"jobs/{job.pk}/cancel/", {"mode": "now"}).json()["state"] == "cancelled"
    fresh = make_job()
    assert post(bob_api, f"jobs/{fresh.pk}/cancel/", {"mode": "keep"}).status_code == 409
    fresh.refresh_from_db()
    assert fresh.state == JobState.QUEUED


def test_the_audit_log_names_the_token_that_queued_stopped_and_ran_again(
    bob_api: Client, base_model: BaseModel, version: DatasetVersion
) -> None:
    job_id = post(bob_api, "jobs/", job_body(base_model, version)).json()["id"]
    post(bob_api, f"jobs/{job_id}/cancel/", {})
    post(bob_api, f"jobs/{job_id}/retry/", {})
    told = AuditEvent.objects.filter(action__startswith="job.").order_by("pk")
    assert [(event.action, event.token) for event in told] == [
        (action, ApiToken.objects.get()) for action in ("job.queued", "job.stopped", "job.queued")
    ]


def test_methods_come_with_the_schema_of_their_settings(bob_api: Client) -> None:
    found = {one["name"]: one for one in bob_api.get("/api/v1/methods/").json()}
    assert set(found) == set(methods())
    assert found["lora"]["settings"]["properties"]["rank"]["minimum"] == 1
    assert (found["lora"]["makes"], found["full"]["makes"]) == ("adapter", "model")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"name": "a\0b"}, "name"),
        ({"settings": {"target_modules": "q\0"}}, "settings.target_modules"),
        ({"settings": {"ra\0nk": 8}}, "settings.ra\\x00nk"),
        ({"settings": {"rank": "\ud800"}}, "settings.rank"),
        ({"training": {"best_by": "\0"}}, "training.best_by"),
    ],
)
def test_text_that_cannot_be_stored_is_refused_by_field(
    bob_api: Client, base_model: BaseModel, version: DatasetVersion, changes: dict[str, Any], field: str
) -> None:
    answer = post(bob_api, "jobs/", job_body(base_model, version, **changes))
    assert answer.status_code == 422, answer.text
    assert answer.json()["error"]["field"] == field
    assert not Job.objects.exists()

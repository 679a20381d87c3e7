"""Scans that a team's policy lets block training: nothing is queued on rows that break it, and a lead may waive."""

from __future__ import annotations

import re
import uuid
from typing import Any

import pytest
from django.test import Client

from jobs.models import Job, JobKind
from jobs.queueing import queue_job, retry_job
from studio.accounts.models import ApiToken, AuditEvent, Role, Team, User
from studio.catalogue.models import BaseModel
from studio.datasets.models import DatasetScan, DatasetVersion, ScanFinding, ScanState
from studio.reviews import scan_limits
from studio.reviews.models import ScanWaiver
from studio.reviews.policies import PolicyError, PolicySettings, ScanLimit, change_policy, current_policy
from studio.reviews.policies import default_settings as defaults
from studio.reviews.scan_limits import BlockedByScanError, blocking, standings
from tests.conftest import make_member, signed_in
from tests.factories import make_base_model, make_dataset_version, make_recipe
from tests.jobs.making import make_worker
from tests.tiny import colour_rows
from workers.errors import RecipeError
from workers.recipe import MAX_MIXED
from workers.scans import scans

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("data_dir")]


@pytest.fixture
def base(data_dir: object) -> BaseModel:
    return make_base_model()


@pytest.fixture
def version(team: Team, alice: User) -> DatasetVersion:
    """40 rows, scanned: three rows with secrets, of which one has two."""
    version = make_dataset_version(team, alice)
    for name in scans():
        DatasetScan.objects.create(version=version, name=name, state=ScanState.DONE, num_rows=0)
    found = version.scans.get(name="secrets")
    for place, line in enumerate([2, 2, 5, 9]):
        ScanFinding.objects.create(scan=found, place=place, line=line, kind="key", message="A key.")
    DatasetScan.objects.filter(pk=found.pk).update(num_findings=4, num_rows=3)
    return version


def limit(team: Team, by: User, **limits: ScanLimit) -> None:
    settings = PolicySettings.from_dict(current_policy(team).settings)
    change_policy(team, PolicySettings(settings.approvals, settings.gates, limits), by=by)


def queue(version: DatasetVersion, user: User, base: BaseModel, **more: Any) -> Job:
    values = {"idempotency_key": uuid.uuid4().hex, **more}
    return queue_job(
        team=version.dataset.team, user=user, recipe=make_recipe(base, version), base_model=base,
        dataset_version=version, **values,
    )  # fmt: skip


def api(team: Team, user: User) -> Client:
    secret = ApiToken.issue(team=team, user=user, name="t", scopes=["read", "write"])[1]
    return Client(headers={"authorization": f"Bearer {secret}"})


def url_of(version: DatasetVersion, rest: str = "scan-limits/") -> str:
    return f"/api/v1/datasets/{version.dataset_id}/versions/{version.number}/{rest}"


def page_of(version: DatasetVersion, name: str = "") -> str:
    return f"/reviews/scan-limits/{version.dataset_id}/v/{version.number}/{name}"


def test_a_scan_blocks_nothing_before_a_team_says_so(team: Team, bob: User, version: DatasetVersion, base: Any) -> None:
    assert current_policy(team).settings["scans"] == {}
    assert standings(version, team) == []
    assert queue(version, bob, base).state == "queued"


def test_rows_beyond_the_limit_cannot_be_trained_on_and_the_refusal_says_why_and_who_can_help(
    team: Team, alice: User, bob: User, version: DatasetVersion, base: BaseModel
) -> None:
    limit(team, alice, secrets=ScanLimit(2))
    with pytest.raises(BlockedByScanError) as caught:
        queue(version, bob, base)
    error = caught.value
    assert error.message == (
        "“Secrets” found something in 3 of 40 rows (7.5 %); the team's policy v2 allows no more than 2 rows."
    )
    assert "A lead or admin of the team may waive it" in error.next_step
    assert (error.field, error.details["scans"]) == ("dataset", ["secrets"])
    assert error.details["url"] == f"{version.get_absolute_url()}scans/"
    assert not Job.objects.exists()


def test_a_further_dataset_of_a_mixture_is_held_to_the_limit_and_named(
    team: Team, alice: User, bob: User, version: DatasetVersion, base: BaseModel
) -> None:
    main = make_dataset_version(team, alice, name="Main", num_rows=50)
    for name in scans():
        DatasetScan.objects.create(version=main, name=name, state=ScanState.DONE, num_rows=0)
    mix = [{"name": str(version), "sha256": version.sha256, "format": version.format}]
    limit(team, alice, secrets=ScanLimit(2))

    def queue_both() -> Job:
        return queue_job(
            team=team, user=bob, recipe=make_recipe(base, main, mix=mix), base_model=base, dataset_version=main,
            mixed=[version], idempotency_key=uuid.uuid4().hex,
        )  # fmt: skip

    with pytest.raises(BlockedByScanError) as caught:
        queue_both()
    assert caught.value.field == "mix.0"
    assert caught.value.message.startswith(f"{version}: “Secrets” found something in 3 of 40 rows")
    assert not Job.objects.exists()
    limit(team, alice, secrets=ScanLimit(3))
    assert queue_both().num_mixed == 1


@pytest.mark.parametrize(
    ("one", "blocks"),
    [
        (ScanLimit(2), True), (ScanLimit(3), False), (ScanLimit(7.4, "percent"), True),
        (ScanLimit(7.5, "percent"), False), (ScanLimit(0), True),
    ],
)  # fmt: skip
def test_a_limit_is_a_number_of_rows_or_a_share_of_the_usable_ones(
    team: Team, alice: User, version: DatasetVersion, one: ScanLimit, blocks: bool
) -> None:
    limit(team, alice, secrets=one, near_duplicates=ScanLimit(0))
    assert [found.name for found in blocking(version, team)] == (["secrets"] if blocks else [])


def test_an_older_scan_that_did_not_count_rows_is_judged_by_its_findings(
    team: Team, alice: User, version: DatasetVersion
) -> None:
    DatasetScan.objects.update(num_rows=None)
    limit(team, alice, secrets=ScanLimit(2))
    assert [one.num_found for one in blocking(version, team)] == [3]


@pytest.mark.parametrize(
    ("state", "says"),
    [
        (ScanState.WAITING, "waits for a worker"), (ScanState.RUNNING, "is still running"),
        (ScanState.FAILED, "could not be run"), (None, "was never run on these rows"),
    ],
)  # fmt: skip
def test_a_scan_without_a_result_blocks_too_and_says_so(
    team: Team, alice: User, bob: User, version: DatasetVersion, base: Any, state: ScanState | None, says: str
) -> None:
    limit(team, alice, secrets=ScanLimit(1000))
    found = version.scans.filter(name="secrets")
    found.update(state=state) if state else found.delete()
    with pytest.raises(BlockedByScanError, match=says):
        queue(version, bob, base)


def test_each_scan_that_blocks_has_its_own_remedy(
    team: Team, alice: User, bob: User, version: DatasetVersion, base: BaseModel
) -> None:
    names = ["secrets", "exact_duplicates", "near_duplicates", "personal_data"]
    limit(team, alice, **{name: ScanLimit(0) for name in names})
    version.scans.filter(name="exact_duplicates").update(state=ScanState.RUNNING)
    version.scans.filter(name="near_duplicates").update(state=ScanState.FAILED)
    version.scans.filter(name="personal_data").delete()
    with pytest.raises(BlockedByScanError) as caught:
        queue(version, bob, base)
    told = caught.value.next_step
    labels = {name: scans()[name].label for name in scans() if name in names}
    assert f"Wait for the result of “{labels['exact_duplicates']}”: the dataset's scans say how far it is." in told
    to_run = [f"“{label}”" for name, label in labels.items() if name in {"near_duplicates", "personal_data"}]
    assert f"Run {' and '.join(to_run)} on the dataset's scans page." in told
    assert "Mend or remove the rows that “Secrets” found, which the dataset's scans list" in told


def test_one_that_is_not_for_such_rows_does_not_block(team: Team, alice: User, version: DatasetVersion) -> None:
    limit(team, alice, secrets=ScanLimit(0))
    version.scans.filter(name="secrets").update(state=ScanState.SKIPPED)
    assert blocking(version, team) == []


def test_a_scan_that_was_never_run_is_run_by_a_button(
    team: Team, alice: User, bob_client: Client, version: DatasetVersion, monkeypatch: pytest.MonkeyPatch,
    django_capture_on_commit_callbacks: Any,
) -> None:  # fmt: skip
    from studio.datasets import scanning

    sent: list[Any] = []
    monkeypatch.setattr(scanning, "send_task", lambda *arguments: sent.append(arguments))
    limit(team, alice, secrets=ScanLimit(0))
    version.scans.filter(name="secrets").delete()
    assert page_of(version) in bob_client.get(f"{version.get_absolute_url()}scans/").content.decode()
    shown = bob_client.get(page_of(version)).content.decode()
    assert "was never run on these rows" in shown
    address = f"{version.get_absolute_url()}scans/secrets/run/"
    assert f'action="{address}"' in shown
    with django_capture_on_commit_callbacks(execute=True):
        assert bob_client.post(address).status_code == 302
    assert version.scans.get(name="secrets").state == "waiting"
    assert sent == [("scan_dataset", version.pk)]
    assert AuditEvent.objects.get(action="dataset.scan_asked").details == {"scan": "secrets"}
    assert bob_client.post(f"{version.get_absolute_url()}scans/os.path/run/").status_code == 404
    assert bob_client.post(f"{version.get_absolute_url()}scans/nothing/run/").status_code == 404


def test_evaluations_and_jobs_that_wait_already_go_on(
    team: Team, alice: User, bob: User, version: DatasetVersion, base: BaseModel
) -> None:
    first = queue(version, bob, base, idempotency_key="k")
    limit(team, alice, secrets=ScanLimit(0))
    assert queue(version, bob, base, idempotency_key="k").pk == first.pk, "the answer to the same request"
    assert queue(version, bob, base, kind=JobKind.EVALUATE).kind == "evaluate"
    first.state = "failed"
    with pytest.raises(RecipeError, match="Secrets"):
        retry_job(first, bob, idempotency_key="again")


def test_a_lead_waives_with_a_reason_for_what_was_found(
    team: Team, alice: User, bob: User, version: DatasetVersion, base: BaseModel
) -> None:
    lena = make_member("lena", team, Role.LEAD)
    limit(team, alice, secrets=ScanLimit(0))
    client = signed_in(lena)
    client.post(page_of(version, "secrets/"), {"reason": "  "})
    assert not ScanWaiver.objects.exists()
    client.post(page_of(version, "secrets/"), {"reason": "They are made-up keys."})
    event = AuditEvent.objects.get(action="dataset.scan_waived")
    assert (event.user, event.object_id, event.details["reason"]) == (lena, str(version.pk), "They are made-up keys.")
    assert "found something in 3 of 40 rows" in event.details["found"]
    assert queue(version, bob, base).state == "queued"
    shown = client.get(page_of(version)).content.decode()
    assert "They are made-up keys." in shown
    assert "May be trained on" in shown
    # Run again, the scan finds more than was waived.
    DatasetScan.objects.filter(name="secrets").update(num_rows=4)
    assert len(blocking(version, team)) == 1
    DatasetScan.objects.filter(name="secrets").update(num_rows=3)
    client.post(page_of(version, "secrets/"), {"do": "end"})
    assert len(blocking(version, team)) == 1
    assert AuditEvent.objects.filter(action="dataset.scan_waiver_ended").count() == 1


def test_a_scan_that_failed_can_be_waived_until_it_has_a_result(
    team: Team, alice: User, version: DatasetVersion
) -> None:
    limit(team, alice, secrets=ScanLimit(2))
    version.scans.filter(name="secrets").update(state=ScanState.FAILED, num_rows=None)
    scan_limits.waive(version, team, "secrets", reason="Looked at by hand.", by=alice)
    assert blocking(version, team) == []
    version.scans.filter(name="secrets").update(state=ScanState.DONE, num_rows=3)
    assert len(blocking(version, team)) == 1


def test_what_blocks_nothing_or_is_not_over_cannot_be_waived(team: Team, alice: User, version: DatasetVersion) -> None:
    for state in (None, ScanState.RUNNING):
        if state:
            limit(team, alice, secrets=ScanLimit(0))
            version.scans.filter(name="secrets").update(state=state)
        with pytest.raises(scan_limits.WaiverError):
            scan_limits.waive(version, team, "secrets", reason="Because.", by=alice)
    assert not ScanWaiver.objects.exists()


def test_only_leads_waive_and_another_team_sees_nothing(
    team: Team, other_team: Team, alice: User, bob: User, charlie: User, version: DatasetVersion,
    bob_client: Client, charlie_client: Client,
) -> None:  # fmt: skip
    limit(team, alice, secrets=ScanLimit(0))
    assert bob_client.post(page_of(version, "secrets/"), {"reason": "x"}).status_code == 403
    assert "Waive it" not in bob_client.get(page_of(version)).content.decode()
    assert "Its rows" in bob_client.get(page_of(version)).content.decode()
    for url in (page_of(version), f"{version.get_absolute_url()}scans/"):
        assert charlie_client.get(url).status_code == 404
    assert charlie_client.post(page_of(version, "secrets/"), {"reason": "x"}).status_code == 404
    assert Client().get(page_of(version)).status_code == 302
    stranger, trainer = api(other_team, charlie), api(team, bob)
    waiver = url_of(version, "scan-limits/secrets/waiver/")
    body = {"data": {"reason": "x"}, "content_type": "application/json"}
    assert stranger.get(url_of(version)).status_code == 404
    assert stranger.post(waiver, **body).status_code == 404
    assert trainer.post(waiver, **body).status_code == 403
    assert trainer.delete(waiver).status_code == 403
    assert trainer.get(url_of(version)).status_code == 200
    assert not ScanWaiver.objects.exists()


def test_the_api_sets_shows_refuses_and_waives_as_the_pages_do(
    team: Team, alice: User, bob: User, version: DatasetVersion, base: BaseModel
) -> None:
    lead, trainer = api(team, alice), api(team, bob)

    def post(client: Client, url: str, body: Any) -> Any:
        return client.post(url, body, content_type="application/json")

    policy = lead.get("/api/v1/policies/current/").json()
    gates, approvals = policy["gates"], policy["approvals"]
    asked = {"approvals": approvals, "gates": gates, "scans": {"secrets": {"most": 5, "unit": "percent"}}}
    made = post(lead, "/api/v1/policies/", asked)
    assert (made.status_code, made.json()["scans"]) == (201, {"secrets": {"most": 5.0, "unit": "percent"}})
    # Who knows nothing of scans changes none of them.
    again = post(lead, "/api/v1/policies/", {"approvals": 2, "gates": gates}).json()
    assert (again["approvals"], again["scans"]) == (2, made.json()["scans"])
    found = trainer.get(url_of(version)).json()
    assert [(one["scan"], one["num_found"], one["most"], one["unit"], one["is_blocking"]) for one in found] == [
        ("secrets", 3, 5.0, "percent", True)
    ]
    asked_job = {"name": "x", "base_model": base.pk, "dataset_version": version.pk}
    answer = post(trainer, "/api/v1/jobs/", asked_job)
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "blocked_by_scan"), answer.json()
    assert "3 of 40 rows" in answer.json()["error"]["message"]
    waiver = url_of(version, "scan-limits/secrets/waiver/")
    assert post(lead, waiver, {"reason": " "}).json()["error"]["code"] == "reason_missing"
    waived = post(lead, waiver, {"reason": "Test keys."})
    assert (waived.status_code, waived.json()[0]["waived_by"], waived.json()[0]["is_blocking"]) == (200, "alice", False)
    assert AuditEvent.objects.get(action="dataset.scan_waived").token_id is not None
    assert post(lead, waiver, {"reason": "Again."}).status_code == 409
    assert lead.delete(waiver).status_code == 204
    assert trainer.get(url_of(version)).json()[0]["is_blocking"]


@pytest.mark.parametrize(
    ("limits", "field"),
    [
        ({"nothing": {"most": 1}}, "scans.nothing"), ({"secrets": {"most": -1}}, "scans.secrets"),
        ({"secrets": {"most": 1.5}}, "scans.secrets"), ({"secrets": {"most": 101, "unit": "percent"}}, "scans.secrets"),
        ({"secrets": {"most": 1, "unit": "files"}}, "scans.secrets"), ({"secrets": {"most": "x"}}, "scans.secrets"),
        ({"secrets": {"least": 1}}, "scans.secrets"), ({"secrets": 3}, "scans.secrets"),
        ({"secrets": {"most": True}}, "scans.secrets"), ({"secrets": {"most": float("nan")}}, "scans.secrets"),
    ],
)  # fmt: skip
def test_a_limit_that_cannot_be_is_refused_by_name(limits: Any, field: str) -> None:
    with pytest.raises(PolicyError) as caught:
        PolicySettings.cleaned(1, {}, limits)
    assert caught.value.field == field


def test_the_policy_page_changes_limits_and_says_what_changed(team: Team, alice_client: Client) -> None:
    page = alice_client.get("/reviews/policy/").content.decode()
    assert all(scan.label in page for scan in scans().values())
    settings = defaults()
    form: dict[str, Any] = {"approvals": "1", "note": "no keys", "scan.secrets.blocks": "on"}
    for name, gate in settings.gates.items():
        form |= {f"{name}.is_on": "on", **{f"{name}.{key}": value for key, value in gate.items()}}
    form |= {"scan.secrets.most": "1.5", "scan.secrets.unit": "rows"}
    refused = alice_client.post("/reviews/policy/", form)
    assert refused.status_code == 422
    assert "a whole number from 0" in refused.content.decode()
    assert 'value="1.5"' in refused.content.decode(), "what was typed stays"
    form |= {"scan.secrets.most": "1.5", "scan.secrets.unit": "percent"}
    assert alice_client.post("/reviews/policy/", form).status_code == 302
    assert PolicySettings.from_dict(current_policy(team).settings).scans == {"secrets": ScanLimit(1.5, "percent")}
    event = AuditEvent.objects.get(action="review.policy_changed")
    assert event.details["changed"] == ["scan secrets shows → blocks above 1.5 %"]


def test_a_policy_from_before_scans_blocked_means_that_none_does(team: Team, alice: User) -> None:
    settings = defaults().to_dict()
    del settings["scans"]
    team.policies.create(version=1, settings=settings)
    assert PolicySettings.from_dict(current_policy(team).settings).scans == {}
    assert change_policy(team, defaults(), by=alice).version == 1, "nothing would change"
    limit(team, alice, secrets=ScanLimit(0))
    assert current_policy(team).version == 2


def test_the_new_job_page_says_it_before_anything_is_queued(
    team: Team, alice: User, bob_client: Client, version: DatasetVersion, base: BaseModel,
    django_assert_max_num_queries: Any,
) -> None:  # fmt: skip
    limit(team, alice, secrets=ScanLimit(0))
    make_worker()
    with django_assert_max_num_queries(8):
        shown = bob_client.get(f"/jobs/new/?dataset={version.pk}&base_model={base.pk}").content.decode()
    assert "found something in 3 of 40 rows" in shown
    assert f'href="{version.get_absolute_url()}scans/#scan-secrets"' in shown
    asked = dict(re.findall(r'<input[^>]* name="([^"]+)"[^>]* value="([^"]*)"', shown))
    asked |= {"base_model": base.pk, "dataset_version": version.pk, "method": "lora", "name": "x", "start": "1"}
    answer = bob_client.post("/jobs/new/", asked)
    assert answer.status_code == 422
    assert "found something in 3 of 40 rows" in answer.content.decode()
    assert not Job.objects.exists()


def test_a_further_dataset_is_looked_up_once_however_often_and_far_behind_it_is_chosen(
    team: Team, alice: User, bob_client: Client, version: DatasetVersion, base: BaseModel,
    django_assert_max_num_queries: Any,
) -> None:  # fmt: skip
    limit(team, alice, secrets=ScanLimit(0))
    asked = {"base_model": base.pk, "dataset_version": version.pk, "method": "lora", "name": "x", "goal": "balanced"}
    further = make_dataset_version(team, alice, name="Clean", rows=colour_rows(30))
    for keys in (
        [further.pk, *range(10**6, 10**6 + MAX_MIXED), *[further.pk] * 30],
        ["", "x"] * 30 + [further.pk] * 30,
    ):
        asked |= {"mix_version": keys, "mix_weight": ["1"] * len(keys), "mix_split": ["share"] * len(keys)}
        with django_assert_max_num_queries(8):
            shown = bob_client.post("/jobs/estimate/", asked).content.decode()
        row = shown.split(f'id="mix-blocks-{len(keys) - 1}"')[1].split("</div>")[0]
        assert "was never run on these rows" in row


def test_the_new_job_page_says_it_of_a_further_dataset_too(
    team: Team, alice: User, bob_client: Client, version: DatasetVersion, base: BaseModel,
    django_assert_max_num_queries: Any,
) -> None:  # fmt: skip
    main = make_dataset_version(team, alice, name="Clean", rows=colour_rows(30))
    DatasetScan.objects.create(version=main, name="secrets", state=ScanState.DONE, num_rows=0)
    limit(team, alice, secrets=ScanLimit(0))
    version.scans.update(num_rows=3)
    make_worker()
    asked = {"base_model": base.pk, "dataset_version": main.pk, "method": "lora", "name": "x", "goal": "balanced"}
    asked |= {"mix_version": ["", str(version.pk)], "mix_weight": ["1", "1"], "mix_split": ["", "share"]}
    link = f'href="{version.get_absolute_url()}scans/#scan-secrets"'
    for url, more in (("/jobs/estimate/", {}), ("/jobs/new/", {"update": "1"}), ("/jobs/estimate/", {"mix_add": "1"})):
        with django_assert_max_num_queries(8):
            shown = bob_client.post(url, asked | more).content.decode()
        row = shown.split('id="mix-blocks-1"')[1].split("</div>")[0]
        assert "found something in 3 of 40 rows" in row
        assert link in row
        assert 'id="mix-blocks-0" class="col-span-full text-sm empty:hidden"></div>' in shown
        assert shown.count(link) == 1, "and the main dataset is clean"
    scan_limits.waive(version, team, "secrets", reason="Test keys.", by=alice)
    assert link not in bob_client.post("/jobs/estimate/", asked).content.decode()
    assert bob_client.post("/jobs/new/", asked | {"start": "1"}).status_code == 302
    job = Job.objects.get()
    scan_limits.take_back(version, team, "secrets", by=alice)
    with django_assert_max_num_queries(8):
        again = bob_client.get(f"/jobs/new/?from={job.pk}").content.decode()
    assert link in again.split('id="mix-blocks-0"')[1].split("</div>")[0]


def test_the_fragment_and_the_scans_page_cost_at_most_eight_queries(
    team: Team, alice: User, alice_client: Client, version: DatasetVersion, django_assert_max_num_queries: Any
) -> None:
    limit(team, alice, **{name: ScanLimit(0) for name in scans()})
    scan_limits.waive(version, team, "secrets", reason="Test keys.", by=alice)
    with django_assert_max_num_queries(8):
        alice_client.get(f"{version.get_absolute_url()}scans/")
    DatasetScan.objects.filter(name="language").update(num_rows=1)
    with django_assert_max_num_queries(8):
        shown = alice_client.get(page_of(version), headers={"HX-Request": "true"}).content.decode()
    assert shown.lstrip().startswith('<section id="_scan_limits"')
    assert "Not to be trained on yet" in shown
    assert "Waive it for this version" in shown
    assert "Test keys." in shown


def test_the_fragment_asks_again_while_a_scan_runs_and_nothing_is_typed(
    team: Team, alice: User, bob_client: Client, alice_client: Client, version: DatasetVersion
) -> None:
    limit(team, alice, secrets=ScanLimit(0), language=ScanLimit(0))
    DatasetScan.objects.filter(name="language").update(state=ScanState.RUNNING)
    assert 'hx-trigger="every 2s"' in bob_client.get(page_of(version)).content.decode()
    assert "hx-trigger" not in alice_client.get(page_of(version)).text.split('id="_scan_limits"')[1].split(">")[0]

"""What finished jobs measured shows in the next job's estimate: memory, time and cost, on the form and in the API."""

from __future__ import annotations

import json
from datetime import timedelta
from io import StringIO
from typing import Any

import pytest
from django.core.management import call_command
from django.test import Client
from django.urls import reverse
from django.utils import timezone
from pytest_django import DjangoAssertNumQueries

from jobs.estimating import Plan, estimate_values, plan_for
from jobs.models import Job, JobAttempt, JobState, TeamQuota, Worker
from jobs.scheduling import explain_wait, next_job
from studio.accounts.models import ApiToken, Role, Team, User
from studio.catalogue.models import BaseModel
from studio.datasets.models import DatasetVersion
from tests.conftest import make_member, signed_in
from tests.factories import make_adapter, make_base_model, make_dataset_version, make_recipe
from tests.jobs.test_views import form_data
from tests.workers.test_resolving import SEVEN_B
from workers.memory import GIB, TIGHT_SHARE

DEVICE = "NVIDIA L4"


@pytest.fixture
def card(db: None) -> Worker:
    return Worker.objects.create(
        host="box", slot=0, process_id=1, device=DEVICE, device_kind="cuda", memory_bytes=24 * GIB, version="1",
        last_seen=timezone.now(),
    )  # fmt: skip


def finish(
    team: Team, user: User, base_model: BaseModel, card: Worker, *, memory: float = 1.0, time: float = 1.0,
    minutes_ago: int = 0, method: str = "lora", **changes: Any,
) -> Job:  # fmt: skip
    """A succeeded job whose peak and time were so many times what had been estimated."""
    version = make_dataset_version(team, user, num_rows=60)
    plan = plan_for(make_recipe(base_model, version, method=method), base_model, version)
    estimate = estimate_values(plan)
    recipe = plan.recipe.to_dict()
    ended = timezone.now() - timedelta(minutes=minutes_ago)
    adapter = make_adapter(team, user, base_model=base_model, dataset_version=version)
    job = Job.objects.create(
        team=team, created_by=user, name="finished", recipe=recipe, asked_recipe=recipe, base_model=base_model,
        dataset_version=version, adapter=adapter, state=JobState.SUCCEEDED, not_before=ended, finished_at=ended,
        estimate=estimate, idempotency_key=f"finished-{Job.objects.count()}", attempt=1, **changes,
    )  # fmt: skip
    seconds = time * (estimate["seconds_low"] + estimate["seconds_high"]) / 2
    parts = ("weights_bytes", "adapter_bytes", "optimizer_bytes", "activations_bytes")
    JobAttempt.objects.create(
        job=job, number=1, worker=card, started_at=ended - timedelta(seconds=seconds), ended_at=ended,
        outcome="succeeded", peak_memory_bytes=round(memory * sum(estimate[part] for part in parts)),
    )  # fmt: skip
    return job


def make_plan(base_model: BaseModel, version: DatasetVersion, method: str = "lora") -> Plan:
    return plan_for(make_recipe(base_model, version, method=method), base_model, version)


@pytest.fixture
def large(base_model: BaseModel) -> BaseModel:
    base_model.shape = SEVEN_B.model_dump(mode="json")
    base_model.save()
    return base_model


def test_before_anything_has_finished_the_form_says_that_it_is_arithmetic(
    alice_client: Client, large: BaseModel, version: DatasetVersion, card: Worker
) -> None:
    panel = alice_client.post(reverse("jobs:estimate"), form_data(large, version)).text
    assert "By arithmetic only; the peaks of finished runs will correct it." in panel
    assert "by arithmetic only; finished jobs will correct it" in panel
    assert "Cost" not in panel, "no price is set"


def test_finished_jobs_correct_memory_and_time_and_the_form_says_how_many(
    alice_client: Client, team: Team, alice: User, large: BaseModel, version: DatasetVersion, card: Worker
) -> None:
    Worker.objects.update(memory_bytes=80 * GIB)  # room enough for as many rows at once with the correction
    before = make_plan(large, version)
    for minutes in (3, 2, 1):
        finish(team, alice, large, card, memory=1.2, time=2.0, minutes_ago=minutes)
    after = make_plan(large, version)
    assert (after.estimate.measured, after.estimate.num_measured) == ("like", 3)
    measured = before.estimate.total_bytes - before.estimate.runtime_bytes
    assert after.estimate.total_bytes == pytest.approx(1.2 * measured + before.estimate.runtime_bytes, rel=0.04)
    assert after.estimate.weights_bytes == before.estimate.weights_bytes
    assert before.time is not None
    assert after.time is not None
    assert (after.time.basis, after.time.num_jobs) == ("like", 3)
    assert after.time.expected == pytest.approx(2 * before.time.expected, rel=0.1)
    assert after.time.low < after.time.expected < after.time.high
    assert after.time.high / after.time.low < before.time.high / before.time.low, "three jobs narrow the range"
    panel = alice_client.post(reverse("jobs:estimate"), form_data(large, version)).text
    assert "Measured on 3 runs like this; by arithmetic alone" in panel
    assert "measured on 3 jobs like this" in panel


def test_a_correction_is_heeded_by_what_the_studio_chooses_itself(
    team: Team, alice: User, large: BaseModel, version: DatasetVersion, card: Worker
) -> None:
    """What would fit by arithmetic, and does not by what was measured, is given fewer rows at once: where the model's
    own blocks compute, which choose nothing by themselves."""
    before = make_plan(large, version, "dora").recipe.training.micro_batch_size
    finish(team, alice, large, card, memory=1.2, method="dora")
    after = make_plan(large, version, "dora")
    assert isinstance(before, int)
    assert isinstance(after.recipe.training.micro_batch_size, int)
    assert after.recipe.training.micro_batch_size < before
    assert after.estimate.verdict == "fits"


def test_a_correction_is_heeded_by_the_verdict_on_what_chooses_by_itself(
    team: Team, alice: User, large: BaseModel, version: DatasetVersion, card: Worker
) -> None:
    """The least with which it works is corrected as well; the rows at once are the run's own choice."""
    before = make_plan(large, version)
    finish(team, alice, large, card, memory=1.5)
    after = make_plan(large, version)
    assert before.estimate.least_bytes is not None
    assert after.estimate.least_bytes is not None
    assert after.estimate.least_bytes > 1.1 * before.estimate.least_bytes
    assert (before.estimate.verdict, after.estimate.verdict) == ("fits", "tight")
    assert after.estimate.total_bytes <= card.memory_bytes


def test_what_was_corrected_once_is_not_learned_again(
    team: Team, alice: User, large: BaseModel, version: DatasetVersion, card: Worker
) -> None:
    """A job that was queued with a corrected estimate, and held what that said, corrects the next one as much."""
    for minutes in (9, 8, 7):
        finish(team, alice, large, card, memory=1.2, minutes_ago=minutes)
    once = make_plan(large, version).estimate.total_bytes
    for minutes in (3, 2, 1):
        finish(team, alice, large, card, memory=1.2, minutes_ago=minutes)
    assert make_plan(large, version).estimate.total_bytes == pytest.approx(once, rel=0.03)


def test_a_run_that_had_to_take_fewer_rows_at_once_corrects_no_memory(
    team: Team, alice: User, large: BaseModel, version: DatasetVersion, card: Worker
) -> None:
    finish(team, alice, large, card, memory=0.5, micro_batch_size=1)
    assert make_plan(large, version).estimate.measured == "arithmetic"


def test_one_job_of_another_team_says_nothing(
    team: Team, other_team: Team, charlie: User, large: BaseModel, version: DatasetVersion, card: Worker
) -> None:
    finish(other_team, charlie, large, card, memory=1.5, time=9)
    plan = make_plan(large, version)
    assert plan.time is not None
    assert (plan.estimate.measured, plan.time.basis) == ("arithmetic", "arithmetic")


def test_jobs_of_other_teams_count_together_for_the_device(
    team: Team, other_team: Team, charlie: User, large: BaseModel, version: DatasetVersion, card: Worker
) -> None:
    for minutes in range(3):
        finish(other_team, charlie, large, card, memory=1.2, time=2, minutes_ago=minutes)
    plan = make_plan(large, version)
    assert plan.time is not None
    assert (plan.estimate.measured, plan.time.basis) == ("device", "device")


def test_the_panel_shows_the_cost_as_a_range_and_which_device_it_is_priced_for(
    alice_client: Client, team: Team, large: BaseModel, version: DatasetVersion, card: Worker
) -> None:
    TeamQuota.objects.create(team=team, price_per_gpu_hour="9", currency="EUR", device_prices=[["L4", "0.8"]])
    plan = make_plan(large, version)
    assert plan.time is not None
    assert plan.cost_range is not None
    low, high = plan.cost_range
    assert float(low) == pytest.approx(0.8 * plan.time.low / 3600)
    assert float(high) == pytest.approx(0.8 * plan.time.high / 3600)
    panel = alice_client.post(reverse("jobs:estimate"), form_data(large, version)).text
    assert f"{low:.2f} to {high:.2f}\N{NO-BREAK SPACE}EUR" in panel
    assert f"at 0.80\N{NO-BREAK SPACE}EUR an hour on {DEVICE}" in panel


def changes_in(panel: str) -> list[str]:
    """The values of the panel's buttons that fill in a change."""
    from html import unescape

    return [unescape(part.split('"', 1)[0]) for part in panel.split('name="apply" value="')[1:]]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_job_that_is_too_large_is_offered_changes_that_fill_themselves_in(
    method: str, alice_client: Client, large: BaseModel, version: DatasetVersion, card: Worker
) -> None:
    Worker.objects.update(memory_bytes=12 * GIB)
    data = form_data(large, version, method=method, **{"settings.lora.rank": "32"})
    panel = alice_client.post(reverse("jobs:estimate"), data).text
    assert "What would fit" in panel
    values = changes_in(panel)
    assert values
    for value in values:
        page = alice_client.post(reverse("jobs:new"), data | {"apply": value})
        assert page.status_code == 200
        assert "The change is filled in. Nothing has started." in page.text
        assert ">fits</span>" in page.text, value
    assert not Job.objects.exists()
    as_qlora = next(json.loads(value) for value in values if '"qlora"' in value)
    page = alice_client.post(reverse("jobs:new"), data | {"apply": json.dumps(as_qlora)}).text
    assert 'value="qlora" checked' in page
    if method == "lora":
        assert as_qlora["settings.qlora.rank"] == "32", "what was chosen goes along"


def test_enter_in_a_field_starts_the_job_and_fills_in_no_change(
    alice_client: Client, large: BaseModel, version: DatasetVersion, card: Worker
) -> None:
    """A browser presses the first button of the form that sends it."""
    Worker.objects.update(memory_bytes=12 * GIB)
    page = alice_client.post(reverse("jobs:new"), form_data(large, version, update="1")).text
    form = page[page.index('<form id="job-form"') :]
    buttons = [part.split(">", 1)[0] for part in form.split("<button")[1:]]
    sending = [one for one in buttons if 'type="button"' not in one]
    assert 'name="start"' in sending[0]
    assert any('name="apply"' in one for one in sending)


@pytest.mark.parametrize("value", ["", "{", "[]", '{"no_such": "1"}', '{"training.epochs": 2}', '"x"'])
def test_a_change_that_the_page_never_offered_is_a_bad_request(
    value: str, alice_client: Client, base_model: BaseModel, version: DatasetVersion, card: Worker
) -> None:
    answer = alice_client.post(reverse("jobs:new"), form_data(base_model, version, apply=value))
    assert answer.status_code == 400
    assert not Job.objects.exists()


def test_memory_that_others_hold_makes_a_job_wait_and_the_form_says_what_would_fit_now(
    alice_client: Client, large: BaseModel, version: DatasetVersion, card: Worker
) -> None:
    Worker.objects.update(free_memory_bytes=12 * GIB)
    panel = alice_client.post(reverse("jobs:estimate"), form_data(large, version)).text
    assert "a job could have 12.0 GiB now. It waits until" in panel
    assert "What would fit now" in panel
    assert changes_in(panel)
    Worker.objects.update(free_memory_bytes=24 * GIB)
    assert "What would fit" not in alice_client.post(reverse("jobs:estimate"), form_data(large, version)).text


def test_a_job_starts_as_soon_as_it_would_not_be_much_slower_and_page_and_form_say_the_same_number(
    alice_client: Client, client: Client, team: Team, bob: User, large: BaseModel, version: DatasetVersion, card: Worker
) -> None:
    _token, secret = ApiToken.issue(team=team, user=bob, name="jobs", scopes=["read", "write"])
    answer = client.post(
        "/api/v1/jobs/", {"name": "x", "base_model": large.pk, "dataset_version": version.pk},
        content_type="application/json", headers={"Authorization": f"Bearer {secret}"},
    )  # fmt: skip
    assert answer.status_code == 201, answer.text
    job = Job.objects.get()
    least, enough, liked = (job.estimate[name] for name in ("least_bytes", "enough_bytes", "total_bytes"))
    assert least < enough < 0.95 * liked
    assert job.memory_bytes == enough

    Worker.objects.update(free_memory_bytes=enough - 1, last_seen=timezone.now())
    assert next_job(card) is None
    assert explain_wait(job).startswith(f"Needs about {enough / GIB:.1f} GiB, and NVIDIA L4 (box#0) has")
    panel = alice_client.post(reverse("jobs:estimate"), form_data(large, version)).text
    assert f"It waits until {enough / GIB:.1f} GiB are free." in panel

    Worker.objects.update(free_memory_bytes=enough)
    assert "It waits until" not in alice_client.post(reverse("jobs:estimate"), form_data(large, version)).text
    assert next_job(card) == job


def test_a_run_that_hardly_fits_a_device_does_not_wait_for_all_of_it(
    large: BaseModel, version: DatasetVersion, card: Worker
) -> None:
    for gib in (24, 18, 16, 15, 14):
        Worker.objects.update(memory_bytes=gib * GIB)
        found = make_plan(large, version).estimate
        assert found.least_bytes is not None
        assert found.enough_bytes is not None
        assert found.least_bytes <= found.enough_bytes <= max(found.least_bytes, TIGHT_SHARE * gib * GIB)


def test_the_api_estimates_as_the_form_does_and_queues_nothing(
    client: Client, team: Team, bob: User, charlie: User, large: BaseModel, version: DatasetVersion, card: Worker
) -> None:
    Worker.objects.update(memory_bytes=12 * GIB)
    TeamQuota.objects.create(team=team, price_per_gpu_hour="2", currency="EUR")

    def ask(user: User, of: Team, **changes: object) -> tuple[int, dict[str, Any]]:
        _token, secret = ApiToken.issue(team=of, user=user, name="estimates", scopes=["read", "write"])
        body = {"name": "x", "base_model": large.pk, "dataset_version": version.pk, **changes}
        headers = {"Authorization": f"Bearer {secret}"}
        answer = client.post("/api/v1/jobs/estimate/", body, content_type="application/json", headers=headers)
        return answer.status_code, answer.json()

    status, found = ask(bob, team)
    assert (status, found["verdict"], found["measured"], found["device"]) == (200, "too_large", "arithmetic", DEVICE)
    assert found["cost"]["high"] == pytest.approx(2 * found["seconds_high"] / 3600, abs=1e-3)
    small = next(one for one in found["suggestions"] if one["recipe"]["method"] == "qlora")
    status, fits = ask(bob, team, **{name: small["recipe"][name] for name in ("method", "settings", "training")})
    assert (status, fits["verdict"], fits["total_bytes"]) == (200, "fits", small["num_bytes"])
    assert fits["suggestions"] == []
    status, refused = ask(bob, team, method="lora", settings={"rank": -1})
    assert (status, refused["error"]["field"]) == (422, "settings.rank")
    assert ask(charlie, charlie.teams.get())[0] == 422, "another team's dataset"
    viewer = make_member("vera", team, Role.VIEWER)
    assert ask(viewer, team)[0] == 403
    assert not Job.objects.exists()
    assert signed_in(viewer).post(reverse("jobs:estimate"), form_data(large, version)).status_code == 403


def test_a_run_that_is_held_back_by_memory_says_how_it_fits_and_how_much_slower_that_is(
    alice_client: Client, client: Client, team: Team, bob: User, large: BaseModel, version: DatasetVersion, card: Worker
) -> None:
    _token, secret = ApiToken.issue(team=team, user=bob, name="estimates", scopes=["read", "write"])
    body = {"name": "x", "base_model": large.pk, "dataset_version": version.pk}

    def ask(gib: float) -> tuple[str, dict[str, Any]]:
        Worker.objects.update(memory_bytes=int(gib * GIB))
        panel = alice_client.post(reverse("jobs:estimate"), form_data(large, version)).text
        headers = {"Authorization": f"Bearer {secret}"}
        answer = client.post("/api/v1/jobs/estimate/", body, content_type="application/json", headers=headers)
        return panel, answer.json()

    panel, found = ask(15)
    assert "It fits with fewer rows at once: about" in panel
    assert "slower than with memory to spare" in panel
    assert found["verdict"] == "tight"
    assert found["least_bytes"] < found["total_bytes"] <= 15 * GIB
    assert (found["kept_share"], found["slowdown"] > 1.02) == (1, True)
    panel, found = ask(14.6)
    assert "It fits by computing a part of its blocks twice: about" in panel
    assert found["kept_share"] < 1 < found["slowdown"] < 1.6
    panel, found = ask(80)
    assert "slower than with memory to spare" not in panel
    assert (found["kept_share"], found["slowdown"]) == (1, 1)
    panel, found = ask(12)
    assert found["verdict"] == "too_large"
    assert "slower than with memory to spare" not in panel


def test_the_estimate_costs_at_most_eight_queries_when_a_job_has_just_finished_and_one_less_after(
    alice_client: Client, team: Team, alice: User, version: DatasetVersion, card: Worker, data_dir: object,
    django_assert_max_num_queries: DjangoAssertNumQueries,
) -> None:  # fmt: skip
    base_model = make_base_model()
    finish(team, alice, base_model, card)
    for most in (8, 7):
        with django_assert_max_num_queries(most):
            assert alice_client.post(reverse("jobs:estimate"), form_data(base_model, version)).status_code == 200


def test_the_command_prints_the_error_on_held_out_jobs(team: Team, alice: User, large: BaseModel, card: Worker) -> None:
    said = StringIO()
    call_command("memory", stdout=said)
    assert "nothing to measure on." in said.getvalue()
    for minutes in range(10):
        finish(team, alice, large, card, memory=1.25, minutes_ago=minutes)
    said = StringIO()
    call_command("memory", stdout=said)
    assert "10 finished jobs, 2 held out" in said.getvalue()
    alone, corrected = (float(line.split()[-2]) for line in said.getvalue().splitlines()[1:])
    assert corrected < 3 < alone

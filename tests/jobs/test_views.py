from __future__ import annotations

import html
import re
from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest
from django.template.defaultfilters import filesizeformat
from django.test import Client
from django.urls import reverse
from django.utils import timezone
from pytest_django import DjangoAssertNumQueries

from jobs import views
from jobs.models import Job, JobAttempt, JobState, MetricPoint, Worker
from studio.accounts.models import Membership, Role, Team, User
from studio.catalogue.models import BaseModel
from studio.datasets.models import DatasetVersion
from studio.templatetags.components import short_number
from tests.conftest import make_member, signed_in
from tests.factories import make_adapter, make_dataset_version
from tests.jobs.conftest import MakeJob
from tests.workers.test_resolving import SEVEN_B
from workers.methods import methods

PAGE_QUERIES = 8


@pytest.fixture
def worker(db: None) -> Worker:
    return Worker.objects.create(
        host="box", slot=0, process_id=1, device="CPU, 2 cores", device_kind="cpu", memory_bytes=24 * 2**30,
        version="1", last_seen=timezone.now(),
    )  # fmt: skip


@pytest.fixture
def viewer_client(team: Team) -> Client:
    return signed_in(make_member("vera", team, Role.VIEWER))


def form_data(base_model: BaseModel, version: DatasetVersion, **changes: str) -> dict[str, Any]:
    return {
        "base_model": base_model.pk, "dataset_version": version.pk, "method": "lora", "goal": "balanced",
        "name": "support", "idempotency_key": "key-1", "evaluation.metrics": ["loss", "token_f1"], "start": "1",
    } | changes  # fmt: skip


def run_of(job: Job, worker: Worker, **changes: Any) -> Job:
    values: dict[str, Any] = {
        "state": JobState.RUNNING, "phase": "training", "attempt": 1, "worker": worker, "step": 35, "num_steps": 100,
        "lease_until": timezone.now() + timedelta(seconds=60), "started_at": timezone.now(),
    }  # fmt: skip
    Job.objects.filter(pk=job.pk).update(**(values | changes))
    JobAttempt.objects.create(job=job, number=1, worker=worker, started_at=timezone.now())
    MetricPoint.objects.create(
        job=job, attempt=1, step=35, loss=1.25, learning_rate=2e-4, grad_norm=0.7, tokens_per_second=210,
        at=timezone.now(),
    )  # fmt: skip
    MetricPoint.objects.create(job=job, attempt=1, step=30, validation_loss=1.5, at=timezone.now())
    return Job.objects.get(pk=job.pk)


def urls_of(job: Job) -> list[tuple[str, str]]:
    """Every URL that names a job, with the method that it takes."""
    gets = ["detail", "header", "points", "point_table", "events"]
    return [("get", reverse(f"jobs:{name}", args=[job.pk])) for name in gets] + [
        ("post", reverse(f"jobs:{name}", args=[job.pk]))
        for name in ("cancel", "retry", "pause", "resume", "move", "priority")
    ]


def test_a_stranger_is_sent_to_the_login_page(make_job: MakeJob) -> None:
    for url in (reverse("jobs:list"), reverse("jobs:new"), reverse("home"), make_job().get_absolute_url()):
        answer = Client().get(url)
        assert answer.status_code == 302, url
        assert answer["Location"].startswith(reverse("accounts:login"))


@pytest.mark.django_db(transaction=True)
def test_it_hides_a_job_from_another_team(make_job: MakeJob, charlie_client: Client) -> None:
    job = make_job("secret-name")
    for method, url in urls_of(job):
        assert getattr(charlie_client, method)(url).status_code == 404, url
    for url in (reverse("jobs:list"), reverse("home")):
        assert "secret-name" not in charlie_client.get(url).text
    assert charlie_client.get(reverse("jobs:new"), {"from": job.pk}).status_code == 404
    job.refresh_from_db()
    assert job.state == JobState.QUEUED


def test_a_viewer_looks_but_does_not_queue_or_stop(
    make_job: MakeJob, viewer_client: Client, base_model: BaseModel, version: DatasetVersion
) -> None:
    job = make_job()
    assert viewer_client.get(job.get_absolute_url()).status_code == 200
    assert viewer_client.get(reverse("jobs:list")).status_code == 200
    assert "Stop and discard" not in viewer_client.get(job.get_absolute_url()).text
    assert viewer_client.post(reverse("jobs:new"), form_data(base_model, version)).status_code == 403
    assert viewer_client.get(reverse("jobs:new")).status_code == 403
    assert viewer_client.post(reverse("jobs:estimate"), form_data(base_model, version)).status_code == 403
    assert viewer_client.post(reverse("jobs:cancel", args=[job.pk])).status_code == 403
    for action in ("retry", "pause", "resume", "move", "priority"):
        assert viewer_client.post(reverse(f"jobs:{action}", args=[job.pk])).status_code == 403
    assert Job.objects.count() == 1


def test_a_trainer_queues_a_job_and_a_second_submit_gives_the_same(
    bob_client: Client, base_model: BaseModel, version: DatasetVersion, worker: Worker
) -> None:
    data = form_data(base_model, version)
    first = bob_client.post(reverse("jobs:new"), data)
    second = bob_client.post(reverse("jobs:new"), data)
    job = Job.objects.get()
    assert first.status_code == second.status_code == 302
    assert first["Location"] == second["Location"] == job.get_absolute_url()
    assert "auto" not in [job.recipe["precision"], *job.recipe["training"].values()]
    assert job.asked_recipe["training"]["learning_rate"] == "auto"
    assert job.estimate["num_steps"] == 7, "54 rows to train, 8 at a step"


def test_a_form_that_is_changed_after_back_queues_one_more_job_however_often_it_is_sent(
    bob_client: Client, base_model: BaseModel, version: DatasetVersion, worker: Worker
) -> None:
    bob_client.post(reverse("jobs:new"), form_data(base_model, version))
    changed = form_data(base_model, version, **{"training.epochs": "2"})
    first, second = (bob_client.post(reverse("jobs:new"), changed) for _ in range(2))
    assert first["Location"] == second["Location"]
    assert Job.objects.count() == 2
    bob_client.post(reverse("jobs:new"), changed | {"training.epochs": "3"})
    assert Job.objects.count() == 3


def test_a_bad_form_comes_back_with_its_values_and_queues_nothing(
    alice_client: Client, base_model: BaseModel, version: DatasetVersion, worker: Worker
) -> None:
    answer = alice_client.post(
        reverse("jobs:new"), form_data(base_model, version, **{"training.epochs": "1,5", "name": "kept <b>"})
    )
    assert answer.status_code == 422
    assert 'value="1,5"' in answer.text
    assert "kept &lt;b&gt;" in answer.text
    assert 'id="error-summary"' in answer.text
    assert 'href="#id_training-epochs"' in answer.text
    assert not Job.objects.exists()


def test_every_error_of_the_form_is_tied_to_its_field(
    alice_client: Client, base_model: BaseModel, version: DatasetVersion, worker: Worker
) -> None:
    wrong: dict[str, Any] = {
        "base_model": "", "dataset_version": "", "name": "", "method": "lroa", "training.epochs": "1,5",
        "precision": "int3", "evaluation.metrics": "beauty",
    }  # fmt: skip
    page = alice_client.post(reverse("jobs:new"), form_data(base_model, version) | wrong).text
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    for name in wrong:
        tags = re.findall(rf'<(?:input|select)[^>]* name="{re.escape(name)}"[^>]*>', page)
        assert tags, name
        assert all('aria-invalid="true"' in tag for tag in tags), name
        error_id = "dataset-note" if name == "dataset_version" else f"id_{name.replace('.', '-')}_error"
        group = (
            rf"<fieldset[^>]*{error_id}"
            if name in {"method", "evaluation.metrics"}
            else rf'name="{name}"[^>]*{error_id}'
        )
        assert re.search(group, page), name
        text = re.search(rf'id="{error_id}"[^>]*>([^<]+)</p>', page)
        assert text, name
        assert text[1].strip(), name
    good = alice_client.get(reverse("jobs:new"), {"dataset": version.pk}).text
    assert "aria-invalid" not in good
    for described in re.findall(r'aria-describedby="([^"]+)"', good):
        assert all(f'id="{one}"' in good for one in described.split())


def test_only_a_short_summary_of_the_estimate_is_read_out(
    alice_client: Client, base_model: BaseModel, version: DatasetVersion, worker: Worker
) -> None:
    panel = alice_client.post(reverse("jobs:estimate"), form_data(base_model, version)).text
    assert "aria-live" not in panel
    said = re.search(r'role="status"[^>]*>([^<]+)<', panel)
    assert said
    assert re.fullmatch(r"Fits: [\d.]+ of 24\.0 GiB, .+ to .+", said[1])
    bad = alice_client.post(reverse("jobs:estimate"), form_data(base_model, version, **{"training.epochs": "x"})).text
    assert ">1 thing to mend<" in bad


def test_a_dataset_that_is_too_small_says_so_beside_the_dataset(
    alice_client: Client, base_model: BaseModel, team: Team, alice: User, worker: Worker
) -> None:
    small = make_dataset_version(team, alice, name="Small", num_rows=6)
    answer = alice_client.post(reverse("jobs:new"), form_data(base_model, small))
    assert answer.status_code == 422
    note = re.search(r'<p id="dataset-note"[^>]*>(.*?)</p>', answer.text, re.S)
    assert note
    assert "Only 6 rows are usable" in note[1]


def test_a_method_refuses_in_place(
    alice_client: Client, base_model: BaseModel, version: DatasetVersion, worker: Worker
) -> None:
    answer = alice_client.post(reverse("jobs:new"), form_data(base_model, version, precision="nf4"))
    assert answer.status_code == 422
    assert 'href="#id_precision"' in answer.text


def test_the_estimate_answers_with_the_panel_and_changes_nothing(
    alice_client: Client, base_model: BaseModel, version: DatasetVersion, worker: Worker
) -> None:
    answer = alice_client.post(reverse("jobs:estimate"), form_data(base_model, version, shown_method="lora"))
    assert answer.status_code == 200
    assert answer.text.lstrip().startswith('<section id="this-run"')
    assert "54 to train, 6 held out" in answer.text
    assert "CPU, 2 cores" in answer.text
    assert "Start job" in answer.text
    assert 'hx-target="#id_training-learning_rate_resolved"' in answer.text
    assert 'id="method-settings"' not in answer.text, "the person may be typing there"
    other = alice_client.post(reverse("jobs:estimate"), form_data(base_model, version, shown_method="qlora"))
    assert 'id="method-settings"' in other.text
    assert not Job.objects.exists()


def test_full_fine_tuning_shows_what_lora_would_need_instead(
    alice_client: Client, base_model: BaseModel, version: DatasetVersion, worker: Worker
) -> None:
    panel = alice_client.post(reverse("jobs:estimate"), form_data(base_model, version, method="full")).text
    shape = base_model.model_shape()
    lora = methods()["lora"].num_trainable(methods()["lora"].Settings(), shape)
    assert "LoRA on the same rows would need" in panel
    assert f"train {short_number(lora)} parameters" in panel
    assert f"instead of {short_number(shape.num_parameters)}, and leave {filesizeformat(4 * lora)}" in panel
    assert f"{filesizeformat(4 * shape.num_parameters)} for the model" in panel
    assert "Base weights" not in panel, "it holds no second copy"
    other = alice_client.post(reverse("jobs:estimate"), form_data(base_model, version)).text
    assert "on the same rows would need" not in other


@pytest.mark.parametrize(("gibibytes", "status"), [(24, 422), (400, 302)])
def test_full_fine_tuning_that_cannot_fit_is_refused_in_place(
    gibibytes: int, status: int, alice_client: Client, base_model: BaseModel, version: DatasetVersion, worker: Worker
) -> None:
    base_model.shape = SEVEN_B.model_dump(mode="json")
    base_model.save()
    Worker.objects.update(device_kind="cuda", memory_bytes=gibibytes * 2**30)
    answer = alice_client.post(reverse("jobs:new"), form_data(base_model, version, method="full"))
    assert answer.status_code == status
    assert Job.objects.exists() == (status == 302)
    if status == 422:
        assert "the card has 24.0 GiB. Choose LoRA, which needs about" in answer.text
        assert 'href="#id_method"' in answer.text


def test_an_estimate_of_an_unfinished_form_says_what_is_next(
    alice_client: Client, base_model: BaseModel, version: DatasetVersion, worker: Worker
) -> None:
    answer = alice_client.post(reverse("jobs:estimate"), {"base_model": base_model.pk, "method": "lora"})
    assert answer.status_code == 200
    assert "Choose a dataset</button>" in answer.text
    assert "alert-error" not in answer.text, "what was not touched yet is no error"


def test_without_a_script_the_button_updates_the_estimate(
    alice_client: Client, base_model: BaseModel, version: DatasetVersion, worker: Worker
) -> None:
    data = form_data(base_model, version, update="1", **{"training.epochs": "2"})
    del data["start"]
    answer = alice_client.post(reverse("jobs:new"), data)
    assert answer.status_code == 200
    assert "14 of 8 rows" in answer.text
    assert not Job.objects.exists()


def test_the_new_job_page_shows_every_setting_with_range_and_default(
    alice_client: Client, base_model: BaseModel, version: DatasetVersion, worker: Worker
) -> None:
    page = alice_client.get(reverse("jobs:new"), {"dataset": version.pk}).text
    for name in ("training.learning_rate", "training.seed", "split.held_out_share", "evaluation.max_new_tokens",
                 "settings.lora.rank", "precision"):  # fmt: skip
        assert f'name="{name}"' in page
    assert "Range: at least 1, at most 4,096." in page
    assert "auto → <strong" in page
    assert "Start job" in page


def test_a_running_job_is_complete_without_a_script(make_job: MakeJob, alice_client: Client, worker: Worker) -> None:
    job = run_of(make_job(), worker)
    page = alice_client.get(job.get_absolute_url()).text
    assert "<title>35 % · support" in re.sub(r"\s+", " ", page)
    for expected in ("Step 35 of 100", "1.25", "1.50", "0.700", "Stop and keep", "Stop and discard", "CPU, 2 cores"):
        assert expected in page, expected
    assert f'hx-sse:connect="{reverse("jobs:events", args=[job.pk])}"' in page


def test_a_waiting_job_says_why_and_its_place(make_job: MakeJob, alice_client: Client) -> None:
    make_job("first")
    page = alice_client.get(make_job("second").get_absolute_url()).text
    assert "Number 2 in the queue." in page
    assert "No worker is running" in page


def test_a_failed_job_says_why_what_to_do_and_can_be_retried_once(
    make_job: MakeJob, bob_client: Client, worker: Worker
) -> None:
    job = run_of(make_job(), worker, state=JobState.FAILED, lease_until=None, finished_at=timezone.now(),
                 failure_code="out_of_memory", failure_message="Needed 27 GiB.",
                 failure_next_step="Halve the batch.")  # fmt: skip
    page = bob_client.get(job.get_absolute_url()).text
    for expected in ("Needed 27 GiB.", "Halve the batch.", "out_of_memory", "Retry"):
        assert expected in page
    assert "hx-sse:connect" not in page
    for _ in range(2):
        bob_client.post(reverse("jobs:retry", args=[job.pk]), {"idempotency_key": "again"})
    assert Job.objects.get(parent=job).state == JobState.QUEUED


def test_a_finished_job_compares_with_the_base_and_leads_to_its_adapter(
    make_job: MakeJob, alice_client: Client, worker: Worker, team: Team, alice: User, base_model: BaseModel,
    version: DatasetVersion,
) -> None:  # fmt: skip
    adapter = make_adapter(team, alice, base_model=base_model, dataset_version=version)
    job = run_of(make_job(), worker, state=JobState.SUCCEEDED, lease_until=None, adapter=adapter,
                 started_at=timezone.now() - timedelta(minutes=31), finished_at=timezone.now())  # fmt: skip
    page = alice_client.get(job.get_absolute_url()).text
    assert "Done in 31 min" in page
    assert "Held-out loss 1.92 → 1.32" in page
    assert adapter.get_absolute_url() in page


def test_stopping_asks_the_worker_and_cancelling_takes_out_of_the_queue(
    make_job: MakeJob, bob_client: Client, worker: Worker
) -> None:
    running, waiting = run_of(make_job("one"), worker), make_job("two")
    bob_client.post(reverse("jobs:cancel", args=[running.pk]), {"mode": "keep"})
    answer = bob_client.post(reverse("jobs:cancel", args=[waiting.pk]), {"mode": "now", "next": "list"})
    running.refresh_from_db()
    waiting.refresh_from_db()
    assert (running.state, running.stop_mode) == (JobState.CANCELLING, "keep")
    assert waiting.state == JobState.CANCELLED
    assert answer["Location"] == reverse("jobs:list")


def test_what_is_to_be_kept_can_still_be_discarded_on_the_page(
    make_job: MakeJob, bob_client: Client, worker: Worker
) -> None:
    job = run_of(make_job(), worker, state=JobState.CANCELLING, stop_mode="keep")
    page = bob_client.get(job.get_absolute_url()).text
    assert "Discard instead" in page
    assert "Stop and keep" not in page
    bob_client.post(reverse("jobs:cancel", args=[job.pk]), {"mode": "now"})
    job.refresh_from_db()
    assert (job.state, job.stop_mode) == (JobState.CANCELLING, "now")
    assert "Discard instead" not in bob_client.get(job.get_absolute_url()).text


def test_keeping_what_has_no_checkpoint_is_refused_and_discards_nothing(
    make_job: MakeJob, bob_client: Client, worker: Worker
) -> None:
    job = run_of(make_job(), worker, state=JobState.RETRY_WAIT, phase="", lease_until=None)
    page = bob_client.post(reverse("jobs:cancel", args=[job.pk]), {"mode": "keep"}, follow=True)
    assert "It has no checkpoint yet, so there is nothing to keep." in page.text
    job.refresh_from_db()
    assert (job.state, job.stop_mode) == (JobState.RETRY_WAIT, "")


def test_an_unknown_way_to_stop_is_explained(make_job: MakeJob, bob_client: Client) -> None:
    job = make_job()
    page = bob_client.post(reverse("jobs:cancel", args=[job.pk]), {"mode": "explode"}, follow=True)
    assert "There is no way to stop called" in page.text
    job.refresh_from_db()
    assert job.state == JobState.QUEUED


def test_the_list_filters_by_state_and_owner_and_ignores_nonsense(
    make_job: MakeJob, bob: User, bob_client: Client, worker: Worker
) -> None:
    make_job("of-alice")
    make_job("of-bob", created_by=bob)
    run_of(make_job("broken"), worker, state=JobState.FAILED, lease_until=None, finished_at=timezone.now())
    names = ("of-alice", "of-bob", "broken")

    def shown(**query: str) -> list[str]:
        page = bob_client.get(reverse("jobs:list"), query).text
        return [name for name in names if f">{name}<" in page]

    assert shown() == list(names)
    assert shown(mine="1") == ["of-bob"]
    assert shown(state="failed") == ["broken"]
    assert shown(state="active") == ["of-alice", "of-bob"]
    assert shown(state="'; drop") == list(names)
    assert "No job matches" in bob_client.get(reverse("jobs:list"), {"state": "succeeded"}).text


def test_the_list_cuts_finished_jobs_only_and_keeps_the_order_of_the_queue(
    make_job: MakeJob, alice_client: Client, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(views, "MAX_LISTED", 2)
    run_of(make_job("runs"), worker)
    for name in ("first", "second", "third"):
        make_job(name)
    for name in ("oldest", "older", "newer"):
        make_job(name, state=JobState.FAILED, finished_at=timezone.now())
    page = alice_client.get(reverse("jobs:list")).text
    shown = re.findall(r">(runs|first|second|third|oldest|older|newer)</a>", page)
    assert shown == ["runs", "first", "second", "third", "newer", "older"]
    older = html.unescape(re.search(r'rel="next" href="([^"]+)"', page)[1])  # type: ignore[index]
    page = alice_client.get(reverse("jobs:list") + older).text
    assert re.findall(r">(runs|first|second|third|oldest|older|newer)</a>", page) == [
        "runs", "first", "second", "third", "oldest",
    ]  # fmt: skip
    assert 'rel="next"' not in page
    for nonsense in ("x", "2026-01-01", "0001-01-01T00:00:00+14:00", "2026-01-01T00:00:00%2B00:00"):
        assert alice_client.get(f"{reverse('jobs:list')}?older_than={nonsense}").status_code == 200
    assert "are shown" not in alice_client.get(reverse("jobs:list"), {"state": "active"}).text


def test_the_list_refreshes_itself_with_its_own_fragment(make_job: MakeJob, alice_client: Client) -> None:
    make_job()
    whole = alice_client.get(reverse("jobs:list")).text
    part = alice_client.get(reverse("jobs:list"), headers={"HX-Request": "true", "HX-Target": "section#job-list"}).text
    assert part.lstrip().startswith('<section id="job-list"')
    assert "<html" not in part
    assert "<html" in whole


def test_points_are_json_for_the_chart_and_a_table_for_reading(
    make_job: MakeJob, alice_client: Client, worker: Worker
) -> None:
    job = run_of(make_job(), worker)
    found = alice_client.get(reverse("jobs:points", args=[job.pk])).json()
    assert found["columns"][:3] == ["step", "loss", "validation_loss"]
    assert [row[:3] for row in found["points"]] == [[30, None, 1.5], [35, 1.25, None]]
    assert "1.250" in alice_client.get(reverse("jobs:point_table", args=[job.pk])).text


@pytest.mark.parametrize("state", ["queued", "handed_back", "retry_wait", "paused", "running", "failed", "succeeded"])
def test_a_page_costs_at_most_eight_queries(
    state: str, make_job: MakeJob, alice: User, alice_client: Client, worker: Worker, team: Team,
    base_model: BaseModel, version: DatasetVersion, django_assert_max_num_queries: DjangoAssertNumQueries,
) -> None:  # fmt: skip
    for name in ("one", "two", "three"):
        job = make_job(name)
        if state == "running":
            run_of(job, worker)
        if state in {"handed_back", "retry_wait", "paused"}:
            waits = "queued" if state == "handed_back" else state
            run_of(job, worker, state=waits, phase="", lease_until=None)
        if state == "failed":
            run_of(job, worker, state=state, lease_until=None, finished_at=timezone.now())
        if state == "succeeded":
            adapter = make_adapter(team, alice, base_model=base_model, dataset_version=version)
            run_of(job, worker, state=state, lease_until=None, adapter=adapter, finished_at=timezone.now())
    for url in (job.get_absolute_url(), reverse("jobs:list"), reverse("home"),
                f"{reverse('jobs:new')}?dataset={version.pk}", f"{reverse('jobs:new')}?from={job.pk}"):  # fmt: skip
        with django_assert_max_num_queries(PAGE_QUERIES):
            assert alice_client.get(url).status_code == 200, url


def test_a_job_that_does_not_exist_is_a_404(alice_client: Client) -> None:
    assert alice_client.get(reverse("jobs:detail", args=[uuid4()])).status_code == 404
    assert alice_client.get(reverse("jobs:new"), {"from": "not-a-uuid"}).status_code == 404


def test_roles_are_those_of_the_current_team(alice: User, other_team: Team, make_job: MakeJob) -> None:
    Membership.objects.create(user=alice, team=other_team, role=Role.VIEWER)
    client = signed_in(alice)
    job = make_job()
    session = client.session
    session["team_id"] = other_team.pk
    session.save()
    assert client.get(job.get_absolute_url()).status_code == 404

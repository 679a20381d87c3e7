"""Every failure has a code, a sentence, a next step, a rule for trying again and, where one exists, a button."""

from __future__ import annotations

import importlib
import math
import pkgutil
import re
import signal
import subprocess
import sys
import uuid
from datetime import timedelta
from pathlib import Path

import pytest
from django.conf import settings
from django.db.models.functions import Now
from django.test import Client
from django.urls import reverse

import workers
from jobs import failures, lifecycle, scheduling
from jobs.failures import KINDS, Ending, backoff_seconds, explain
from jobs.host_memory import HostMemoryWatch, own_groups
from jobs.mending import ACTIONS, actions_for
from jobs.models import Job, JobAttempt, JobState, MetricPoint
from jobs.queueing import queue_job
from studio.accounts.models import ApiToken, AuditEvent, Team, User
from tests.factories import make_base_model, make_dataset_version
from tests.factories import make_recipe as make_real_recipe
from tests.jobs.making import make_job, make_running_job, make_worker
from workers import errors
from workers.checkpoints import DiskFullError
from workers.events import FailedEvent
from workers.recipe import Recipe


def said(code: str, message: str = "It broke.", **values: object) -> Ending:
    return Ending(reported=FailedEvent(code=code, message=message, **values), exit_status=1)  # type: ignore[arg-type]


def import_everything() -> None:
    for module in pkgutil.walk_packages(workers.__path__, "workers."):
        # Of kernels, which raise nothing of ours, and are there only where a GPU's compiler is.
        if not module.name.endswith(("__main__", ".kernels", ".dropped_products", ".row_attention")):
            importlib.import_module(module.name)


def subclasses(kind: type[errors.ExplainedError]) -> set[str]:
    return {kind.code}.union(
        *(subclasses(one) for one in kind.__subclasses__() if one.__module__.startswith("workers"))
    )


# --- the table --------------------------------------------------------------------------------------------------------


def test_every_error_that_a_trainer_can_raise_is_in_the_table() -> None:
    import_everything()
    assert DiskFullError.code in KINDS
    # Commands of their own, which no trainer runs: merging, correcting files, and the evaluation harness.
    others = {"cannot_merge", "not_written", "harness", "unreadable_harness_results"}
    assert subclasses(errors.ExplainedError) - others <= KINDS.keys()


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.code)
def test_every_failure_has_a_sentence_a_next_step_and_actions_that_exist(kind: failures.Kind) -> None:
    assert re.fullmatch(r"[A-Z].*\.", kind.sentence)
    assert re.fullmatch(r"[A-Z].*\.", kind.next_step)
    assert set(kind.actions) <= ACTIONS.keys()


@pytest.mark.parametrize(
    ("ending", "code", "retry", "counted"),
    [
        (Ending(exit_status=-9), "process_lost", True, True),
        (Ending(exit_status=-11), "process_lost", True, True),
        (Ending(exit_status=-9, host_memory=(10 * 2**30, 11 * 2**30)), "host_oom", True, True),
        (Ending(exit_status=-9, stalled=(900, "in step 8")), "stalled", True, True),
        (Ending(exit_status=1), "crashed", True, True),
        (said("internal"), "internal", True, True),
        (said("gpu_error"), "gpu_error", True, True),
        (said("disk_full"), "disk_full", True, False),
        (said("storage"), "storage", True, False),
        (said("diverged"), "diverged", False, True),
        (said("unreadable_dataset"), "unreadable_dataset", False, True),
        (said("unusable_base_model"), "unusable_base_model", False, True),
        (said("invalid_recipe"), "invalid_recipe", False, True),
        (said("of_a_newer_trainer"), "of_a_newer_trainer", False, True),
        (said("out_of_memory", details={"micro_batch_size": 4}), "out_of_memory", True, True),
        (said("out_of_memory", details={"micro_batch_size": 1}), "out_of_memory", False, True),
        (said("out_of_memory", details={"micro_batch_size": 1, "plans_with_less": True}), "out_of_memory", True, True),
        (said("out_of_memory"), "out_of_memory", False, True),
        (Ending(exit_status=-9, gpu_fault="GPU 0 reports Xid 79"), "gpu_error", True, True),
    ],
)
def test_the_end_of_a_trainer_becomes_its_class(ending: Ending, code: str, retry: bool, counted: bool) -> None:
    found = explain(ending)
    assert (found.code, found.retry, found.counted) == (code, retry, counted)
    assert "{" not in found.message + found.next_step
    assert found.next_step


def test_a_host_out_of_memory_names_both_numbers() -> None:
    found = explain(Ending(exit_status=-9, host_memory=(round(10.5 * 2**30), 11 * 2**30)))
    assert "10.5 GiB of 11.0 GiB" in found.message


def test_out_of_memory_asks_for_half_the_rows_at_once() -> None:
    assert explain(said("out_of_memory", details={"micro_batch_size": 8})).micro_batch_size == 4
    assert explain(said("out_of_memory", details={"micro_batch_size": 3})).micro_batch_size == 1
    assert explain(said("out_of_memory", details={"micro_batch_size": 1})).micro_batch_size is None


def test_what_plans_by_memory_is_tried_again_with_one_row_that_did_not_fit() -> None:
    details = {"micro_batch_size": 1, "plans_with_less": True}
    assert explain(said("out_of_memory", details=details)).micro_batch_size == 1


def test_waits_are_those_of_the_table_a_fifth_more_or_less() -> None:
    for number, seconds in ((1, 10), (2, 60), (3, 300), (4, 900), (9, 900)):
        waits = [backoff_seconds(number, share=1) for _ in range(200)]
        assert 0.8 * seconds <= min(waits) < max(waits) <= 1.2 * seconds
        assert max(waits) - min(waits) > 0.1 * seconds, "jobs that failed together do not come back together"


# --- what the queue does ----------------------------------------------------------------------------------------------


def end_attempt(job: Job, code: str, *, gains: int = 0, **values: object) -> Job:
    """Claim a job and end the attempt with a failure; `gains` is the step that it reached."""
    Job.objects.filter(pk=job.pk).update(not_before=Now())
    claimed = lifecycle.claim(job, make_worker())
    assert claimed is not None
    if gains:
        point = MetricPoint(job=job, attempt=claimed.attempt, step=gains, loss=1.0, at=lifecycle.database_now())
        lifecycle.store_progress(job.pk, claimed.attempt, [point], [])
    lifecycle.retry_later(
        job.pk, claimed.attempt, code=code, message="It broke.", counted=code not in failures.UNCOUNTED, **values
    )  # type: ignore[arg-type]
    job.refresh_from_db()
    return job


@pytest.mark.parametrize("code", ["out_of_memory", "host_oom", "stalled"])
def test_what_is_retried_once_fails_at_the_second_time(team: Team, bob: User, code: str) -> None:
    job = end_attempt(make_job(team, bob), code, gains=5)
    assert job.state == JobState.RETRY_WAIT
    job = end_attempt(job, code, gains=9, next_step="Do this.")
    assert (job.state, job.failure_code, job.failure_next_step) == (JobState.FAILED, code, "Do this.")
    assert "tried again once" in job.failure_message


def test_another_kind_of_failure_between_does_not_give_a_second_retry(team: Team, bob: User) -> None:
    job = make_job(team, bob)
    for gains, code in enumerate(("stalled", "process_lost", "stalled"), start=1):
        job = end_attempt(job, code, gains=gains)
    assert (job.state, job.failure_code) == (JobState.FAILED, "stalled")


def test_half_the_rows_at_once_are_on_the_job_and_in_its_events(team: Team, bob: User) -> None:
    job = end_attempt(make_job(team, bob), "out_of_memory", gains=5, micro_batch_size=2)
    assert job.micro_batch_size == 2
    text = job.events.last().text
    batch = job.recipe["training"]["batch_size"]
    assert f"with 2 rows in memory at once and {math.ceil(batch / 2)} such micro-batches to a step" in text
    assert f"the batch stays {batch}" in text


def test_a_job_that_gains_nothing_is_poison_and_keeps_its_attempts(team: Team, bob: User) -> None:
    job = make_job(team, bob)
    for _ in range(lifecycle.POISON_ATTEMPTS):
        job = end_attempt(job, "crashed")
    assert (job.state, job.failure_code) == (JobState.FAILED, "poison")
    assert job.failure_next_step == KINDS["poison"].next_step
    assert {one.failure_code for one in job.attempts.all()} == {"crashed"}


def test_a_waiting_job_says_what_failed_and_a_running_one_does_not_any_more(team: Team, bob: User) -> None:
    job = end_attempt(make_job(team, bob), "process_lost", gains=1)
    assert (job.failure_code, job.failure_message) == ("process_lost", "It broke.")
    Job.objects.filter(pk=job.pk).update(not_before=Now())
    claimed = lifecycle.claim(job, make_worker())
    assert (claimed.failure_code, claimed.failure_message, claimed.failure_next_step) == ("", "", "")


def test_a_job_goes_on_when_there_is_room_again_and_not_before(team: Team, bob: User) -> None:
    job = end_attempt(make_job(team, bob), "disk_full")
    Job.objects.filter(pk=job.pk).update(not_before=Now() + timedelta(hours=1))
    other = end_attempt(make_job(team, bob, name="other"), "process_lost")
    Job.objects.filter(pk=other.pk).update(not_before=Now() + timedelta(hours=1))
    assert lifecycle.release_for_space(lambda _: True) == 0, "not at once: it would be full again"
    JobAttempt.objects.update(ended_at=Now() - timedelta(minutes=5))
    assert lifecycle.release_for_space(lambda _: False) == 0
    assert lifecycle.release_for_space(lambda _: True) == 1
    job.refresh_from_db()
    other.refresh_from_db()
    now = lifecycle.database_now()
    assert job.not_before <= now < other.not_before
    assert job.failures_counted == 0
    assert "room on the disk again" in job.events.last().text


def test_a_quarantined_worker_gets_no_job_and_another_does(team: Team, bob: User) -> None:
    job, bad, good = make_job(team, bob), make_worker(0), make_worker(1)
    lifecycle.quarantine(bad, "The GPU failed: Xid 79.")
    assert scheduling.next_job(bad) is None
    claimed = scheduling.next_job(good)
    assert claimed is not None
    assert claimed.pk == job.pk
    bad.refresh_from_db()
    share = settings.LEASE_SECONDS / 60
    seconds = (bad.quarantined_until - lifecycle.database_now()).total_seconds()
    assert seconds == pytest.approx(lifecycle.QUARANTINE_SECONDS * share, abs=20)
    type(bad).objects.filter(pk=bad.pk).update(quarantined_until=Now() - timedelta(seconds=1))
    make_job(team, bob, name="later")
    assert scheduling.next_job(bad) is not None


# --- memory of the machine --------------------------------------------------------------------------------------------


def test_a_kill_that_the_control_group_counted_is_for_want_of_memory(tmp_path: Path) -> None:
    (tmp_path / "memory.events").write_text("low 0\noom 1\noom_kill 1\n")
    (tmp_path / "memory.max").write_text(f"{2**30}\n")
    watch = HostMemoryWatch([tmp_path])
    assert watch.was_short() is None
    (tmp_path / "memory.events").write_text("low 0\noom 2\noom_kill 2\n")
    assert watch.was_short() == (0, 2**30)


def test_a_process_that_was_about_to_fill_its_limit_was_killed_for_it(tmp_path: Path) -> None:
    """A real process that grows to 200 MiB under a limit of 210, and under one of a GiB."""
    (tmp_path / "memory.max").write_text(f"{210 * 2**20}\n")
    grown = "import sys; held = bytearray(190 * 2**20); print('grown', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", grown], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        short, ample = HostMemoryWatch([tmp_path]), HostMemoryWatch([])
        short.look(process.pid)
        ample.look(process.pid)
        process.send_signal(signal.SIGKILL)
    short.look(process.pid)
    assert short.peak_bytes > 190 * 2**20
    assert short.was_short() == (short.peak_bytes, 210 * 2**20)
    assert ample.was_short() is None


def test_the_control_group_is_found_in_both_versions(tmp_path: Path) -> None:
    (tmp_path / "memory" / "job").mkdir(parents=True)
    (tmp_path / "unit").mkdir()
    assert own_groups("0::/unit\n", tmp_path) == [tmp_path / "unit", tmp_path]
    listing = "4:memory:/job\n1:cpu:/\n"
    assert own_groups(listing, tmp_path) == [tmp_path / "memory" / "job", tmp_path / "memory"]
    assert own_groups("0::/elsewhere\n", tmp_path) == [tmp_path]


# --- buttons ----------------------------------------------------------------------------------------------------------


def make_failed(team: Team, user: User, code: str, **recipe_changes: object) -> Job:
    """A job on a real base and dataset that has failed."""
    base_model, version = make_base_model(), make_dataset_version(team, user)
    recipe = make_real_recipe(base_model, version, **{"precision": "float32", **recipe_changes})
    ran = recipe.model_copy(
        update={
            "training": recipe.training.model_copy(
                update={
                    "learning_rate": 2e-4, "micro_batch_size": 4, "packing": False, "gradient_checkpointing": False,
                    "checkpoint_every_steps": 5, "validate_every_steps": 0,
                }
            )
        }
    )  # fmt: skip
    job = queue_job(
        team=team, user=user, recipe=ran, asked_recipe=recipe, base_model=base_model, dataset_version=version,
        idempotency_key=uuid.uuid4().hex,
    )  # fmt: skip
    claimed = lifecycle.claim(job, make_worker())
    assert claimed is not None
    lifecycle.fail(job.pk, claimed.attempt, code=code, message="It broke.", next_step="Mend it.")
    job.refresh_from_db()
    return job


@pytest.mark.usefixtures("data_dir")
@pytest.mark.parametrize(
    ("code", "action", "field", "value"),
    [
        ("out_of_memory", "half_micro_batch", "training.micro_batch_size", 2),
        ("out_of_memory", "gradient_checkpointing", "training.gradient_checkpointing", True),
        ("out_of_memory", "qlora", "method", "qlora"),
        ("out_of_memory", "half_length", "training.max_length", 512),
        ("host_oom", "half_micro_batch", "training.micro_batch_size", 2),
        ("diverged", "tenth_learning_rate", "training.learning_rate", 2e-5),
        ("stalled", "as_it_is", "method", "lora"),
    ],
)
def test_a_button_runs_the_job_again_with_its_one_change(
    team: Team, bob: User, bob_client: Client, code: str, action: str, field: str, value: object
) -> None:
    job = make_failed(team, bob, code)
    page = bob_client.get(job.get_absolute_url()).content.decode()
    url = reverse("jobs:again", args=[job.pk, action])
    if action != "as_it_is":  # that is the button Retry
        assert url in page
    answer = bob_client.post(url, {"idempotency_key": "once"})
    again = Job.objects.get(parent=job)
    assert answer.url == again.get_absolute_url()
    asked = again.asked_recipe
    found = asked["training"][field.removeprefix("training.")] if field.startswith("training.") else asked[field]
    assert found == value
    before = Recipe.from_dict(job.asked_recipe).to_dict()
    changed = {name for name in before if before[name] != asked[name]}
    assert changed <= {field.split(".")[0], "precision", "settings"}
    assert again.state == JobState.QUEUED
    assert "auto" not in again.recipe["training"].values(), "it was planned as the form plans a job"
    assert AuditEvent.objects.filter(action="job.queued", object_id=str(again.pk)).exists()
    bob_client.post(url, {"idempotency_key": "once"})
    assert Job.objects.filter(parent=job).count() == 1, "a second press of the same button makes no second job"


@pytest.mark.usefixtures("data_dir")
def test_a_button_is_only_offered_where_it_changes_something(team: Team, bob: User) -> None:
    job = make_failed(team, bob, "out_of_memory")
    Job.objects.filter(pk=job.pk).update(micro_batch_size=1)
    job.refresh_from_db()
    assert "half_micro_batch" not in {one.name for one in actions_for(job)}
    assert [one.label for one in actions_for(make_failed(team, bob, "diverged"))] == [
        "Run again with a learning rate of 2e-05, a tenth"
    ]
    assert actions_for(make_job(team, bob)) == []


@pytest.mark.usefixtures("data_dir")
def test_nobody_else_may_press_it(team: Team, bob: User, charlie_client: Client, bob_client: Client) -> None:
    job = make_failed(team, bob, "diverged")
    url = reverse("jobs:again", args=[job.pk, "tenth_learning_rate"])
    assert charlie_client.post(url).status_code == 404
    bob.memberships.update(role="viewer")
    assert bob_client.post(url).status_code == 403
    assert "tenth_learning_rate" not in bob_client.get(job.get_absolute_url()).content.decode()
    assert not Job.objects.filter(parent=job).exists()


@pytest.mark.usefixtures("data_dir")
def test_an_action_that_is_not_offered_is_refused_with_what_is(team: Team, bob: User, bob_client: Client) -> None:
    job = make_failed(team, bob, "diverged")
    answer = bob_client.post(reverse("jobs:again", args=[job.pk, "qlora"]), follow=True)
    assert "tenth_learning_rate" in answer.content.decode()
    assert not Job.objects.filter(parent=job).exists()


@pytest.mark.usefixtures("data_dir")
def test_the_api_offers_and_takes_the_same_actions(team: Team, bob: User, client: Client) -> None:
    job = make_failed(team, bob, "out_of_memory")
    _, secret = ApiToken.issue(team=team, user=bob, name="ci", scopes=["read", "write"])
    headers = {"Authorization": f"Bearer {secret}"}
    offered = client.get(f"/api/v1/jobs/{job.pk}/", headers=headers).json()["failure_actions"]
    assert offered[0] == {"name": "half_micro_batch", "label": "Run again with a micro-batch of 2"}
    for status in (201, 201):
        answer = client.post(
            f"/api/v1/jobs/{job.pk}/again/", {"action": "qlora"}, content_type="application/json",
            headers=headers | {"Idempotency-Key": "same"},
        )  # fmt: skip
        assert answer.status_code == status
    assert answer.json()["recipe"]["method"] == "qlora"
    assert Job.objects.filter(parent=job).count() == 1
    refused = client.post(
        f"/api/v1/jobs/{job.pk}/again/", {"action": "nonsense"}, content_type="application/json", headers=headers
    )
    assert refused.status_code == 422
    assert '"half_micro_batch"' in refused.json()["error"]["help"]


def test_the_page_says_which_attempt_and_from_which_step(team: Team, bob: User, bob_client: Client) -> None:
    job = end_attempt(make_job(team, bob), "out_of_memory", gains=410, micro_batch_size=2)
    Job.objects.filter(pk=job.pk).update(not_before=Now())
    claimed = lifecycle.claim(job, make_worker())
    lifecycle.note_attempt(
        job.pk, claimed.attempt, from_step=400, peak_memory_bytes=1, micro_batch_size=2, accumulation=4
    )
    page = bob_client.get(job.get_absolute_url()).content.decode()
    budget = settings.MAX_ATTEMPTS
    assert f"Attempt 2 of {budget}, resumed at step 400, with 2 rows in memory at once." in page
    assert "2 \N{MULTIPLICATION SIGN} 4" in page
    assert "In the first step" not in page


def test_the_page_says_what_bounds_the_tokens_of_a_micro_batch(team: Team, bob: User, bob_client: Client) -> None:
    job = make_running_job(team, bob)
    lifecycle.note_attempt(
        job.pk, job.attempt, from_step=0, peak_memory_bytes=1, micro_batch_size=6, accumulation=3,
        micro_batch_tokens=4096,
    )  # fmt: skip
    page = bob_client.get(job.get_absolute_url()).content.decode()
    assert "≤ 6 \N{MULTIPLICATION SIGN} 3" in page
    assert ">≤ 4,096 tokens<" in page


def test_another_try_of_a_job_whose_tokens_are_bounded_does_not_say_how_it_will_be_divided(
    team: Team, bob: User
) -> None:
    job = make_running_job(team, bob)
    Job.objects.filter(pk=job.pk).update(plan={"micro_batch_tokens": 4096})
    lifecycle.retry_later(
        job.pk, job.attempt, code="out_of_memory", message="It held 20.0 GiB.", counted=True, micro_batch_size=2
    )
    text = job.events.order_by("-sequence").values_list("text", flat=True)[0]
    assert "with at most 2 rows in memory at once, and fewer tokens; the batch stays" in text
    assert "such micro-batches" not in text


def test_a_first_attempt_is_not_counted_out(team: Team, bob: User, bob_client: Client) -> None:
    job = make_running_job(team, bob)
    assert "Attempt 1 of" not in bob_client.get(job.get_absolute_url()).content.decode()

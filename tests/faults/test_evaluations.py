"""Evaluations are jobs like any other: queued, claimed, fenced, killed and done all the same."""

from __future__ import annotations

import uuid
from collections.abc import Callable

import pytest
from django.urls import reverse

from jobs import sweeping
from jobs.evaluating import queue_evaluation
from jobs.models import Job, JobKind, JobState
from studio import storage
from studio.accounts.models import Team, User
from studio.catalogue.models import BaseModel, Suite, TestSet
from studio.catalogue.suites import make_suite
from studio.datasets.models import DatasetVersion
from tests.conftest import signed_in
from tests.faults.invariants import broken_invariants
from tests.faults.quick import describe, expire_leases, wait_until_final
from tests.faults.slot_workers import SlotWorkers
from workers.verdicts import Verdict

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("data_dir")]


@pytest.fixture
def suite(team: Team, bob: User, version: DatasetVersion) -> Suite:
    return make_suite(
        team=team, user=bob, name="faq", dataset_version=version, max_rows=12, is_guardrail=True,
        evaluation={"metrics": ["loss", "token_f1"], "num_generated": 2, "max_new_tokens": 8},
    )  # fmt: skip


def on(suite: Suite, bob: User, base_model: BaseModel) -> Job:
    return queue_evaluation(
        team=suite.team, user=bob, suite=suite, base_model=base_model, idempotency_key=uuid.uuid4().hex
    )


def test_a_new_adapter_is_scored_on_the_guardrail_by_itself(
    queue: Callable[..., Job], suite: Suite, workers: SlotWorkers, bob: User
) -> None:
    training = queue(max_steps=2)
    workers.start("slot", is_real=True)
    adapter = wait_until_final(training).adapter
    assert adapter is not None, describe(training)
    guard = Job.objects.get(kind=JobKind.EVALUATE)
    run = wait_until_final(guard).evaluation_run
    assert run is not None, describe(guard)
    assert (run.adapter, run.suite, run.test_set, run.num_rows, run.num_scored) == (
        adapter,
        suite,
        TestSet.SUITE,
        12,
        12,
    )
    assert {score.evaluation for score in run.scores.all()} == {"loss", "token_f1"}
    assert run.row_counts.lines == list(range(1, 13))
    assert [score.test_set for score in adapter.held_out_scores()] == [TestSet.HELD_OUT] * 2, "they stay apart"
    assert (storage.adapter_folder(run.folder) / "result.json").is_file()
    assert broken_invariants() == []
    page = signed_in(bob).get(guard.get_absolute_url())
    assert "Open the suite" in page.text
    assert "Curves" not in page.text
    assert f"{adapter.name} v1" in signed_in(bob).get(suite.get_absolute_url()).text


def test_a_killed_trainer_costs_an_evaluation_an_attempt_and_nothing_else(
    suite: Suite, workers: SlotWorkers, bob: User, base_model: BaseModel
) -> None:
    job = on(suite, bob, base_model)
    workers.start("slot", is_real=True, failpoints="register.before_keep=kill").wait()
    assert workers.has_fired("register.before_keep")
    expire_leases()
    sweeping.sweep()
    workers.start("slot", is_real=True)
    ended = wait_until_final(job)
    assert ended.state == JobState.SUCCEEDED, describe(job)
    assert ended.evaluation_run is not None
    assert ended.evaluation_run.adapter is None
    assert set(ended.evaluation_run.base_figures) == {"loss", "token_f1"}
    assert broken_invariants() == []


def test_half_a_test_set_cannot_be_kept(suite: Suite, bob: User, base_model: BaseModel) -> None:
    job = on(suite, bob, base_model)
    page = signed_in(bob).post(reverse("jobs:cancel", args=[job.pk]), {"mode": "keep"}, follow=True)
    assert "Half a test set is no score" in page.text
    job.refresh_from_db()
    assert job.state == JobState.QUEUED


def test_an_equal_model_is_told_to_be_equal(
    suite: Suite, workers: SlotWorkers, bob: User, queue: Callable[..., Job]
) -> None:
    """A learning rate of almost nothing leaves the base as it is, and no figure says otherwise."""
    training = queue(max_steps=1, learning_rate=1e-9)
    workers.start("slot", is_real=True)
    assert wait_until_final(training).adapter is not None, describe(training)
    run = wait_until_final(Job.objects.get(kind=JobKind.EVALUATE)).evaluation_run
    assert run is not None
    assert {score.verdict() for score in run.scores.all()} <= {Verdict.NO_DIFFERENCE, Verdict.TOO_FEW_ROWS}

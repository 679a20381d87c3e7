"""Queueing, stopping and running again."""

from __future__ import annotations

import pytest

from jobs.actions import ActionError
from jobs.models import Job, JobState
from jobs.queueing import IdempotencyConflictError, cancel_job, queue_job, retry_job
from studio.accounts.models import AuditEvent, Team, User
from studio.catalogue.models import BaseModel
from studio.datasets.models import DatasetVersion, VersionState
from tests.jobs.making import make_job, make_ready_version, make_recipe, make_running_job
from workers.errors import RecipeError


@pytest.fixture
def base_model(db: None) -> BaseModel:
    return BaseModel.objects.create(name="tiny", folder="/nowhere", revision="1" * 64)


def test_two_submits_of_one_form_make_one_job(team: Team, bob: User, base_model: BaseModel) -> None:
    version = make_ready_version(team, bob)
    asked = {"team": team, "user": bob, "recipe": make_recipe(), "base_model": base_model, "dataset_version": version}
    first, second = queue_job(**asked, idempotency_key="a"), queue_job(**asked, idempotency_key="a")
    assert first.pk == second.pk
    assert queue_job(**asked, idempotency_key="b").pk != first.pk


def test_a_key_that_comes_back_with_another_recipe_swallows_nothing(
    team: Team, bob: User, base_model: BaseModel
) -> None:
    version = make_ready_version(team, bob)
    asked = {"team": team, "user": bob, "base_model": base_model, "dataset_version": version, "idempotency_key": "a"}
    queue_job(**asked, recipe=make_recipe())
    with pytest.raises(IdempotencyConflictError, match="another one"):
        queue_job(**asked, recipe=make_recipe(learning_rate=0.5))


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("deleted", ["dataset", "base_model"])
def test_what_is_deleted_between_the_look_and_the_insert_is_explained(team: Team, bob: User, deleted: str) -> None:
    base_model = BaseModel.objects.create(name="tiny", folder="/nowhere", revision="1" * 64)
    version = make_ready_version(team, bob)
    if deleted == "dataset":
        DatasetVersion.objects.filter(pk=version.pk).delete()
    else:
        BaseModel.objects.filter(pk=base_model.pk).delete()
    with pytest.raises(RecipeError, match="was deleted at this moment") as raised:
        queue_job(
            team=team, user=bob, recipe=make_recipe(), base_model=base_model,
            dataset_version=version, idempotency_key="a",
        )  # fmt: skip
    assert raised.value.field == deleted
    assert not Job.objects.exists()


def test_another_teams_dataset_does_not_exist(
    team: Team, bob: User, other_team: Team, charlie: User, base_model: BaseModel
) -> None:
    theirs = make_ready_version(other_team, charlie)
    with pytest.raises(RecipeError, match="no such dataset"):
        queue_job(
            team=team, user=bob, recipe=make_recipe(), base_model=base_model,
            dataset_version=theirs, idempotency_key="a",
        )  # fmt: skip
    assert not Job.objects.exists()


def test_a_dataset_that_is_not_ready_is_refused(team: Team, bob: User, base_model: BaseModel) -> None:
    version = make_ready_version(team, bob)
    version.state = VersionState.INSPECTING
    with pytest.raises(RecipeError, match="not ready"):
        queue_job(
            team=team, user=bob, recipe=make_recipe(), base_model=base_model,
            dataset_version=version, idempotency_key="a",
        )  # fmt: skip


def test_stopping_is_recorded_and_may_be_asked_twice(team: Team, bob: User) -> None:
    job = make_running_job(team, bob)
    assert cancel_job(job, bob, "keep")
    assert cancel_job(job, bob, "now"), "keeping may still be given up"
    job.refresh_from_db()
    assert (job.state, job.stop_mode) == (JobState.CANCELLING, "now")
    assert AuditEvent.objects.filter(action="job.stopped").count() == 2


def test_an_unknown_way_to_stop_is_refused(team: Team, bob: User) -> None:
    with pytest.raises(RecipeError, match="no way to stop"):
        cancel_job(make_job(team, bob), bob, "gently")


def test_running_again_makes_a_new_job_with_the_same_recipe(team: Team, bob: User) -> None:
    job = make_job(team, bob)
    with pytest.raises(ActionError, match="only failed and cancelled"):
        retry_job(job, bob, idempotency_key="again")
    cancel_job(job, bob)
    job.refresh_from_db()
    again = retry_job(job, bob, idempotency_key="again")
    assert (again.parent, again.state, again.recipe) == (job, JobState.QUEUED, job.recipe)

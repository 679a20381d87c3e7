"""Evaluations as jobs: an adapter or a base on a team's suite, in the same queue as trainings."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from django.db import transaction

from jobs import lifecycle
from jobs.estimating import choose_device, dataset_facts
from jobs.models import Job, JobKind
from jobs.queueing import queue_job
from studio.accounts.models import ApiToken, Team, User
from studio.catalogue.models import Adapter, BaseModel, Suite
from studio.catalogue.task_suites import checked_definitions
from workers.errors import ExplainedError, RecipeError
from workers.facts import DatasetFacts
from workers.memory import Estimate, estimate
from workers.recipe import BaseModelRef, DatasetRef, EvaluationSettings, Recipe
from workers.resolving import resolve


def queue_evaluation(
    *,
    team: Team,
    user: User,
    suite: Suite,
    idempotency_key: str,
    adapter: Adapter | None = None,
    base_model: BaseModel | None = None,
    token: ApiToken | None = None,
) -> Job:
    """Score an adapter beside its base, or a base alone, on a suite.

    Raises:
        RecipeError: neither or another team's is given, the suite is archived, or its dataset is not ready.
        IdempotencyConflictError: the key belongs to another job.
    """
    base_model = adapter.base_model if adapter is not None else base_model
    if base_model is None or (adapter is not None and adapter.team_id != team.pk) or suite.team_id != team.pk:
        raise RecipeError("There is no such adapter or suite.", field="adapter")
    if suite.archived_at is not None:
        raise RecipeError(
            f"{suite} is archived.", next_step="Take it out of the archive, or use a newer version.", field="suite"
        )
    recipe = evaluation_recipe(suite, adapter, base_model)
    facts = _facts(suite, base_model, recipe)
    shape, device = base_model.model_shape(), choose_device().facts
    resolved = resolve(recipe, shape, facts, device)
    return queue_job(
        team=team, user=user, recipe=resolved, asked_recipe=recipe, base_model=base_model,
        dataset_version=suite.dataset_version, idempotency_key=idempotency_key, token=token,
        estimate=_needs(estimate(resolved, shape, facts, device)), kind=JobKind.EVALUATE, scored_adapter=adapter,
        suite=suite,
    )  # fmt: skip


def _facts(suite: Suite, base_model: BaseModel, recipe: Recipe) -> DatasetFacts:
    """The suite's rows in tokens. Of standard tasks nobody knows them: rows as long as the recipe reads stand for them.

    Raises:
        RecipeError: the task files are not those that the suite was made of, or cannot be run any more.
    """
    if suite.dataset_version is not None:
        return dataset_facts(suite.dataset_version, base_model)[0]
    if checked_definitions(suite.tasks) != suite.evaluation["definitions_sha256"]:
        raise RecipeError(
            f"The task files of {suite} have changed since it was made, so its figures would not compare.",
            next_step="Make its next version, or have the files restored.", field="suite",
        )  # fmt: skip
    longest = min(recipe.training.max_length, base_model.model_shape().context_length)
    return DatasetFacts(num_rows=1, total_tokens=longest, longest=longest)


def evaluation_recipe(suite: Suite, adapter: Adapter | None, base_model: BaseModel) -> Recipe:
    """The recipe of an evaluation: the adapter's own, on the suite's rows and with its metrics."""
    version = suite.dataset_version
    if version is None:
        dataset = DatasetRef(name=", ".join(suite.tasks)[:200], format="lm_eval")
        # The tasks say what is measured.
        evaluation = EvaluationSettings(metrics=(), num_generated=0, general=False)
    else:
        dataset = DatasetRef(
            name=str(version), format=version.format, columns=version.columns or {}, sha256=version.sha256
        )
        evaluation = EvaluationSettings.model_validate(suite.evaluation)
    what = f"{adapter.name} v{adapter.version}" if adapter is not None else base_model.name
    name = f"{what} on {suite}"[:120]
    if adapter is None:
        return Recipe(
            name=name, dataset=dataset, evaluation=evaluation,
            base_model=BaseModelRef(name=base_model.name, revision=base_model.revision),
        )  # fmt: skip
    own = Recipe.from_dict(adapter.recipe)
    # Nothing is trained: by what a best step was chosen need not be among what is measured here.
    training = own.training.model_copy(update={"best_by": "loss"})
    update = {"name": name, "dataset": dataset, "mix": (), "evaluation": evaluation, "training": training}
    return own.model_copy(update=update)


def queue_guardrails(adapter: Adapter, job: Job) -> None:
    """Queue the team's guardrail suites for the adapter that a job has just made, in the transaction of its success.

    A suite that cannot be run is said on the job's page: it does not take the adapter away.
    """
    suites = adapter.team.suites.filter(is_guardrail=True, archived_at=None).select_related("dataset_version__dataset")
    for suite in suites:
        try:
            with transaction.atomic():
                queue_evaluation(
                    team=adapter.team, user=job.created_by, suite=suite, adapter=adapter,
                    idempotency_key=f"guardrail-{suite.pk}-{adapter.pk}",
                )  # fmt: skip
        except ExplainedError as error:
            lifecycle.add_event(job.pk, job.attempt, f"The guardrail {suite} was not queued: {error}", level="warning")


def _needs(training: Estimate) -> dict[str, Any]:
    """The estimate of a training of the same rows without what only training needs."""
    total = training.total_bytes - training.optimizer_bytes
    unknown = {"seconds_low": None, "seconds_high": None, "num_steps": 0}
    return {**asdict(training), "total_bytes": total, "enough_bytes": None, "optimizer_bytes": 0, **unknown}

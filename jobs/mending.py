"""What can be done about a failed job with one button: the same job again, with the one change that helps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jobs.estimating import estimate_values, plan_for
from jobs.failures import kind_of
from jobs.models import Job, JobKind, JobState
from jobs.queueing import queue_job
from studio.accounts.models import ApiToken, User
from workers.errors import RecipeError
from workers.fitting import MIN_LENGTH, in_4_bits
from workers.methods import get_method
from workers.recipe import Recipe


@dataclass(frozen=True)
class Change:
    """A recipe with one thing changed, and the words of the button that runs it."""

    label: str
    recipe: Recipe


@dataclass(frozen=True)
class Action:
    """A change that is offered for a failed job."""

    name: str
    label: str


Changer = Callable[[Recipe, Recipe, Job], Change | None]
"""Takes the recipe as it was asked for, the one that ran, and the job; None where the change would change nothing."""


def _as_it_is(asked: Recipe, _ran: Recipe, _job: Job) -> Change | None:
    return Change("Run again as it is", asked)


def _half_micro_batch(asked: Recipe, ran: Recipe, job: Job) -> Change | None:
    at_once = job.micro_batch_size or ran.training.micro_batch_size
    if not isinstance(at_once, int) or at_once < 2:
        return None
    half = min(at_once, ran.training.batch_size) // 2 or 1
    return Change(f"Run again with a micro-batch of {half}", _with_training(asked, micro_batch_size=half))


def _gradient_checkpointing(asked: Recipe, ran: Recipe, _job: Job) -> Change | None:
    if ran.training.gradient_checkpointing is True or not get_method(ran.method).can_checkpoint_activations:
        return None
    return Change("Run again with gradient checkpointing", _with_training(asked, gradient_checkpointing=True))


def _qlora(asked: Recipe, ran: Recipe, _job: Job) -> Change | None:
    small = in_4_bits(asked) if ran.precision != "nf4" else None
    if small is None:
        return None
    return Change("Run again as QLoRA" if small.method == "qlora" else "Run again on a base in 4 bits", small)


def _half_length(asked: Recipe, ran: Recipe, _job: Job) -> Change | None:
    half = 2 ** ((ran.training.max_length - 1).bit_length() - 1)
    if half < MIN_LENGTH:
        return None
    return Change(f"Run again with rows of at most {half} tokens", _with_training(asked, max_length=half))


def _tenth_learning_rate(asked: Recipe, ran: Recipe, _job: Job) -> Change | None:
    if not isinstance(ran.training.learning_rate, float):
        return None
    tenth = float(f"{ran.training.learning_rate / 10:.2g}")
    return Change(f"Run again with a learning rate of {tenth:g}, a tenth", _with_training(asked, learning_rate=tenth))


def _float32(asked: Recipe, ran: Recipe, _job: Job) -> Change | None:
    if ran.precision != "bfloat16" or "float32" not in get_method(ran.method).precisions:
        return None
    return Change("Run again on a float32 base", asked.model_copy(update={"precision": "float32"}))


ACTIONS: Mapping[str, Changer] = {
    "as_it_is": _as_it_is,
    "half_micro_batch": _half_micro_batch,
    "gradient_checkpointing": _gradient_checkpointing,
    "qlora": _qlora,
    "half_length": _half_length,
    "tenth_learning_rate": _tenth_learning_rate,
    "float32": _float32,
}
"""Every action that jobs.failures.KINDS may name."""


def actions_for(job: Job) -> list[Action]:
    """What is offered for a failed job, the most useful first; nothing for any other."""
    # Every one of them changes how something is trained.
    if job.state != JobState.FAILED or job.kind != JobKind.TRAIN:
        return []
    asked, ran = Recipe.from_dict(job.asked_recipe), Recipe.from_dict(job.recipe)
    changes = ((name, ACTIONS[name](asked, ran, job)) for name in kind_of(job.failure_code).actions)
    return [Action(name, change.label) for name, change in changes if change is not None]


def run_again_with(job: Job, user: User, action: str, *, idempotency_key: str, token: ApiToken | None = None) -> Job:
    """Queue a failed job again with one change, checked as the New job form checks it; the old one stays as it is.

    Raises:
        RecipeError: the job has not failed, the action is not offered for it, or the changed recipe cannot work.
    """
    offered = {one.name for one in actions_for(job)}
    if action not in offered:
        listed = ", ".join(f'"{name}"' for name in sorted(offered)) or "none"
        raise RecipeError(
            f'“{job.name}” is {job.get_state_display().lower()} and cannot be run again with "{action}".',
            next_step=f"What is offered for it: {listed}.",
            field="action",
        )
    change = ACTIONS[action](Recipe.from_dict(job.asked_recipe), Recipe.from_dict(job.recipe), job)
    assert change is not None, "what is offered changes something"
    assert job.dataset_version is not None, "what is trained has a dataset"
    mixed = job.mixed_versions()
    plan = plan_for(change.recipe, job.base_model, job.dataset_version, mixed)
    return queue_job(
        team=job.team, user=user, recipe=plan.recipe, asked_recipe=change.recipe, estimate=estimate_values(plan),
        base_model=job.base_model, dataset_version=job.dataset_version, parent=job, idempotency_key=idempotency_key,
        token=token, mixed=mixed,
    )  # fmt: skip


def _with_training(recipe: Recipe, **values: Any) -> Recipe:
    return recipe.model_copy(update={"training": recipe.training.model_copy(update=values)})

"""Every "auto" of a recipe decided, and everything that is wrong with it said at once."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from pydantic import ValidationError

from workers.errors import DoesNotFitError, RecipeError, RecipeProblems
from workers.evaluations import evaluations, get_evaluation, name_of_key, named_by
from workers.facts import DatasetFacts, DeviceFacts
from workers.hand_written import is_hand_written
from workers.memory import GIB, TIGHT_SHARE, Estimate, estimate
from workers.methods import Method, MethodSettings, get_method
from workers.objectives import get_objective
from workers.recipe import Precision, Recipe, problems_by_field
from workers.shapes import ModelShape

MAX_MICRO_TOKENS = {"cpu": 2048, "cuda": 16384}
"""Tokens of a micro-batch beyond which nothing gets faster; a CPU is busy with far fewer."""
UNEVEN = 1.25
"""Longest row over mean row from which padding wastes more than packing costs."""
MAX_VALIDATIONS = 3
"""Validations between the first and the last step that only show how it goes; each reads the held-out rows."""
CHOOSING_VALIDATIONS = 10
"""Validations of a run in which they choose: with fewer the best step is likely to lie between two."""


def resolve(recipe: Recipe, shape: ModelShape, dataset: DatasetFacts, device: DeviceFacts) -> Recipe:
    """The recipe without any "auto" left: what will run, and what the adapter's card will say.

    Precision: the method's first on a GPU; on a CPU bfloat16 only where it is computed in hardware, else float32.
    Packing: where rows are of uneven length. Micro-batch: the largest that keeps the run below 85 % of the memory,
    with gradient checkpointing switched on only when one row would not fit without it; where hand-written blocks run on
    a GPU, what they take at once, and no checkpointing, for they choose by the memory there is what they compute twice.

    Raises:
        RecipeProblems: unknown plug-ins or settings, values out of bounds, combinations that cannot work; all at once.
            Or the run cannot fit the device's memory, and its method says that it must.
    """
    problems: dict[str, str] = {}

    def attempt(look_up: Callable[[], Any]) -> Any:
        try:
            return look_up()
        except RecipeProblems as error:
            problems.update(error.fields)
        except RecipeError as error:
            problems.setdefault(error.field or "recipe", _sentence(error))
        return None

    method: Method | None = attempt(lambda: get_method(recipe.method))
    attempt(lambda: get_objective(recipe.objective))
    keys: set[str] = set()
    for at, metric in enumerate(recipe.evaluation.metrics):
        evaluation = attempt(partial(get_evaluation, metric, field=f"evaluation.metrics.{at}"))
        if evaluation is not None and evaluation.key in keys:
            problems[f"evaluation.metrics.{at}"] = f"{evaluation.label} is chosen twice. Leave one of them out."
        keys |= {evaluation.key} if evaluation is not None else set()
    problems |= _choosing_problems(recipe)
    settings: MethodSettings | None = None
    if method is not None:
        settings = attempt(lambda: read_settings(method, recipe.settings))
        problems |= {name: text for name, text in method.refusals(recipe, shape).items() if name not in problems}
    num_virtual = method.num_virtual_tokens(settings) if method is not None and settings is not None else 0
    problems |= _length_problems(recipe, shape, dataset, num_virtual)
    if problems:
        raise RecipeProblems(problems)
    assert method is not None
    assert settings is not None

    training = recipe.training
    longest = dataset.longest_after_cut(training.max_length)
    mean = dataset.mean_after_cut(training.max_length)
    packing = training.packing
    if packing == "auto":
        # A CPU's attention has no kernel for rows of different lengths: packed rows pay for a dense mask over all.
        uneven = mean > 0 and longest > UNEVEN * mean
        packing = device.kind == "cuda" and method.can_pack and uneven
    chosen = recipe.model_copy(
        update={
            "settings": settings.model_dump(mode="json"),
            "precision": _precision(recipe, method, device),
            "training": training.model_copy(
                update={
                    "learning_rate": (
                        method.default_learning_rate(settings)
                        if training.learning_rate == "auto"
                        else training.learning_rate
                    ),
                    "packing": packing,
                }
            ),
        }
    )
    chosen = _fit_memory(chosen, method, shape, dataset, device, longest)
    needed = estimate(chosen, shape, dataset, device)
    if method.must_fit and device.memory_bytes and needed.verdict == "too_large":
        others = alternatives(recipe, shape, dataset, device)
        raise DoesNotFitError({"method": _too_large(method, needed, others, device)})
    num_steps = needed.num_steps
    if training.checkpoint_every_steps == "auto":
        chosen = _with_training(chosen, checkpoint_every_steps=training.steps_between_checkpoints(num_steps))
    if training.validate_every_steps == "auto":
        chosen = _with_training(chosen, validate_every_steps=_validation_interval(recipe, num_steps, dataset))
    return chosen


def read_settings(method: Method, values: dict[str, Any]) -> MethodSettings:
    """The method's settings; an unknown name is told the nearest known one. Raises RecipeProblems."""
    known = list(method.Settings.model_fields)
    problems = {}
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f'Did you mean "{near[0]}"? ' if near else ""
            problems[f"settings.{name}"] = (
                f'{method.label} has no setting "{name}". {hint}Its settings are {", ".join(known)}.'
            )
    settings: MethodSettings | None = None
    try:
        settings = method.Settings.model_validate({name: value for name, value in values.items() if name in known})
    except ValidationError as error:
        problems = problems_by_field(error, prefix="settings") | problems
    if problems or settings is None:
        raise RecipeProblems(problems)
    return settings


def _precision(recipe: Recipe, method: Method, device: DeviceFacts) -> Precision:
    if recipe.precision != "auto":
        return recipe.precision
    preferred = method.precisions[0]
    if preferred == "bfloat16" and "float32" in method.precisions and not device.computes_bfloat16():
        return "float32"
    return preferred


def _length_problems(recipe: Recipe, shape: ModelShape, dataset: DatasetFacts, num_virtual: int) -> dict[str, str]:
    """Rows that the base cannot read at once, with room for virtual tokens."""
    room = shape.context_length - num_virtual
    longest = dataset.longest_after_cut(recipe.training.max_length)
    if dataset.longest > 0 and longest > room:
        behind = f", {num_virtual} of them taken by virtual tokens" if num_virtual else ""
        return {
            "training.max_length": (
                f"The longest row would keep {longest} tokens, but the base model reads {shape.context_length} at "
                f"most{behind}. Choose {room} or less."
            )
        }
    return {}


def _choosing_problems(recipe: Recipe) -> dict[str, str]:
    """Early stopping and best-step selection that have nothing to go by."""
    training = recipe.training
    found: dict[str, str] = {}
    if name_of_key(training.best_by) not in evaluations():
        found["training.best_by"] = (
            f'There is no evaluation "{training.best_by}". Choose among {", ".join(evaluations())}.'
        )
    else:
        try:
            get_evaluation(named_by(training.best_by, recipe.evaluation.metrics))
        except RecipeError:
            found["training.best_by"] = (
                f"{evaluations()[name_of_key(training.best_by)].label} needs settings. Choose it among the metrics and "
                "give them there."
            )
    if training.early_stopping_patience is not None and training.validate_every_steps == 0:
        found["training.validate_every_steps"] = (
            "Early stopping goes by validations, and there are none during training. Set the steps between two of "
            'them, or leave it on "auto".'
        )
    elif training.keep_best == "best" and training.validate_every_steps == 0:
        found["training.validate_every_steps"] = (
            "The best step is chosen by validations, and there are none during training. Set the steps between two of "
            'them, or leave it on "auto".'
        )
    return found


def _validation_interval(recipe: Recipe, num_steps: int, dataset: DatasetFacts) -> int:
    """Steps between two validations; 0 for none before the end."""
    training = recipe.training
    if training.chooses_on_validation:
        return max(1, num_steps // CHOOSING_VALIDATIONS)
    parts = dataset.parts_of(recipe)
    num_looked_at = parts.num_validation or parts.num_scored
    num_trained = min(num_steps * training.batch_size, math.ceil(training.epochs * max(1, parts.num_train)))
    # A row costs a third forward of what it costs to train: validations take a tenth of the training at most.
    count = min(MAX_VALIDATIONS, int(0.3 * num_trained / max(1, num_looked_at)))
    return math.ceil(num_steps / (count + 1)) if count else 0


def _fit_memory(
    recipe: Recipe, method: Method, shape: ModelShape, dataset: DatasetFacts, device: DeviceFacts, longest: int
) -> Recipe:
    """Micro-batch and gradient checkpointing that keep the run below TIGHT_SHARE of the device."""
    training = recipe.training
    if device.kind == "cuda" and is_hand_written(method, _decided(recipe), shape, device.kind):
        return _by_hand(recipe, shape, dataset, device)
    if training.micro_batch_size == "auto":
        cap = max(1, MAX_MICRO_TOKENS[device.kind] // max(1, longest))
        sizes = [size for size in _halves(training.batch_size) if size <= cap] or [1]
    else:
        sizes = [min(training.micro_batch_size, training.batch_size)]
    if training.gradient_checkpointing == "auto":
        choices = [False, True] if method.can_checkpoint_activations else [False]
    else:
        choices = [training.gradient_checkpointing]
    for checkpointing in choices:
        for size in sizes:
            tried = _with_training(recipe, micro_batch_size=size, gradient_checkpointing=checkpointing)
            if estimate(tried, shape, dataset, device).total_bytes < TIGHT_SHARE * device.memory_bytes:
                return tried
    # Nothing fits: the smallest, whose estimate says so and what to do.
    return _with_training(recipe, micro_batch_size=sizes[-1], gradient_checkpointing=choices[-1])


def _decided(recipe: Recipe) -> Precision:
    assert recipe.precision != "auto"
    return recipe.precision


def _by_hand(recipe: Recipe, shape: ModelShape, dataset: DatasetFacts, device: DeviceFacts) -> Recipe:
    """As many rows as the run itself takes at once, and no checkpointing: it chooses what is kept by the memory."""
    training = recipe.training
    if training.gradient_checkpointing == "auto":
        recipe = _with_training(recipe, gradient_checkpointing=False)
    if training.micro_batch_size == "auto":
        rows = estimate(recipe, shape, dataset, device).rows_at_once
        recipe = _with_training(recipe, micro_batch_size=rows)
    return recipe


@dataclass(frozen=True)
class Alternative:
    """A cheaper method on the same rows: its recipe without any "auto", and what that will need."""

    method: Method
    recipe: Recipe
    estimate: Estimate


def alternatives(recipe: Recipe, shape: ModelShape, dataset: DatasetFacts, device: DeviceFacts) -> list[Alternative]:
    """What the methods that a recipe's own names as cheaper would need instead, at their own default settings."""
    found = []
    for name in get_method(recipe.method).cheaper:
        other = _with_training(recipe, learning_rate="auto").model_copy(
            update={"method": name, "settings": {}, "precision": "auto"}
        )
        try:
            resolved = resolve(other, shape, dataset, device)
        except RecipeProblems:
            continue  # this base or these rows are not for that method: then it is no alternative
        found.append(Alternative(get_method(name), resolved, estimate(resolved, shape, dataset, device)))
    return found


def _too_large(method: Method, needed: Estimate, others: list[Alternative], device: DeviceFacts) -> str:
    """Why a run that must fit is refused, and the nearest method that fits."""
    what = "the card" if device.kind == "cuda" else "this machine"
    found = (
        f"{method.label} of this base needs about {needed.total_bytes / GIB:.1f} GiB, and {what} has "
        f"{device.memory_bytes / GIB:.1f} GiB."
    )
    fitting = next((other for other in others if other.estimate.verdict != "too_large"), None)
    if fitting is None:
        less = "".join(f" {one.method.label} needs {one.estimate.total_bytes / GIB:.1f} GiB." for one in others)
        return f"{found}{less} Choose a smaller base model."
    other = fitting.estimate
    return (
        f"{found} Choose {fitting.method.label}, which needs about {other.total_bytes / GIB:.1f} GiB and trains "
        f"{other.num_trainable:,} parameters ({100 * other.trainable_share:.2g} %), or a smaller base model."
    )


def _halves(number: int) -> list[int]:
    """The number and its halves down to 1: 12, 6, 3, 1."""
    found = [number]
    while found[-1] > 1:
        found.append(found[-1] // 2)
    return found


def _with_training(recipe: Recipe, **values: Any) -> Recipe:
    return recipe.model_copy(update={"training": recipe.training.model_copy(update=values)})


def _sentence(error: RecipeError) -> str:
    return f"{error.message} {error.next_step}".strip()

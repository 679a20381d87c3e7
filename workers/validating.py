"""Validation while training: looks at rows that are not trained on, and keeps the weights of the best step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from workers import scoring
from workers.checkpoints import Position, trainable_parameters
from workers.evaluations import ScoredRow, get_evaluation, named_by
from workers.events import MessageEvent, Report, ValidationEvent
from workers.examples import Example
from workers.recipe import Recipe
from workers.stopping import after_validation, is_out_of_patience, step_of_adapter, validated_steps

if TYPE_CHECKING:
    from workers.rendering import Renderer


class Validator:
    """Validates at the steps that the recipe asks for.

    `best_weights` are the adapter's parameters, on the CPU, at the best step so far; None until one was validated,
    and always when the recipe keeps the last step.

    Args:
        num_steps: optimizer steps of the whole run.
        examples: the rows to look at.
        must_end: asked between batches; a true answer leaves the validation for the resumed run to make.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        num_steps: int,
        renderer: Renderer,
        examples: Sequence[Example],
        report: Report,
        must_end: Callable[[], object],
    ) -> None:
        self._recipe = recipe
        self._training = recipe.training
        self._num_steps = num_steps
        self._steps = validated_steps(self._training, num_steps)
        self._renderer = renderer
        self._examples = examples
        self._report = report
        self._must_end = must_end
        self._evaluation = get_evaluation(named_by(self._training.best_by, recipe.evaluation.metrics))
        self.best_weights: dict[str, torch.Tensor] | None = None

    def is_due(self, step: int) -> bool:
        """Whether the run is validated after this step."""
        return step in self._steps

    def is_over(self, position: Position) -> bool:
        """Whether training ends here, by its steps or by early stopping."""
        return position.step >= self._num_steps or is_out_of_patience(position.watch, self._training)

    def validate(self, model: Any, position: Position) -> Position:
        """The position with what the validation of its step shows; unchanged when none is due or it was made before.

        No random number is used up: greedy answers, no dropout.
        """
        if not self.is_due(position.step) or position.watch.validated_step >= position.step:
            return position
        chooses = self._training.chooses_on_validation
        answers = self._training.num_validated_answers if chooses and self._evaluation.needs == "answer" else 0
        rows = scoring.score_rows(
            model,
            self._renderer,
            self._examples,
            generate_lines=[example.line for example in self._examples[:answers]],
            max_new_tokens=self._recipe.evaluation.max_new_tokens,
            evaluations=[self._evaluation] if chooses else [],
            should_stop=self._must_end,
        )
        if self._must_end():
            return position
        event = validation_event(position.step, rows)
        if not chooses:
            self._report(event)
            return replace(position, watch=replace(position.watch, validated_step=position.step))
        value = scoring.mean_value(rows, self._evaluation)
        if self._evaluation.key != "loss":
            event = event.model_copy(update={"evaluation": self._evaluation.key, "score": value})
        self._report(event)
        return self._note(model, position, float("nan") if value is None else value)

    def _note(self, model: Any, position: Position, value: float) -> Position:
        step = position.step
        watch = after_validation(
            position.watch,
            step,
            value,
            higher_is_better=self._evaluation.higher_is_better,
            threshold=self._training.early_stopping_threshold,
        )
        if watch.best_step == step and self._training.keep_best == "best":
            self.best_weights = {
                name: one.detach().to("cpu", copy=True) for name, one in trainable_parameters(model).items()
            }
        if is_out_of_patience(watch, self._training) and step < self._num_steps:
            best = (
                "" if watch.best_value is None else f" The best was {watch.best_value:.4f} at step {watch.best_step}."
            )
            self._say(
                f"Early stopping at step {step} of {self._num_steps}: {self._evaluation.label} has not improved by "
                f"more than {self._training.early_stopping_threshold:g} in {watch.num_without} validations.{best}"
            )
        return replace(position, watch=watch)

    def take_best(self, model: Any, position: Position) -> None:
        """Puts the best step's weights into the model, where the recipe keeps the best and one was validated."""
        watch = position.watch
        if step_of_adapter(watch, self._training) is None:
            return
        assert self.best_weights is not None
        with torch.no_grad():
            for name, parameter in trainable_parameters(model).items():
                parameter.copy_(self.best_weights[name])
        self._say(
            f"The adapter is that of step {watch.best_step}, the best of those validated up to step "
            f"{watch.validated_step}: {self._evaluation.label} {watch.best_value:.4f}."
        )

    def _say(self, text: str) -> None:
        self._report(MessageEvent(text=text))


def validation_event(step: int, rows: Sequence[ScoredRow]) -> ValidationEvent:
    """The mean loss per token over scored rows, as an event."""
    num_tokens = sum(row.num_tokens for row in rows)
    return ValidationEvent(step=step, loss=sum(row.loss_sum for row in rows) / num_tokens, num_tokens=num_tokens)

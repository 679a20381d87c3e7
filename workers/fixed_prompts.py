"""Answers to fixed prompts while training: what the model says at each checkpoint, beside what the base said.

The prompts are the first rows of those that validations look at: the same at every checkpoint, in every attempt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from workers.events import AnswersEvent, FixedPrompt, PromptsEvent, Report
from workers.examples import Example
from workers.mixing import line_at, source_at
from workers.recipe import Recipe
from workers.scoring import prompt_text, write_answers
from workers.texts import storable

if TYPE_CHECKING:
    from workers.rendering import Renderer

MAX_CHARACTERS = 2000
"""Of a prompt or an expected answer as it is shown."""
NUM_KEPT = 20
"""Checkpoints whose answers a checkpoint holds. A supervisor that has stored none of them has lost its lease."""

Answers = tuple[str | None, ...]


def answering(recipe: Recipe) -> Recipe:
    """The recipe with an evaluation that answers its fixed prompts and measures nothing else."""
    asked = recipe.evaluation
    changes = {
        "metrics": ("loss",),
        "num_generated": asked.num_samples_shown,
        "max_new_tokens": asked.num_shown_tokens,
    }
    return recipe.model_copy(update={"evaluation": asked.model_copy(update=changes)})


def fixed_examples(recipe: Recipe, validation: Sequence[Example]) -> list[Example]:
    """The rows whose prompts are answered, of those that validations look at; none when the recipe wants none."""
    return list(validation[: recipe.evaluation.num_samples_shown])


def prompts_event(renderer: Renderer, examples: Sequence[Example]) -> PromptsEvent:
    """The prompts and what is expected of them, as far as they are shown."""
    return PromptsEvent(
        prompts=tuple(
            FixedPrompt(
                line=line_at(one.line),
                prompt=_shown(prompt_text(one)),
                reference=_shown(renderer.reference(one)),
                source=source_at(one.line),
            )
            for one in examples
        )
    )


def answers_event(step: int, answers: Sequence[str | None]) -> AnswersEvent:
    """The answers at a step, whatever characters the model has written."""
    return AnswersEvent(step=step, answers=tuple(None if one is None else storable(one) for one in answers))


def _shown(text: str) -> str:
    whole = storable(text)
    return whole if len(whole) <= MAX_CHARACTERS else whole[: MAX_CHARACTERS - 1] + "\N{HORIZONTAL ELLIPSIS}"


class FixedPrompts:
    """Has the model answer the same prompts at every checkpoint.

    `kept` are the newest answers by step, for the next checkpoint to hold.

    Args:
        num_steps: optimizer steps of the whole run.
        validation: the rows that validations look at.
        must_end: asked before every token; a true answer leaves the answers for the resumed run to make.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        num_steps: int,
        renderer: Renderer,
        validation: Sequence[Example],
        report: Report,
        must_end: Callable[[], object],
    ) -> None:
        assert recipe.training.checkpoint_every_steps != "auto"
        self._every = recipe.training.checkpoint_every_steps
        self._num_steps = num_steps
        self._max_new_tokens = recipe.evaluation.num_shown_tokens
        self._renderer = renderer
        self._examples = fixed_examples(recipe, validation)
        self._report = report
        self._must_end = must_end
        self.kept: dict[int, Answers] = {}

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint after this step is one that the recipe asks for, and not that of a pause."""
        return step > 0 and (step % self._every == 0 or step == self._num_steps)

    def restore(self, kept: Mapping[int, Answers]) -> None:
        """Goes on with the answers that a checkpoint holds.

        They are reported again: the one who was to store them may have ended before he could.
        """
        self.kept = dict(kept) if self._examples else {}
        for step, answers in self.kept.items():
            self._report(AnswersEvent(step=step, answers=answers))

    def answer(self, model: Any, step: int) -> None:
        """Reports the answers after a step unless they were made before.

        What is learned does not change: greedy answers draw no random number, and the model is left in its mode.
        """
        if not self._examples or step in self.kept:
            return
        answers = write_answers(
            model,
            self._renderer,
            self._examples,
            max_new_tokens=self._max_new_tokens,
            # Beside what training holds there may be no memory for the many rows that would pay.
            batch_size=len(self._examples),
            should_stop=self._must_end,
        )
        if self._must_end():
            return
        event = answers_event(step, answers)
        self.kept[step] = event.answers
        for earlier in sorted(self.kept)[:-NUM_KEPT]:
            del self.kept[earlier]
        self._report(event)

"""Answers at each checkpoint to prompts that stay the same: they show what is learned and change nothing of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.tiny import make_tiny_base, tiny_rows, write_rows
from tests.workers.methods.trying import tiny_settings
from tests.workers.test_training import Log, adapter_bytes, at_step, run
from workers import fixed_prompts
from workers.events import AnswersEvent, CheckpointEvent, PhaseEvent, PromptsEvent
from workers.examples import Example, Message
from workers.methods import get_method, methods
from workers.recipe import MAX_SHOWN_TOKENS, Recipe
from workers.results import Result
from workers.training import Folders


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    folder = tmp_path_factory.mktemp("tiny")
    return Folders(
        base_model=make_tiny_base(folder / "base"),
        dataset=write_rows(folder / "data.jsonl", tiny_rows(40)),
        out=folder / "unused",
    )


def recipe_of(method: str = "lora", *, shown: int = 2, precision: str = "float32", **training: Any) -> Recipe:
    return Recipe.from_dict(
        {
            "name": "Sounds",
            "base_model": {"name": "tiny"},
            "dataset": {"name": "sounds", "format": "alpaca"},
            "method": method,
            "settings": tiny_settings(method) | ({"dropout": 0.1} if method == "lora" else {}),
            "precision": precision,
            "training": {
                "learning_rate": 0.01, "batch_size": 4, "micro_batch_size": 2, "max_length": 128, "packing": False,
                "max_steps": 6, "checkpoint_every_steps": 2, "gradient_checkpointing": False,
            } | training,
            "split": {"held_out_share": 0.1, "keep_equal_together": False},
            "evaluation": {
                "num_generated": 2, "max_new_tokens": 4, "general": False, "num_samples_shown": shown,
            },
        }
    )  # fmt: skip


def by_step(*logs: Log) -> dict[int, tuple[str | None, ...]]:
    """The answers of several attempts by step; whoever stores them keeps one of each step."""
    found: dict[int, tuple[str | None, ...]] = {}
    for log in logs:
        for event in log.of(AnswersEvent):
            assert found.setdefault(event.step, event.answers) == event.answers
    return found


@pytest.fixture(scope="module")
def straight(tiny: Folders, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Log]:
    product, log = run(tiny, tmp_path_factory.mktemp("straight"), recipe_of())
    assert product is not None
    return product, log


def test_the_first_held_out_rows_are_answered_by_the_base_and_at_every_checkpoint(straight: tuple[Path, Log]) -> None:
    product, log = straight
    assert [event.step for event in log.of(AnswersEvent)] == [0, 2, 4, 6]
    assert [event.step for event in log.of(CheckpointEvent)] == [2, 4, 6]
    (prompts,) = log.of(PromptsEvent)
    # The final samples are of the same rows, written with as many tokens, by the same two models.
    samples = Result.from_folder(product).samples
    shown = [(one.line, one.prompt, one.reference) for one in prompts.prompts]
    assert shown == [(one.line, one.prompt, one.reference) for one in samples]
    answers = by_step(log)
    assert answers[0] == tuple(one.base_answer for one in samples)
    assert answers[6] == tuple(one.adapter_answer for one in samples)
    assert answers[0] != answers[6]


# Whatever makes a step draw random numbers or compute in another mode is on: dropout and recomputed activations.
CASES = [
    (name, precision)
    for name in methods()
    for precision in get_method(name).precisions
    if precision in ("float32", "nf4")
]


@pytest.mark.parametrize(("method", "precision"), CASES)
def test_answers_change_nothing_that_is_learned(tiny: Folders, tmp_path: Path, method: str, precision: str) -> None:
    options = {"max_steps": 2, "checkpoint_every_steps": 1, "precision": precision, "gradient_checkpointing": True}
    without, silent = run(tiny, tmp_path / "without", recipe_of(method, shown=0, **options))
    with_answers, log = run(tiny, tmp_path / "with", recipe_of(method, **options))
    assert silent.of(AnswersEvent) == silent.of(PromptsEvent) == []
    assert [event.step for event in log.of(AnswersEvent)] == [0, 1, 2]
    assert log.losses() == silent.losses()
    assert weights_bytes(with_answers) == weights_bytes(without)


def weights_bytes(product: Path | None) -> dict[str, bytes]:
    assert product is not None
    found = {path.name: path.read_bytes() for path in product.glob("*.safetensors")}
    assert found
    return found


def test_a_resumed_run_makes_the_answers_that_are_missing_and_says_the_others_again(
    tiny: Folders, tmp_path: Path, straight: tuple[Path, Log]
) -> None:
    none, first = run(tiny, tmp_path, recipe_of(), Log(stop="checkpoint", stop_when=at_step(3)))
    assert none is None
    product, second = run(tiny, tmp_path, recipe_of(), attempt=2)
    assert [event.step for event in first.of(AnswersEvent)] == [0, 2]
    # Step 3 is where it was paused, no checkpoint that the recipe asks for.
    assert [event.step for event in second.of(AnswersEvent)] == [0, 2, 4, 6]
    assert second.of(PromptsEvent) == first.of(PromptsEvent) == straight[1].of(PromptsEvent)
    assert by_step(first, second) == by_step(straight[1])
    assert adapter_bytes(product) == adapter_bytes(straight[0])


def test_a_supervisor_that_heard_nothing_of_a_checkpoints_answers_hears_them_from_the_next_attempt(
    tiny: Folders, tmp_path: Path, straight: tuple[Path, Log]
) -> None:
    ending = Log(stop="now", stop_when=lambda event: isinstance(event, PhaseEvent) and event.phase == "evaluating")
    run(tiny, tmp_path, recipe_of(), ending)
    _, second = run(tiny, tmp_path, recipe_of(), attempt=2)
    assert by_step(second) == by_step(straight[1])


def test_a_stop_during_the_answers_is_obeyed_and_the_resumed_run_makes_them(
    tiny: Folders, tmp_path: Path, straight: tuple[Path, Log], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, log = fixed_prompts.write_answers, Log(stop="checkpoint")
    asked: list[object] = []

    def stopped_at_a_token(*arguments: Any, should_stop: Any, **options: Any) -> Any:
        def look() -> object:
            log.asked = True
            asked.append(None)
            return should_stop()

        return real(*arguments, should_stop=look, **options)

    with monkeypatch.context() as patch:
        patch.setattr(fixed_prompts, "write_answers", stopped_at_a_token)
        none, _ = run(tiny, tmp_path, recipe_of(), log)
    assert (none, len(asked)) == (None, 1), "no token is written once a stop is asked for"
    assert [event.step for event in log.of(AnswersEvent)] == [0]
    product, second = run(tiny, tmp_path, recipe_of(), attempt=2)
    assert [event.step for event in second.of(AnswersEvent)] == [0, 2, 4, 6]
    assert by_step(log, second) == by_step(straight[1])
    assert adapter_bytes(product) == adapter_bytes(straight[0])


def test_rows_that_choose_the_step_are_the_ones_that_are_shown(tiny: Folders, tmp_path: Path) -> None:
    recipe = recipe_of(keep_best="best", validate_every_steps=2)
    recipe = recipe.model_copy(update={"split": recipe.split.model_copy(update={"held_out_share": 0.3})})
    product, log = run(tiny, tmp_path, recipe)
    scored = {one.line for one in Result.from_folder(product or tmp_path).held_out}
    (prompts,) = log.of(PromptsEvent)
    assert len(prompts.prompts) == 2
    assert not {one.line for one in prompts.prompts} & scored


def test_a_run_that_stops_early_is_answered_at_its_last_step(tiny: Folders, tmp_path: Path) -> None:
    recipe = recipe_of(
        early_stopping_patience=1, early_stopping_threshold=50.0, validate_every_steps=1, checkpoint_every_steps=5
    )
    _, log = run(tiny, tmp_path, recipe)
    assert [event.step for event in log.of(AnswersEvent)] == [0, 2]


def test_answers_are_short_whatever_the_evaluation_allows() -> None:
    long = Recipe.from_dict(recipe_of().to_dict() | {"evaluation": {"max_new_tokens": 4000, "num_samples_shown": 5}})
    assert fixed_prompts.answering(long).evaluation.max_new_tokens == MAX_SHOWN_TOKENS
    assert fixed_prompts.answering(recipe_of()).evaluation.max_new_tokens == 4


def test_what_a_database_cannot_keep_is_replaced_and_long_prompts_are_cut(tiny: Folders) -> None:
    from workers.rendering import Renderer

    assert fixed_prompts.answers_event(2, ["a\0b", None, "\ud800"]).answers == ("a\ufffdb", None, "\ufffd")
    row = Example(1, (Message("user", "x" * 5000), Message("assistant", "y\0")))
    (shown,) = fixed_prompts.prompts_event(
        Renderer(tiny.base_model, max_length=128, loss_on="assistant"), [row]
    ).prompts
    assert (len(shown.prompt), shown.prompt[-2:], shown.reference) == (fixed_prompts.MAX_CHARACTERS, "x…", "y\ufffd")


def test_a_checkpoint_holds_the_newest_answers_only(
    tiny: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fixed_prompts, "NUM_KEPT", 2)
    ending = Log(stop="now", stop_when=lambda event: isinstance(event, PhaseEvent) and event.phase == "evaluating")
    run(tiny, tmp_path, recipe_of(), ending)
    _, second = run(tiny, tmp_path, recipe_of(), attempt=2)
    assert [event.step for event in second.of(AnswersEvent)] == [0, 4, 6]

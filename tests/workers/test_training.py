from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from tests.tiny import make_tiny_base, tiny_rows, tokenizer_json, write_rows
from workers import training
from workers.errors import (
    BaseModelError,
    DatasetError,
    DivergedError,
    ExplainedError,
    GpuError,
    OutOfMemoryError,
    RecipeError,
)
from workers.events import (
    CheckpointEvent,
    DivergedEvent,
    MessageEvent,
    PhaseEvent,
    PlanEvent,
    ResultEvent,
    StepEvent,
    StopMode,
    StoppedEvent,
    ValidationEvent,
)
from workers.examples import Example, Message
from workers.meter import Meter
from workers.recipe import Recipe
from workers.rendering import Renderer
from workers.results import Result
from workers.training import Folders, train


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """A tiny base and a dataset; each test brings its own folder for what it makes."""
    folder = tmp_path_factory.mktemp("tiny")
    return Folders(
        base_model=make_tiny_base(folder / "base"),
        dataset=write_rows(folder / "data.jsonl", tiny_rows(40)),
        out=folder / "unused",
    )


def recipe_of(**training_settings: Any) -> Recipe:
    return Recipe.from_dict(
        {
            "name": "Sounds",
            "base_model": {"name": "tiny"},
            "dataset": {"name": "sounds", "format": "alpaca"},
            "method": "lora",
            "settings": {"rank": 4, "dropout": 0.1},
            "precision": "float32",
            "training": {
                "learning_rate": 0.01, "batch_size": 4, "micro_batch_size": 2, "max_length": 128, "packing": False,
                "max_steps": 6, "checkpoint_every_steps": 3, "gradient_checkpointing": False,
            } | training_settings,
            "split": {"held_out_share": 0.1, "keep_equal_together": False},
            "evaluation": {"num_generated": 2, "max_new_tokens": 4, "general": False},
        }
    )  # fmt: skip


@dataclass
class Log:
    """Events of a run, and a stop to ask for once a condition holds."""

    events: list[Any] = field(default_factory=list)
    stop: StopMode | None = None
    stop_when: Callable[[Any], bool] = lambda event: False
    asked: bool = False

    def report(self, event: Any) -> None:
        self.events.append(event)
        self.asked = self.asked or self.stop_when(event)

    def should_stop(self) -> StopMode | None:
        return self.stop if self.asked else None

    def of(self, kind: type[Any]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    def losses(self) -> dict[int, float]:
        return {event.step: event.loss for event in self.of(StepEvent)}


def at_step(step: int) -> Callable[[Any], bool]:
    return lambda event: isinstance(event, StepEvent) and event.step == step


def run(tiny: Folders, out: Path, recipe: Recipe, log: Log | None = None, attempt: int = 1) -> tuple[Path | None, Log]:
    log = log or Log()
    folders = Folders(tiny.base_model, tiny.dataset, out)
    return train(recipe, folders, report=log.report, should_stop=log.should_stop, attempt=attempt), log


def adapter_bytes(product: Path | None) -> bytes:
    assert product is not None
    return (product / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="session")
def straight(tiny: Folders, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Log]:
    """One whole run that nobody interrupts."""
    product, log = run(tiny, tmp_path_factory.mktemp("straight"), recipe_of())
    assert product is not None
    return product, log


def test_a_run_reports_its_phases_its_plan_and_every_step(straight: tuple[Path, Log]) -> None:
    product, log = straight
    phases = list(dict.fromkeys(event.phase for event in log.of(PhaseEvent)))
    assert phases == ["preparing", "loading", "scoring_base", "training", "evaluating", "packaging"]
    (plan,) = log.of(PlanEvent)
    assert (plan.num_steps, plan.num_train_rows, plan.num_held_out_rows) == (6, 36, 4)
    assert [event.step for event in log.of(StepEvent)] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in log.of(CheckpointEvent)] == [3, 6]
    assert log.of(ResultEvent) == [ResultEvent(folder=str(product))]


def test_the_loss_falls_and_the_adapter_beats_its_base(straight: tuple[Path, Log]) -> None:
    product, log = straight
    losses = log.losses()
    assert losses[6] < losses[1]
    result = Result.from_folder(product)
    loss = next(score for score in result.scores if score.evaluation == "loss")
    assert loss.value < loss.base_value
    assert loss.num_rows == 4
    assert log.of(ValidationEvent)[-1].loss == pytest.approx(loss.value, rel=1e-6)
    assert len(result.samples) == 2
    assert result.provenance.first_loss == losses[1]
    assert result.provenance.last_loss == losses[6]
    assert result.provenance.num_tokens == log.of(StepEvent)[-1].num_tokens


def test_the_first_loss_is_the_base_models_by_transformers_alone(tiny: Folders, straight: tuple[Path, Log]) -> None:
    """A fresh LoRA changes nothing, so the first step's loss is that of the base on the step's own rows."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from workers.batching import Plan
    from workers.splitting import split_lines

    split = split_lines(list(range(1, 41)), recipe_of().split)
    plan = Plan(len(split.train), 4, 1.0, recipe_of().training.seed)
    rows = tiny_rows(40)
    model = AutoModelForCausalLM.from_pretrained(tiny.base_model)
    tokenizer = AutoTokenizer.from_pretrained(tiny.base_model)
    total, count = 0.0, 0
    for index in plan.rows(0):
        row = rows[split.train[index] - 1]
        question = f"{row['instruction']}\n\n{row['input']}"
        prompt = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        before = tokenizer(prompt, add_special_tokens=False).input_ids
        answer = tokenizer(f"{row['output']}<|im_end|>", add_special_tokens=False).input_ids
        ids = torch.tensor([before + answer])
        labels = torch.tensor([[-100] * len(before) + answer])
        with torch.no_grad():
            total += model(input_ids=ids, labels=labels).loss.item() * len(answer)
        count += len(answer)
    assert straight[1].losses()[1] == pytest.approx(total / count, rel=1e-5)


def test_resuming_gives_the_same_adapter_and_losses_as_never_stopping(
    tiny: Folders, tmp_path: Path, straight: tuple[Path, Log]
) -> None:
    product, log = straight
    none, first = run(tiny, tmp_path, recipe_of(), Log(stop="checkpoint", stop_when=at_step(2)))
    assert none is None
    assert first.of(StoppedEvent) == [StoppedEvent(mode="checkpoint", step=2)]
    resumed, second = run(tiny, tmp_path, recipe_of(), attempt=2)
    assert second.of(PlanEvent)[0].resumed_from_step == 2
    assert [event.step for event in second.of(StepEvent)] == [3, 4, 5, 6]
    assert first.losses() | second.losses() == log.losses()
    assert adapter_bytes(resumed) == adapter_bytes(product)
    assert "scoring_base" not in {event.phase for event in second.of(PhaseEvent)}, "the base is scored once"


def test_a_run_that_had_finished_training_goes_straight_to_its_evaluation(
    tiny: Folders, tmp_path: Path, straight: tuple[Path, Log]
) -> None:
    ending = Log(stop="now", stop_when=lambda event: isinstance(event, PhaseEvent) and event.phase == "evaluating")
    none, _ = run(tiny, tmp_path, recipe_of(), ending)
    assert none is None
    product, log = run(tiny, tmp_path, recipe_of(), attempt=2)
    assert log.of(StepEvent) == []
    assert adapter_bytes(product) == adapter_bytes(straight[0])


def test_a_damaged_checkpoint_is_said_so_and_the_one_before_gives_the_same_adapter(
    tiny: Folders, tmp_path: Path, straight: tuple[Path, Log]
) -> None:
    ending = Log(stop="now", stop_when=lambda event: isinstance(event, PhaseEvent) and event.phase == "evaluating")
    run(tiny, tmp_path, recipe_of(), ending)
    weights = tmp_path / "checkpoints" / "6-1" / "adapter.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    product, log = run(tiny, tmp_path, recipe_of(), attempt=2)
    texts = [event.text for event in log.of(MessageEvent)]
    assert any(text.startswith("Checkpoint 6 is damaged (") and text.endswith("goes on from 3.") for text in texts)
    assert adapter_bytes(product) == adapter_bytes(straight[0])


def test_stop_now_leaves_no_product(tiny: Folders, tmp_path: Path) -> None:
    none, log = run(tiny, tmp_path, recipe_of(), Log(stop="now", stop_when=at_step(2)))
    assert none is None
    assert log.of(StoppedEvent) == [StoppedEvent(mode="now", step=2)]
    assert not (tmp_path / "attempts").exists()


def test_stop_and_keep_before_the_first_step_takes_one(tiny: Folders, tmp_path: Path) -> None:
    asked = Log(stop="keep", stop_when=lambda event: isinstance(event, PhaseEvent) and event.phase == "loading")
    product, log = run(tiny, tmp_path, recipe_of(), asked)
    assert product is not None
    assert log.of(ResultEvent) == [ResultEvent(folder=str(product), stopped_at_step=1)]


def test_a_crash_after_stop_and_keep_keeps_the_step_that_was_kept(tiny: Folders, tmp_path: Path) -> None:
    class CrashError(BaseException):
        """Not even a handler of Exception runs."""

    def crash(event: Any) -> None:
        if isinstance(event, PhaseEvent) and event.phase == "evaluating":
            raise CrashError

    log = Log(stop="keep", stop_when=at_step(2))
    folders = Folders(tiny.base_model, tiny.dataset, tmp_path)
    with pytest.raises(CrashError):
        train(recipe_of(), folders, report=lambda event: (log.report(event), crash(event)), should_stop=log.should_stop)
    product, _ = run(tiny, tmp_path, recipe_of(), Log(stop="keep", asked=True), attempt=2)
    assert product is not None
    assert Result.from_folder(product).stopped_at_step == 2


def test_a_package_that_fails_leaves_nothing_behind(
    tiny: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors import SafetensorError

    def full(*_args: Any, **_options: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(training.adapters, "save", full)
    with pytest.raises(ExplainedError) as caught:
        run(tiny, tmp_path, recipe_of())
    assert caught.value.code == "disk_full"
    assert list((tmp_path / "attempts" / "1").iterdir()) == []


def test_stop_and_keep_ends_with_the_adapter_of_the_last_step(tiny: Folders, tmp_path: Path) -> None:
    product, log = run(tiny, tmp_path, recipe_of(), Log(stop="keep", stop_when=at_step(2)))
    assert product is not None
    assert log.of(ResultEvent) == [ResultEvent(folder=str(product), stopped_at_step=2)]
    assert Result.from_folder(product).stopped_at_step == 2
    assert max(log.losses()) == 2


@pytest.mark.parametrize("changes", [{"micro_batch_size": 1}, {"micro_batch_size": 4}, {"packing": True}])
def test_micro_batches_and_packing_change_nothing_that_is_learned(
    tiny: Folders, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Without dropout: 4 x 1 rows, 1 x 4, 2 x 2 and packed rows take the same steps."""
    recipe = recipe_of(max_steps=3).model_copy(update={"settings": {"rank": 4, "dropout": 0.0}})
    changed = recipe_of(max_steps=3, **changes).model_copy(update={"settings": {"rank": 4, "dropout": 0.0}})
    product, log = run(tiny, tmp_path / "a", recipe)
    other, other_log = run(tiny, tmp_path / "b", changed)
    assert product is not None
    assert other is not None
    assert list(other_log.losses().values()) == pytest.approx(list(log.losses().values()), rel=1e-5)
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (product, other))
    for name, tensor in ours.items():
        assert torch.allclose(tensor, theirs[name], rtol=1e-3, atol=1e-4), name


def chat_rows(*weights: float | None) -> list[dict[str, Any]]:
    """The tiny rows as chat messages, with these weights in turn on the assistant's turns."""
    return [
        {
            "messages": [
                {"role": "user", "content": row["instruction"]},
                {"role": "assistant", "content": row["output"]}
                | ({} if (weight := weights[index % len(weights)]) is None else {"weight": weight}),
            ]
        }
        for index, row in enumerate(tiny_rows(40))
    ]


def run_chat(tiny: Folders, out: Path, rows: list[dict[str, Any]], **training: Any) -> tuple[Path, Log]:
    out.mkdir()
    recipe = recipe_of(max_steps=3, **training).model_copy(update={"settings": {"rank": 4, "dropout": 0.0}})
    recipe = recipe.model_copy(update={"dataset": recipe.dataset.model_copy(update={"format": "messages"})})
    product, log = run(Folders(tiny.base_model, write_rows(out / "rows.jsonl", rows), out), out, recipe)
    assert product is not None
    return product, log


def test_a_weight_of_1_takes_the_very_steps_of_no_weight(tiny: Folders, tmp_path: Path) -> None:
    plain, plain_log = run_chat(tiny, tmp_path / "a", chat_rows(None))
    weighted, weighted_log = run_chat(tiny, tmp_path / "b", chat_rows(1, 1.0))
    assert weighted_log.losses() == plain_log.losses()
    assert adapter_bytes(weighted) == adapter_bytes(plain)


def test_weights_that_are_all_equal_change_nothing_and_others_do(tiny: Folders, tmp_path: Path) -> None:
    _, plain = run_chat(tiny, tmp_path / "a", chat_rows(None))
    _, halved = run_chat(tiny, tmp_path / "b", chat_rows(0.5))
    _, uneven = run_chat(tiny, tmp_path / "c", chat_rows(0.1, 1.0))
    assert list(halved.losses().values()) == pytest.approx(list(plain.losses().values()), rel=1e-5)
    assert uneven.losses()[1] != pytest.approx(plain.losses()[1], rel=1e-3)


@pytest.mark.parametrize("changes", [{"micro_batch_size": 1}, {"micro_batch_size": 4}, {"packing": True}])
def test_weighted_steps_are_the_same_in_any_micro_batches(
    tiny: Folders, tmp_path: Path, changes: dict[str, Any]
) -> None:
    product, log = run_chat(tiny, tmp_path / "a", chat_rows(0.25, None, 3))
    other, other_log = run_chat(tiny, tmp_path / "b", chat_rows(0.25, None, 3), **changes)
    assert list(other_log.losses().values()) == pytest.approx(list(log.losses().values()), rel=1e-5)
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (product, other))
    for name, tensor in ours.items():
        assert torch.allclose(tensor, theirs[name], rtol=1e-3, atol=1e-4), name


def test_noise_on_embeddings_is_the_same_after_a_resume_and_in_any_micro_batches(tiny: Folders, tmp_path: Path) -> None:
    def noisy(**training: Any) -> Recipe:
        recipe = recipe_of(neftune_alpha=5.0, **training)
        return recipe.model_copy(update={"settings": {"rank": 4, "dropout": 0.0}})

    product, log = run(tiny, tmp_path / "straight", noisy())
    run(tiny, tmp_path / "broken", noisy(), Log(stop="checkpoint", stop_when=at_step(4)))
    resumed, _ = run(tiny, tmp_path / "broken", noisy(), attempt=2)
    assert adapter_bytes(resumed) == adapter_bytes(product)
    for changes in ({"micro_batch_size": 4}, {"packing": True}, {"gradient_checkpointing": True}):
        _, other = run(tiny, tmp_path / str(changes), noisy(**changes))
        assert list(other.losses().values()) == pytest.approx(list(log.losses().values()), rel=1e-4), changes


def test_noise_is_for_training_alone(tiny: Folders, tmp_path: Path, straight: tuple[Path, Log]) -> None:
    product, log = run(tiny, tmp_path, recipe_of(max_steps=1, neftune_alpha=15.0))
    assert product is not None
    assert log.losses()[1] != pytest.approx(straight[1].losses()[1], rel=1e-4)
    (noisy,), (clean,) = (
        [score.base_value for score in Result.from_folder(folder).scores if score.evaluation == "loss"]
        for folder in (product, straight[0])
    )
    assert noisy == clean
    assert Result.from_folder(product).provenance.verified is True


def test_gradient_checkpointing_changes_nothing_that_is_learned(
    tiny: Folders, tmp_path: Path, straight: tuple[Path, Log]
) -> None:
    _, log = run(tiny, tmp_path, recipe_of(gradient_checkpointing=True))
    assert list(log.losses().values()) == pytest.approx(list(straight[1].losses().values()), rel=1e-5)


def test_a_diverging_run_ends_at_once_and_keeps_the_last_finite_checkpoint(
    tiny: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = training._forward_backward

    def poisoned(run: Any, model: Any, objective: Any, rows: Any, size: int, position: Any) -> Any:
        took = real(run, model, objective, rows, size, position)
        if position.step == 4:
            took.loss_sum.mul_(math.nan)
        return took

    monkeypatch.setattr(training, "_forward_backward", poisoned)
    log = Log()
    with pytest.raises(DivergedError, match="step 5"):
        run(tiny, tmp_path, recipe_of(), log)
    assert max(log.losses()) == 4
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["3-1"]


class Ahead(Meter):
    """As of a GPU, which the host queues steps for: each step is read once the next one is queued."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.gets_ahead = True

    def is_due(self, step: int) -> bool:
        return True


def test_a_step_is_read_once_the_next_one_is_queued_and_nothing_else_changes(
    tiny: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, waiting = run(tiny, tmp_path / "waits", recipe_of())
    monkeypatch.setattr(training, "Meter", Ahead)
    log = Log()
    reported: list[list[int]] = []
    real = training._forward_backward

    def queued(*given: Any) -> Any:
        reported.append(sorted(log.losses()))
        return real(*given)

    monkeypatch.setattr(training, "_forward_backward", queued)
    product, _ = run(tiny, tmp_path / "ahead", recipe_of(), log)
    # Steps 3 and 6 are checkpoints: nothing of them is under way when they are saved.
    assert reported == [[], [], [1], [1, 2, 3], [1, 2, 3], [1, 2, 3, 4]]

    def told(log: Log) -> list[Any]:
        return [(one.step, one.loss, one.grad_norm, one.num_tokens, one.learning_rate) for one in log.of(StepEvent)]

    assert told(log) == told(waiting)
    assert adapter_bytes(product) == adapter_bytes(expected)
    theirs, own = (Result.from_folder(one or tmp_path).provenance for one in (expected, product))
    assert (own.first_loss, own.last_loss) == (theirs.first_loss, theirs.last_loss)

    stopping = Log(stop="checkpoint", stop_when=at_step(4))
    assert run(tiny, tmp_path / "stopped", recipe_of(), stopping)[0] is None
    assert list(stopping.losses()) == [1, 2, 3, 4, 5], "the one that was queued, too"
    resumed, log = run(tiny, tmp_path / "stopped", recipe_of(), attempt=2)
    assert list(log.losses()) == [6]
    assert adapter_bytes(resumed) == adapter_bytes(expected)


def test_a_step_that_is_read_late_is_the_one_that_diverged(
    tiny: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "Meter", Ahead)
    real = training._forward_backward
    rows_of_four: list[int] = []

    def poisoned(run: Any, model: Any, objective: Any, rows: Any, size: int, position: Any) -> Any:
        took = real(run, model, objective, rows, size, position)
        if position.step == 3:
            rows_of_four.extend(run.data.tokens.lines[row] for row in rows)
            took.loss_sum.mul_(math.nan)
        return took

    monkeypatch.setattr(training, "_forward_backward", poisoned)
    log = Log()
    with pytest.raises(DivergedError, match="step 4") as caught:
        run(tiny, tmp_path, recipe_of(), log)
    assert max(log.losses()) == 3
    assert [point.step for point in log.of(DivergedEvent)] == [4]
    assert f"lines {', '.join(map(str, sorted(rows_of_four)))}" in caught.value.next_step
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["3-1"]


@pytest.mark.parametrize("mode", ["keep", "checkpoint"])
def test_a_run_that_is_stopped_keeps_no_step_that_diverged_and_was_not_read(
    mode: StopMode, tiny: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "Meter", Ahead)
    monkeypatch.setattr(Ahead, "is_due", lambda self, step: False)
    real = training._forward_backward
    log = Log(stop=mode)

    def poisoned(run: Any, model: Any, objective: Any, rows: Any, size: int, position: Any) -> Any:
        took = real(run, model, objective, rows, size, position)
        if position.step == 3:
            next(one for one in model.parameters() if one.requires_grad).grad.mul_(math.nan)
        log.asked = position.step == 4
        return took

    monkeypatch.setattr(training, "_forward_backward", poisoned)
    with pytest.raises(DivergedError, match="step 5"):
        run(tiny, tmp_path, recipe_of(), log)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["3-1"]


def with_an_overflowing_token(folder: Path) -> Path:
    """The tiny base, but for one token, "Z", at the end of what float32 holds: a row with it gives NaN."""
    base = make_tiny_base(folder)
    weights = load_file(base / "model.safetensors")
    weights["model.embed_tokens.weight"][Tokenizer.from_str(tokenizer_json()).token_to_id("Z")] = 3e38
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    return base


def test_a_row_that_gives_no_number_ends_the_run_at_its_step_and_is_named(tiny: Folders, tmp_path: Path) -> None:
    base = with_an_overflowing_token(tmp_path / "base")
    rows = tiny_rows(40)
    for bad in range(40):  # the order is seeded: a row that comes late enough is found by trying
        changed = [row | {"output": "Z meow"} if index == bad else row for index, row in enumerate(rows)]
        dataset = write_rows(tmp_path / "rows.jsonl", changed)
        log, out = Log(), tmp_path / f"out-{bad}"
        try:
            train(recipe_of(), Folders(base, dataset, out), report=log.report, should_stop=log.should_stop)
        except DivergedError as error:
            if max(log.losses(), default=0) < 3:
                continue  # too early to have a checkpoint
            caught = error
            break
    last = max(log.losses())
    [point] = log.of(DivergedEvent)
    assert point.step == last + 1, "it stopped at the very step, and the curve has its place"
    assert None in (point.loss, point.grad_norm)
    assert f"at step {last + 1}" in caught.message
    assert "The checkpoint of step 3, the last before it, is kept." in caught.message
    assert re.search(rf"lines [0-9, ]*\b{bad + 1}\b", caught.next_step), caught.next_step
    kept = load_file(out / "checkpoints" / "3-1" / "adapter.safetensors")
    assert all(bool(torch.isfinite(one).all()) for one in kept.values())


def test_a_learning_rate_of_a_million_diverges_and_the_next_step_says_a_tenth(tiny: Folders, tmp_path: Path) -> None:
    recipe = recipe_of(max_steps=60, epochs=10, checkpoint_every_steps=1, max_grad_norm=50.0)
    # Past the recipe's own bounds, which would not let a person ask for it.
    wild = recipe.model_copy(
        update={
            "settings": {"rank": 4, "target_modules": "all-linear"},
            "training": recipe.training.model_copy(update={"learning_rate": 1e6}),
        }
    )
    log = Log()
    with pytest.raises(DivergedError, match=r"exactly 0 at step [2-5] while the loss was") as caught:
        run(tiny, tmp_path, wild, log)
    assert caught.value.next_step.startswith("Lower the learning rate from 1e+06 to 1e+05, or clip gradients at 1")
    for folder in (tmp_path / "checkpoints").iterdir() if (tmp_path / "checkpoints").exists() else ():
        kept = load_file(folder / "adapter.safetensors")
        assert all(bool(torch.isfinite(one).all()) for one in kept.values()), "no checkpoint of what is no number"


class OutOfMemoryAbove:
    """`_forward_backward` on a device that holds a number of rows at once, from a step on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, most: int, *, from_step: int = 1) -> None:
        self.real, self.most, self.from_step = training._forward_backward, most, from_step
        self.sizes: list[int] = []
        monkeypatch.setattr(training, "_forward_backward", self)

    def __call__(self, run: Any, model: Any, objective: Any, rows: Any, size: int, position: Any) -> Any:
        self.sizes.append(size)
        if size > self.most and position.step + 1 >= self.from_step:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return self.real(run, model, objective, rows, size, position)


def test_out_of_memory_is_an_error_with_its_figures(
    tiny: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    OutOfMemoryAbove(monkeypatch, 1, from_step=5)
    with pytest.raises(OutOfMemoryError, match=r"at step 5 with 2 rows at once: it held \d+\.\d GiB") as caught:
        run(tiny, tmp_path, recipe_of())
    details = caught.value.details
    assert (details["step"], details["micro_batch_size"]) == (5, 2)
    assert details["peak_memory_bytes"] > 2**27
    assert "a micro-batch of 1, about" in caught.value.next_step


def test_memory_that_the_allocator_of_the_cpu_refuses_is_the_same_error(
    tiny: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "_forward_backward", lambda *_: torch.empty(2**52))
    with pytest.raises(OutOfMemoryError, match="at step 1 with 2 rows at once"):
        run(tiny, tmp_path, recipe_of())


def test_a_smaller_micro_batch_goes_on_from_the_checkpoint_with_the_same_gradients(
    tiny: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of memory at step 5 of 6; half the rows at once from step 4 on give what the whole run would have given.

    Step count and learning rates go on, and the micro-batch that was found stays in the checkpoint.
    """
    recipe = recipe_of(batch_size=8, micro_batch_size=4, epochs=2)
    recipe = recipe.model_copy(update={"settings": {"rank": 4, "dropout": 0.0}})  # its noise depends on the shape
    whole, straight = run(tiny, tmp_path / "straight", recipe)
    memory = OutOfMemoryAbove(monkeypatch, 2, from_step=5)
    first = Log()
    with pytest.raises(OutOfMemoryError):
        run(tiny, tmp_path / "short", recipe, first)
    memory.sizes.clear()
    second = Log()
    folders = Folders(tiny.base_model, tiny.dataset, tmp_path / "short")
    product = train(
        recipe, folders, report=second.report, should_stop=second.should_stop, attempt=2, micro_batch_size=2
    )
    assert memory.sizes == [2, 2, 2], "steps 4 to 6"
    [plan] = second.of(PlanEvent)
    assert (plan.resumed_from_step, plan.micro_batch_size, plan.accumulation) == (3, 2, 4)
    assert second.losses() == pytest.approx({step: straight.losses()[step] for step in (4, 5, 6)}, rel=1e-5)
    rates = {event.step: (event.learning_rate, event.num_tokens) for event in straight.of(StepEvent)}
    assert {event.step: (event.learning_rate, event.num_tokens) for event in second.of(StepEvent)} == {
        step: rates[step] for step in (4, 5, 6)
    }
    norms = [event.grad_norm for event in straight.of(StepEvent)][3:]
    assert [event.grad_norm for event in second.of(StepEvent)] == pytest.approx(norms, rel=1e-4)
    assert whole is not None
    assert product is not None
    expected = load_file(whole / "adapter_model.safetensors")
    found = load_file(product / "adapter_model.safetensors")
    for name, weights in expected.items():
        torch.testing.assert_close(found[name], weights, rtol=1e-3, atol=1e-5)
    position = json.loads((tmp_path / "short" / "checkpoints" / "6-2" / "position.json").read_text())
    assert position["micro_batch_size"] == 2


def test_the_models_own_blocks_save_memory_where_it_ran_out_with_a_plan_for_hand_written_ones(
    tiny: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "hand_written", lambda *_, **__: None)  # as where the two do not agree
    real, saves = training._forward_backward, []

    def watched(run: Any, model: Any, *others: Any) -> Any:
        saves.append(model.get_base_model().is_gradient_checkpointing)
        return real(run, model, *others)

    monkeypatch.setattr(training, "_forward_backward", watched)
    recipe = recipe_of(max_steps=2)
    recipe = recipe.model_copy(update={"settings": {"rank": 4, "dropout": 0.0}})
    _, log = run(tiny, tmp_path / "first", recipe)
    assert saves == [False, False]
    again = Log()
    folders = Folders(tiny.base_model, tiny.dataset, tmp_path / "again")
    train(recipe, folders, report=again.report, should_stop=again.should_stop, micro_batch_size=1)
    assert saves[2:] == [True, True]
    assert any("Memory ran out before" in event.text for event in again.of(MessageEvent))
    assert again.losses() == pytest.approx(log.losses(), rel=1e-5)


def test_a_plan_that_fails_leaves_the_model_its_own_blocks(
    tiny: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, models = training._settle, []

    def fails(run: Any, model: Any, *others: Any) -> None:
        real(run, model, *others)
        models.append(model)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(training, "_settle", fails)
    with pytest.raises(OutOfMemoryError):
        run(tiny, tmp_path, recipe_of())
    [model] = models
    assert not any("forward" in vars(layer) for layer in model.get_base_model().get_decoder().layers)


def test_the_micro_batch_that_was_found_is_kept_by_an_attempt_that_is_told_nothing(
    tiny: Folders, tmp_path: Path
) -> None:
    log = Log(stop="checkpoint", stop_when=at_step(3))
    folders = Folders(tiny.base_model, tiny.dataset, tmp_path)
    assert train(recipe_of(), folders, report=log.report, should_stop=log.should_stop, micro_batch_size=1) is None
    _, again = run(tiny, tmp_path, recipe_of(), attempt=2)
    assert again.of(PlanEvent)[0].micro_batch_size == 1


def test_an_error_of_the_gpu_is_told_from_one_of_the_program(
    tiny: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with ...")

    monkeypatch.setattr(training, "_forward_backward", failing)
    with pytest.raises(GpuError, match="The GPU failed: CUDA error: an illegal memory access was encountered"):
        run(tiny, tmp_path, recipe_of())


def test_rows_that_cannot_be_used_are_counted_and_the_first_is_named(tiny: Folders, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [*tiny_rows(20), {"instruction": "Why?", "output": ""}]
    rows[2] = {"instruction": "word " * 300, "output": "meow"}
    dataset = write_rows(tmp_path / "data.jsonl", rows)
    folders = Folders(tiny.base_model, dataset, tmp_path / "out")
    log = Log()
    assert train(recipe_of(max_steps=1), folders, report=log.report, should_stop=log.should_stop) is not None
    (plan,) = log.of(PlanEvent)
    assert plan.num_skipped_rows >= 1
    assert plan.num_train_rows + plan.num_held_out_rows + plan.num_skipped_rows == 21
    assert any("Line 3" in event.text for event in log.of(MessageEvent) if event.level == "warning")


def test_another_file_than_the_recipes_is_refused(tiny: Folders, tmp_path: Path) -> None:
    recipe = recipe_of()
    other = recipe.model_copy(update={"dataset": recipe.dataset.model_copy(update={"sha256": "0" * 64})})
    with pytest.raises(DatasetError, match="not the one that the recipe names"):
        run(tiny, tmp_path, other)


def test_another_base_than_the_recipes_is_refused(tiny: Folders, tmp_path: Path) -> None:
    recipe = recipe_of()
    other = recipe.model_copy(update={"base_model": recipe.base_model.model_copy(update={"revision": "0" * 64})})
    with pytest.raises(BaseModelError, match="has changed"):
        run(tiny, tmp_path, other)


def test_a_length_beyond_the_bases_context_is_refused(tiny: Folders, tmp_path: Path) -> None:
    rows = [*tiny_rows(39), {"instruction": "Why?", "output": "word " * 900}]
    dataset = write_rows(tmp_path / "data.jsonl", rows)
    log = Log()
    with pytest.raises(RecipeError, match="512"):
        train(
            recipe_of(max_length=4096), Folders(tiny.base_model, dataset, tmp_path / "out"), report=log.report,
            should_stop=log.should_stop,
        )  # fmt: skip
    product, _ = run(tiny, tmp_path, recipe_of(max_length=4096, max_steps=1))
    assert product is not None, "a limit that no row reaches harms nothing"


def test_rows_over_the_length_are_cut_or_left_out_as_the_recipe_says_and_never_in_silence(
    tiny: Folders, tmp_path: Path
) -> None:
    rows = [*tiny_rows(38), *({"instruction": f"Why {n}?", "output": "word " * 150} for n in range(2))]
    folders = Folders(tiny.base_model, write_rows(tmp_path / "data.jsonl", rows), tmp_path / "out")
    _, cut = run(folders, tmp_path / "cut", recipe_of(max_steps=1))
    _, left_out = run(folders, tmp_path / "left_out", recipe_of(max_steps=1, long_rows="leave_out"))
    facts = [(one.num_train_rows + one.num_held_out_rows, one.num_cut_rows, one.num_skipped_rows)
             for log in (cut, left_out) for one in log.of(PlanEvent)]  # fmt: skip
    assert facts == [(40, 2, 0), (38, 0, 2)]
    said = [one.text for one in left_out.of(MessageEvent) if one.level == "warning"]
    assert any(text.startswith("2 rows are left out. Line 39: The row has ") for text in said)


def test_a_dataset_that_is_too_small_is_refused_before_anything_is_loaded(tiny: Folders, tmp_path: Path) -> None:
    dataset = write_rows(tmp_path / "data.jsonl", tiny_rows(5))
    log = Log()
    with pytest.raises(DatasetError, match="5 rows"):
        train(
            recipe_of(),
            Folders(tiny.base_model, dataset, tmp_path / "out"),
            report=log.report,
            should_stop=log.should_stop,
        )
    assert [event.phase for event in log.of(PhaseEvent)] == ["preparing"]


def test_the_adapter_of_a_base_without_a_template_brings_the_one_that_it_was_trained_with(
    tiny: Folders, tmp_path: Path
) -> None:
    """Whoever sets it gets the ids of training, the BOS token that this tokenizer prepends included."""
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    base = make_tiny_base(tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(  # type: ignore[assignment]
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    tokenizer.save(str(base / "tokenizer.json"))
    product, _ = run(Folders(base, tiny.dataset, tmp_path / "unused"), tmp_path / "out", recipe_of(max_steps=1))
    assert product is not None
    turns = [{"role": "user", "content": "Moo?"}, {"role": "assistant", "content": "moo"}]
    written = (product / "chat_template.jinja").read_text("utf-8")
    served = AutoTokenizer.from_pretrained(base).apply_chat_template(turns, chat_template=written, return_dict=False)
    renderer = Renderer(base, max_length=128, loss_on="assistant")
    example = Example(1, (Message("user", "Moo?"), Message("assistant", "moo")))
    assert served == renderer.render(example).ids
    assert served[0] == 1


# --- validations that choose ---

OVERFITTING = {
    "learning_rate": 0.6, "schedule": "constant", "warmup_share": 0.5, "epochs": 2, "max_steps": 10,
    "validate_every_steps": 2, "checkpoint_every_steps": 3,
}  # fmt: skip
"""A rate that rises until it is far too high: the validation loss is best at step 4 and gets worse from there."""


@pytest.fixture(scope="session")
def chosen(tiny: Folders, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Log]:
    """One whole run that keeps its best step."""
    product, log = run(tiny, tmp_path_factory.mktemp("chosen"), recipe_of(**OVERFITTING, keep_best="best"))
    assert product is not None
    return product, log


def decisions(product: Path | None) -> tuple[Any, ...]:
    assert product is not None
    facts = Result.from_folder(product).provenance
    return facts.adapter_step, facts.best_value, facts.early_stopped_at_step, facts.num_steps


def test_the_adapter_is_that_of_the_best_validated_step(
    tiny: Folders, tmp_path: Path, chosen: tuple[Path, Log]
) -> None:
    product, log = chosen
    losses = {event.step: event.loss for event in log.of(ValidationEvent)}
    assert list(losses) == [2, 4, 6, 8, 10]
    best = min(losses, key=lambda step: losses[step])
    assert best < 10, "a run that gets better to the end would show nothing"
    assert decisions(product) == (best, losses[best], None, 10)
    assert any(f"is that of step {best}" in event.text for event in log.of(MessageEvent))
    assert f"has the weights of step {best} of 10" in (product / "README.md").read_text()
    # Another run that is stopped there and keeps its last step; validation must not have moved the training.
    last = recipe_of(**OVERFITTING | {"validate_every_steps": 0})
    stopped, _ = run(tiny, tmp_path, last, Log(stop="keep", stop_when=at_step(best)))
    assert adapter_bytes(stopped) == adapter_bytes(product)


def test_the_rows_that_choose_give_no_scores(tiny: Folders, chosen: tuple[Path, Log]) -> None:
    from workers.splitting import split_lines, validation_lines

    product, log = chosen
    held_out = split_lines(list(range(1, 41)), recipe_of().split).held_out
    choosing = validation_lines(held_out, recipe_of().split)
    scored = [json.loads(line)["line"] for line in (product / "eval" / "held_out.jsonl").read_text().splitlines()]
    assert sorted([*scored, *choosing]) == list(held_out)
    facts = Result.from_folder(product).provenance
    assert (facts.num_held_out_rows, facts.num_validation_rows, facts.best_by) == (2, 2, "loss")
    assert any("2 of the 4 held-out rows choose" in event.text for event in log.of(MessageEvent))
    assert log.of(PlanEvent)[0].num_held_out_rows == 2


@pytest.mark.parametrize("step", [2, 3, 5, 8, 10])
@pytest.mark.parametrize("stop", ["checkpoint", "now"])
def test_a_resumed_run_chooses_the_step_of_an_unbroken_one(
    tiny: Folders, tmp_path: Path, chosen: tuple[Path, Log], step: int, stop: StopMode
) -> None:
    """It is asked before the step's validation: "checkpoint" leaves that to the next attempt, "now" loses steps."""
    recipe = recipe_of(**OVERFITTING, keep_best="best")
    none, _ = run(tiny, tmp_path, recipe, Log(stop=stop, stop_when=at_step(step)))
    assert none is None
    product, _ = run(tiny, tmp_path, recipe, attempt=2)
    assert adapter_bytes(product) == adapter_bytes(chosen[0])
    assert decisions(product) == decisions(chosen[0])


def test_early_stopping_ends_after_its_patience_and_says_so(tiny: Folders, tmp_path: Path) -> None:
    recipe = recipe_of(**OVERFITTING, early_stopping_patience=2, early_stopping_threshold=50.0)
    product, log = run(tiny, tmp_path, recipe)
    assert [event.step for event in log.of(ValidationEvent)] == [2, 4, 6]
    assert max(log.losses()) == 6
    assert [event.step for event in log.of(CheckpointEvent)] == [3, 6]
    assert decisions(product)[2:] == (6, 6)
    assert decisions(product)[0] is None, "the last step is kept unless the best is asked for"
    assert any(event.text.startswith("Early stopping at step 6 of 10") for event in log.of(MessageEvent))
    assert log.of(ResultEvent) == [ResultEvent(folder=str(product))], "nobody asked it to stop"
    assert product is not None
    assert "early stopping ended training at step 6" in (product / "README.md").read_text()


@pytest.mark.parametrize("step", [3, 4, 5, 6])
def test_a_resumed_run_stops_early_where_an_unbroken_one_does(tiny: Folders, tmp_path: Path, step: int) -> None:
    recipe = recipe_of(**OVERFITTING, early_stopping_patience=2, early_stopping_threshold=50.0, keep_best="best")
    whole, _ = run(tiny, tmp_path / "whole", recipe)
    run(tiny, tmp_path / "broken", recipe, Log(stop="checkpoint", stop_when=at_step(step)))
    resumed, _ = run(tiny, tmp_path / "broken", recipe, attempt=2)
    assert decisions(resumed) == decisions(whole)
    assert decisions(whole)[2] == 6
    assert adapter_bytes(resumed) == adapter_bytes(whole)


def test_a_run_killed_while_it_is_scored_still_has_its_best_step(
    tiny: Folders, tmp_path: Path, chosen: tuple[Path, Log]
) -> None:
    recipe = recipe_of(**OVERFITTING, keep_best="best")
    ending = Log(stop="now", stop_when=lambda event: isinstance(event, PhaseEvent) and event.phase == "evaluating")
    none, _ = run(tiny, tmp_path, recipe, ending)
    assert none is None
    product, log = run(tiny, tmp_path, recipe, attempt=2)
    assert log.of(StepEvent) == []
    assert adapter_bytes(product) == adapter_bytes(chosen[0])


def test_stop_and_keep_takes_the_best_step_so_far(tiny: Folders, tmp_path: Path) -> None:
    recipe = recipe_of(**OVERFITTING, keep_best="best")
    product, log = run(tiny, tmp_path, recipe, Log(stop="keep", stop_when=at_step(9)))
    losses = {event.step: event.loss for event in log.of(ValidationEvent)}
    assert product is not None
    assert Result.from_folder(product).stopped_at_step == 9
    assert decisions(product)[0] == min(losses, key=lambda step: losses[step])


def test_a_measure_of_answers_may_choose(tiny: Folders, tmp_path: Path) -> None:
    from workers.evaluations import get_evaluation

    recipe = recipe_of(
        max_steps=4, validate_every_steps=2, keep_best="best", best_by="token_f1", num_validated_answers=1
    )  # fmt: skip
    product, log = run(tiny, tmp_path, recipe)
    events = log.of(ValidationEvent)
    assert [(event.step, event.evaluation) for event in events] == [(2, "token_f1"), (4, "token_f1")]
    assert all(0.0 <= event.score <= 1.0 for event in events)
    assert get_evaluation("token_f1").higher_is_better
    best = max(events, key=lambda event: (event.score, -event.step))
    assert decisions(product)[:2] == (None if best.step == 4 else best.step, best.score)


def test_too_few_held_out_rows_to_choose_on_are_refused(tiny: Folders, tmp_path: Path) -> None:
    recipe = recipe_of(keep_best="best")
    recipe = recipe.model_copy(update={"split": recipe.split.model_copy(update={"max_held_out": 3})})
    with pytest.raises(DatasetError, match="3 are held out"):
        run(tiny, tmp_path, recipe)


def test_validations_that_only_show_leave_the_training_alone(
    tiny: Folders, tmp_path: Path, straight: tuple[Path, Log]
) -> None:
    product, log = run(tiny, tmp_path, recipe_of(validate_every_steps=1))
    assert [event.step for event in log.of(ValidationEvent)] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in straight[1].of(ValidationEvent)] == [3, 6]
    assert adapter_bytes(product) == adapter_bytes(straight[0])
    assert Result.from_folder(product or tmp_path).provenance.best_by == ""

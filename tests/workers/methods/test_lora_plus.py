from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file

from tests.tiny import make_tiny_base, tiny_rows, write_rows
from tests.workers.methods.trying import attach, disturb, random_rows
from workers import training
from workers.events import StepEvent, StopMode
from workers.methods import Method, get_method, methods
from workers.recipe import Recipe
from workers.training import Folders, parameter_groups, train

RATIO = 8.0
ONE_RATE = [name for name, one in methods().items() if type(one).learning_rate_factor is Method.learning_rate_factor]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    folder = tmp_path_factory.mktemp("tiny")
    return Folders(make_tiny_base(folder / "base"), write_rows(folder / "data.jsonl", tiny_rows(40)), folder / "unused")


def recipe_of(method: str = "lora_plus", **settings: Any) -> Recipe:
    settings = {"rank": 4, "dropout": 0.1} | settings
    return Recipe.from_dict(
        {
            "name": "Sounds",
            "base_model": {"name": "tiny"},
            "dataset": {"name": "sounds", "format": "alpaca"},
            "method": method,
            "settings": settings,
            "precision": "float32",
            "training": {
                "learning_rate": 0.002, "batch_size": 4, "micro_batch_size": 2, "max_length": 128, "packing": False,
                "max_steps": 6, "checkpoint_every_steps": 3, "gradient_checkpointing": False, "weight_decay": 0.2,
            },
            "split": {"held_out_share": 0.1},
            "evaluation": {"num_generated": 0, "max_new_tokens": 4, "metrics": ["loss"]},
        }
    )  # fmt: skip


def run(tiny: Folders, out: Path, recipe: Recipe, *, stop_at: int | None = None, attempt: int = 1) -> tuple[Any, Any]:
    """The adapter's weights, None when it was stopped, and the steps that were reported."""
    steps: list[StepEvent] = []

    def should_stop() -> StopMode | None:
        return "checkpoint" if stop_at is not None and steps and steps[-1].step == stop_at else None

    product = train(
        recipe,
        Folders(tiny.base_model, tiny.dataset, out),
        report=lambda event: steps.append(event) if isinstance(event, StepEvent) else None,
        should_stop=should_stop,
        attempt=attempt,
    )
    return None if product is None else load_file(product / "adapter_model.safetensors"), steps


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float = 0.0) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=tolerance, atol=tolerance, msg=lambda text, at=name: at)


@pytest.fixture(scope="module")
def straight(tiny: Folders, tmp_path_factory) -> tuple[Any, list[StepEvent]]:
    return run(tiny, tmp_path_factory.mktemp("straight"), recipe_of(learning_rate_ratio=RATIO))


def test_training_gives_the_weights_of_pefts_own_optimizer(tiny, straight, tmp_path, monkeypatch) -> None:
    """With schedule, clipping and weight decay; the learning rates of its groups scale with the schedule."""
    seen: dict[str, Any] = {}
    adamw, ours = torch.optim.AdamW, training.attach

    def attach_and_keep(*args: Any) -> Any:
        seen["model"] = ours(*args)
        return seen["model"]

    def theirs(_groups: Any, *, lr: float, weight_decay: float, **others: Any) -> torch.optim.Optimizer:
        # Its weight decay has a name of its own; by the usual one it would be dropped without a word.
        optimizer = create_loraplus_optimizer(
            seen["model"], adamw, lr=lr, loraplus_lr_ratio=RATIO, loraplus_weight_decay=weight_decay, **others
        )
        for group in optimizer.param_groups:
            group["learning_rate_factor"] = group["lr"] / lr
        return optimizer

    monkeypatch.setattr(training, "attach", attach_and_keep)
    monkeypatch.setattr(torch.optim, "AdamW", theirs)
    weights, steps = run(tiny, tmp_path, recipe_of(learning_rate_ratio=RATIO))
    assert_same(weights, straight[0], 1e-6)
    assert [step.loss for step in steps] == pytest.approx([step.loss for step in straight[1]], rel=1e-6)


def test_resuming_gives_the_same_adapter_as_never_stopping(tiny, straight, tmp_path) -> None:
    recipe = recipe_of(learning_rate_ratio=RATIO)
    none, first = run(tiny, tmp_path, recipe, stop_at=2)
    assert none is None
    weights, second = run(tiny, tmp_path, recipe, attempt=2)
    assert [step.step for step in (*first, *second)] == [1, 2, 3, 4, 5, 6]
    assert [step.loss for step in (*first, *second)] == [step.loss for step in straight[1]]
    assert_same(weights, straight[0])


def test_a_ratio_of_one_is_lora_and_the_reported_rate_is_that_of_a(tiny, straight, tmp_path) -> None:
    weights, steps = run(tiny, tmp_path / "one", recipe_of(learning_rate_ratio=1.0))
    plain, _ = run(tiny, tmp_path / "lora", recipe_of("lora"))
    assert_same(weights, plain)
    assert [step.learning_rate for step in steps] == [step.learning_rate for step in straight[1]]
    assert any(not torch.equal(value, straight[0][name]) for name, value in weights.items())


def test_only_b_learns_faster(tiny) -> None:
    recipe = recipe_of(learning_rate_ratio=RATIO)
    model = attach("lora_plus", tiny.base_model, "float32", recipe.settings)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(recipe, model)
    parts = {
        group["learning_rate_factor"]: {names[id(one)].split(".")[-3] for one in group["params"]} for group in groups
    }
    assert parts == {1.0: {"lora_A"}, RATIO: {"lora_B"}}


@pytest.mark.parametrize("name", ONE_RATE)
def test_a_method_with_one_rate_keeps_one_group_in_the_models_order(name: str, tiny) -> None:
    method = get_method(name)
    model = attach(name, tiny.base_model, method.precisions[0])
    (group,) = parameter_groups(recipe_of(name).model_copy(update={"settings": {}}), model)
    assert group["learning_rate_factor"] == 1.0
    assert [id(one) for one in group["params"]] == [id(one) for one in model.parameters() if one.requires_grad]


def test_merging_gives_the_same_logits(tiny) -> None:
    adapted = attach("lora_plus", tiny.base_model, "float32").eval()
    disturb(adapted)
    ids_BT = torch.tensor(random_rows(12))
    with torch.no_grad():
        expected = adapted(input_ids=ids_BT).logits
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=ids_BT).logits, expected, rtol=1e-4, atol=1e-4)


# --- what is wrong in peft 0.21.2; when this fails, peft was mended ---


def test_upstream_still_drops_a_weight_decay_that_goes_by_its_usual_name(tiny) -> None:
    model = attach("lora_plus", tiny.base_model, "float32")
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=2.0, weight_decay=0.1)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0}

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model

from tests.tiny import make_tiny_base
from tests.workers.methods.trying import (
    attach,
    disturb,
    gradients,
    padded,
    random_rows,
    recipe_of,
    trainable,
)
from workers import adapters, base_models
from workers.methods import get_method

SETTINGS = {"rank": 6, "alpha": 10.0, "dropout": 0.0}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_tiny_base(tmp_path_factory.mktemp("base"), "llama")


def test_it_is_the_function_that_peft_calls_rslora(base: Path) -> None:
    ours = attach("rslora", base, "float32", SETTINGS)
    disturb(ours)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(
        r=6, lora_alpha=10, target_modules=targets, use_rslora=True, task_type=TaskType.CAUSAL_LM  # type: ignore[arg-type]
    )  # fmt: skip
    theirs = get_peft_model(base_models.load(base, "float32", "cpu", checked=True).model, config).train()
    theirs.load_state_dict(ours.state_dict())
    batch = padded(random_rows(20, 13))
    loss, gradient = gradients(ours, batch)
    expected_loss, expected_gradient = gradients(theirs, batch)
    assert list(trainable(ours)) == list(trainable(theirs))
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-7)
    with torch.no_grad():
        logits = ours.eval()(input_ids=batch.input_ids).logits
        torch.testing.assert_close(logits, theirs.eval()(input_ids=batch.input_ids).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rank", [1, 6, 64])
def test_whoever_divides_the_saved_alpha_by_the_rank_gets_the_true_scale(rank: int, base: Path, tmp_path) -> None:
    adapted = attach("rslora", base, "float32", SETTINGS | {"rank": rank})
    adapters.save(adapted, tmp_path, recipe=recipe_of("rslora"), hub_id="owner/base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["use_rslora"] is False
    assert config["lora_alpha"] / config["r"] == pytest.approx(10.0 / math.sqrt(rank), rel=1e-12)


def test_it_runs_wherever_lora_runs() -> None:
    assert get_method("rslora").runs_in == get_method("lora").runs_in
    assert get_method("rslora").peft_type == "LORA"


def test_a_scale_that_is_no_whole_number_survives_saving(base: Path, tmp_path: Path) -> None:
    adapted = attach("rslora", base, "float32", SETTINGS).eval()
    disturb(adapted)
    adapters.save(adapted, tmp_path, recipe=recipe_of("rslora"), hub_id="owner/base")
    loaded = PeftModel.from_pretrained(base_models.load(base, "float32", "cpu", checked=True).model, str(tmp_path))
    ids_BT = torch.tensor(random_rows(12))
    with torch.no_grad():
        expected = adapted(input_ids=ids_BT).logits
        torch.testing.assert_close(loaded.eval()(input_ids=ids_BT).logits, expected, rtol=0, atol=0)


def test_merging_gives_the_same_logits(base: Path) -> None:
    adapted = attach("rslora", base, "float32", SETTINGS).eval()
    disturb(adapted)
    ids_BT = torch.tensor(random_rows(12))
    with torch.no_grad():
        expected = adapted(input_ids=ids_BT).logits
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=ids_BT).logits, expected, rtol=1e-4, atol=1e-4)

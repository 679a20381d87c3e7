"""Bases that cap their attention scores, as Gemma 2 does: loaded with the caps, trained, saved and estimated."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.tiny import CAPPED, make_tiny_base, tiny_rows, write_rows
from tests.workers.methods.test_every_method import (
    check_checkpointing,
    check_generation,
    check_packing,
    check_training,
)
from tests.workers.methods.trying import attach, gradients, packed, padded, random_rows
from tests.workers.test_resolving import SEVEN_B
from workers import adapters, base_models
from workers.base_folders import read_base_folder
from workers.facts import DatasetFacts, DeviceFacts
from workers.memory import estimate, score_bytes
from workers.recipe import Recipe
from workers.resolving import resolve
from workers.training import Folders, train


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_base(tmp_path_factory.mktemp("bases") / CAPPED, CAPPED)


def without_caps(folder: Path, out: Path) -> Path:
    """The same weights as a base that caps nothing in its attention."""
    made = make_tiny_base(out, CAPPED)
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps(config | {"attn_logit_softcapping": None}))
    return made


@pytest.mark.parametrize("precision", ["float32", "nf4"])
def test_it_is_loaded_with_its_caps(folder: Path, tmp_path: Path, precision: Any) -> None:
    ids_BT = torch.tensor(random_rows(40))
    loaded = base_models.load(folder, precision, "cpu").model
    uncapped = base_models.load(without_caps(folder, tmp_path / "uncapped"), precision, "cpu").model
    assert loaded.config._attn_implementation == "eager"
    with torch.no_grad():
        logits = loaded(input_ids=ids_BT).logits
        assert (logits - uncapped(input_ids=ids_BT).logits).abs().max() > 1e-3, "the caps are felt"
        if precision == "float32":
            theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
            torch.testing.assert_close(logits, theirs(input_ids=ids_BT).logits)


@pytest.mark.parametrize("name", ["lora", "bottleneck", "prompt_tuning"])
def test_methods_do_on_it_what_they_do_on_others(folder: Path, name: str) -> None:
    check_training(name, folder, "float32")
    check_packing(name, folder, "float32")
    check_checkpointing(name, folder, "float32")
    check_generation(name, folder, "float32")


def recipe_of(method: str = "lora", **training: Any) -> Recipe:
    return Recipe.from_dict(
        {
            "name": "capped", "base_model": {"name": "tiny"}, "dataset": {"name": "rows", "format": "alpaca"},
            "method": method, "training": {"epochs": 4, "batch_size": 8, "learning_rate": 0.01, **training},
            "evaluation": {"metrics": ["loss", "exact_match"], "num_generated": 4},
        }
    )  # fmt: skip


def test_a_lora_is_trained_scored_and_loaded_again(folder: Path, tmp_path: Path) -> None:
    shape = read_base_folder(folder).shape
    assert shape.caps_attention
    rows = write_rows(tmp_path / "rows.jsonl", tiny_rows(48))
    facts = DatasetFacts(num_rows=48, total_tokens=48 * 40, longest=60, lengths={64: 48})
    recipe = resolve(recipe_of(), shape, facts, DeviceFacts("cpu", "CPU", 8 * 2**30, 2))
    events: list[Any] = []
    product = train(recipe, Folders(folder, rows, tmp_path / "out"), report=events.append, should_stop=lambda: None)
    losses = [event.loss for event in events if hasattr(event, "loss") and event.loss is not None]
    assert losses[-1] < 0.9 * losses[0]
    assert product is not None
    found = {path.parent for path in (tmp_path / "out").rglob("adapter_config.json")}
    adapted = adapters.load(base_models.load(folder, "float32", "cpu").model, min(found))
    theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        ids_BT = torch.tensor(random_rows(30))
        assert not torch.allclose(adapted(input_ids=ids_BT).logits, theirs(input_ids=ids_BT).logits)


@contextmanager
def kept_bytes(found: dict[int, int], num_pairs: int) -> Iterator[None]:
    """Collects what the backward pass keeps for each pair of tokens, by storage."""

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point() and tensor.numel() >= num_pairs:
            found[tensor.untyped_storage().data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield


@pytest.mark.parametrize(("precision", "is_packed"), [("float32", True), ("float32", False), ("bfloat16", True)])
def test_the_estimate_knows_the_scores_that_are_kept(folder: Path, precision: Any, is_packed: bool) -> None:
    rows, length = 3, 200
    adapted = attach("lora", folder, precision)
    batch = (packed if is_packed else padded)(random_rows(*[length] * rows))
    found: dict[int, int] = {}
    heads = adapted.config.num_attention_heads
    pairs = heads * ((rows * length) ** 2 if is_packed else rows * length**2)
    with kept_bytes(found, pairs):
        gradients(adapted, batch)
    shape = read_base_folder(folder).shape
    arguments = {"rows": 1, "length": rows * length} if is_packed else {"rows": rows, "length": length}
    expected = 8 * pairs * shape.num_layers
    assert sum(found.values()) == expected
    assert expected < score_bytes(shape, **arguments, checkpointing=False) < 2.5 * expected


def test_an_estimate_for_a_large_one_grows_with_the_square_of_the_rows_length() -> None:
    # Beside one whose blocks are not written by hand either.
    gemma, plain = (SEVEN_B.model_copy(update={"family": family}) for family in ("gemma2", "gpt_neox"))
    card = DeviceFacts("cuda", "NVIDIA H100", 80 * 2**30, 8)

    def bytes_of(shape: Any, length: int) -> int:
        facts = DatasetFacts(num_rows=1000, total_tokens=1000 * length, longest=length, lengths={length: 1000})
        recipe = recipe_of(max_length=length, micro_batch_size=1, gradient_checkpointing=False)
        return estimate(resolve(recipe, shape, facts, card), shape, facts, card).activations_bytes

    extra = [bytes_of(gemma, length) - bytes_of(plain, length) for length in (512, 1024)]
    assert extra[1] == pytest.approx(4 * extra[0], rel=1e-6)

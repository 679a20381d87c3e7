"""Rows that join, leave and move in a batch get the answers that each would get alone."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma3TextConfig, LlamaConfig, MistralConfig, Qwen3Config

from tests.tiny import FAMILIES
from tests.workers.methods.trying import attach, disturb
from workers import base_models, continuous
from workers.generation import generate
from workers.layers.attention import ATTENTION
from workers.slots import takes_slots
from workers.step_graphs import StepGraphs

SIZES = {
    "vocab_size": 384, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "initializer_range": 0.3,
}  # fmt: skip
ALTERNATING = ["sliding_attention", "full_attention"] * 2
WITH_WINDOWS = {
    "mistral": MistralConfig(**SIZES, sliding_window=7),
    "qwen3": Qwen3Config(**SIZES, use_sliding_window=True, sliding_window=7, layer_types=ALTERNATING),
    "gemma2": Gemma2Config(**SIZES, query_pre_attn_scalar=8, sliding_window=7, layer_types=ALTERNATING),
    "gemma3_text": Gemma3TextConfig(**SIZES, query_pre_attn_scalar=8, sliding_window=7, layer_types=ALTERNATING),
}


def workload(seed: int, count: int = 17) -> tuple[list[list[int]], list[int]]:
    chance = random.Random(seed)
    prompts = [[chance.randrange(4, 250) for _ in range(chance.randrange(1, 40))] for _ in range(count)]
    return prompts, [chance.randrange(1, 25) for _ in prompts]


def assert_as_if_alone(model: Any, *, num_slots: int, seed: int = 1) -> None:
    prompts, limits = workload(seed)
    assert takes_slots(model)
    alone = generate(model, prompts, max_new_tokens=limits, stop_ids=[], batch_size=1, use_cache=False)
    # Tokens that really end answers, at different times.
    stops = {answer[len(answer) // 2] for answer in alone[::4]}
    expected = [answer[: next((at for at, one in enumerate(answer) if one in stops), None)] for answer in alone]
    assert len({len(answer) for answer in expected}) > 3
    told: list[int] = []
    found = generate(
        model, prompts, max_new_tokens=limits, stop_ids=stops, batch_size=num_slots, on_finished=told.append
    )
    assert found == expected
    assert sum(told) == len(prompts)


@pytest.mark.parametrize("num_slots", [1, 3, 8, 40])
def test_rows_join_and_leave_without_changing_one_another(bases: dict[str, Path], num_slots: int) -> None:
    assert_as_if_alone(base_models.load(bases["llama"], "float32", "cpu").model, num_slots=num_slots, seed=num_slots)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_that_is_trained_here(bases: dict[str, Path], family: str) -> None:
    assert_as_if_alone(base_models.load(bases[family], "float32", "cpu").model, num_slots=4)


@pytest.mark.parametrize("family", WITH_WINDOWS)
def test_sliding_windows_slide_over_each_row_by_itself(family: str) -> None:
    torch.manual_seed(3)
    assert_as_if_alone(AutoModelForCausalLM.from_config(WITH_WINDOWS[family]).eval(), num_slots=4)


@pytest.mark.parametrize("method", ["lora", "prefix_tuning", "prompt_tuning", "p_tuning", "bottleneck", "full"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_adapters_with_and_without_virtual_tokens(bases: dict[str, Path], method: str, family: str) -> None:
    adapted = attach(method, bases[family], "float32").eval()
    disturb(adapted)
    assert_as_if_alone(adapted, num_slots=4)


def test_the_windows_read_grow_with_the_rows(bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(continuous, "WINDOW_STEP", 8)
    assert_as_if_alone(base_models.load(bases["llama"], "float32", "cpu").model, num_slots=4)


def test_few_widths_are_used_where_each_is_a_graph(bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(continuous.ContinuousBatch, "_width", lambda self, count: 1 << (count - 1).bit_length())
    assert_as_if_alone(base_models.load(bases["llama"], "float32", "cpu").model, num_slots=8)


def test_tokens_read_one_step_late_change_nothing(bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(continuous.ContinuousBatch, "_lag", lambda self: 1 if self._can_step() else 0)
    assert_as_if_alone(base_models.load(bases["llama"], "float32", "cpu").model, num_slots=5)


def test_a_long_prompt_is_read_whole(bases: dict[str, Path]) -> None:
    model = base_models.load(bases["llama"], "float32", "cpu").model
    prompts = [[7 + at % 200 for at in range(500)], [9] * 3]
    alone = generate(model, prompts, max_new_tokens=20, stop_ids=[], batch_size=1, use_cache=False)
    assert len(alone[0]) == 12
    assert generate(model, prompts, max_new_tokens=20, stop_ids=[]) == alone


def test_attention_is_as_before_afterwards(bases: dict[str, Path]) -> None:
    model = base_models.load(bases["llama"], "float32", "cpu").model
    seen: list[str] = []
    hook = model.register_forward_pre_hook(lambda *_: seen.append(model.config._attn_implementation))
    with pytest.raises(IndexError):
        generate(model, [[5, 999_999]], max_new_tokens=2, stop_ids=[])
    hook.remove()
    assert seen == [ATTENTION]
    assert model.config._attn_implementation == "sdpa"


def test_a_model_whose_angles_depend_on_its_neighbours_takes_no_slots() -> None:
    def made(rope_type: str) -> nn.Module:
        parameters = {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 2.0}
        return AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, rope_parameters=parameters))

    assert takes_slots(made("linear"))
    assert not takes_slots(made("dynamic"))


# --- on a GPU ---------------------------------------------------------------------------------------------------------

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@on_a_gpu
@pytest.mark.parametrize("method", [None, "lora", "prefix_tuning", "prompt_tuning"])
def test_recorded_steps_give_the_same_answers(bases: dict[str, Path], method: str | None) -> None:
    if method is None:
        model = base_models.load(bases["llama"], "float32", "cuda").model
    else:
        model = attach(method, bases["llama"], "float32").eval()
        disturb(model)
        model = model.cuda()
    assert_as_if_alone(model, num_slots=4)


@on_a_gpu
def test_a_step_is_recorded_at_its_second_run_and_replayed_after() -> None:
    device = torch.device("cuda")
    place, calls = torch.zeros(3, device=device), []

    def step() -> torch.Tensor:
        calls.append(1)
        return place * 2

    graphs = StepGraphs(device)
    found = []
    for value in range(4):
        place.fill_(value)
        found.append(graphs.run("key", step).tolist())
    assert found == [[2.0 * value] * 3 for value in range(4)]
    assert len(calls) == 2


@on_a_gpu
def test_a_step_that_asks_the_device_is_run_as_it_is() -> None:
    device = torch.device("cuda")
    place = torch.ones(3, device=device)
    graphs = StepGraphs(device)
    for _ in range(3):
        assert graphs.run("key", lambda: place * place.sum().item()).tolist() == [3.0] * 3
    assert torch.ones(2, device=device).sum().item() == 2

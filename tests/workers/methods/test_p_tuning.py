"""P-tuning by itself: its encoder, and what is left of it in the saved folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.tiny import HIDDEN, make_tiny_base
from tests.workers.methods.trying import attach, disturb, random_rows, recipe_of, trainable
from workers import adapters, base_models
from workers.base_folders import read_base_folder
from workers.methods import get_method

COUNT = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_tiny_base(tmp_path_factory.mktemp("base") / "qwen2", "qwen2")


def adapter(folder: Path, encoder: str, size: int = 0):
    settings = {"num_virtual_tokens": COUNT, "encoder": encoder, "encoder_size": size}
    return attach("p_tuning", folder, "float32", settings)


def test_the_mlp_is_three_linear_layers_over_trained_inputs(folder: Path) -> None:
    adapted = adapter(folder, "MLP", 24)
    encoder = adapted.prompt_encoder["default"]
    first, second, third = (layer for layer in encoder.mlp_head if isinstance(layer, nn.Linear))
    expected = third(second(first(encoder.embedding.weight).relu()).relu())
    torch.testing.assert_close(adapted.prompt(), expected)
    assert expected.shape == (COUNT, HIDDEN)


def test_the_lstm_reads_the_prompt_in_both_directions(folder: Path) -> None:
    adapted = adapter(folder, "LSTM", 24)
    encoder = adapted.prompt_encoder["default"]
    before = adapted.prompt().detach()
    with torch.no_grad():
        encoder.embedding.weight[2] += 1
    # Every embedding of the prompt hears of a change of one input, which those of the MLP do not.
    assert ((adapted.prompt() - before).abs().amax(dim=1) > 0).all()
    alone = adapter(folder, "MLP", 24)
    before = alone.prompt().detach()
    with torch.no_grad():
        alone.prompt_encoder["default"].embedding.weight[2] += 1
    assert ((alone.prompt() - before).abs().amax(dim=1) > 0).tolist() == [place == 2 for place in range(COUNT)]


@pytest.mark.parametrize(("encoder", "size"), [("MLP", HIDDEN), ("LSTM", HIDDEN // 2)])
def test_size_0_takes_the_width_of_the_base(encoder: str, size: int, folder: Path) -> None:
    method = get_method("p_tuning")
    shape = read_base_folder(folder).shape

    def formula(encoder_size: int) -> int:
        settings = {"num_virtual_tokens": COUNT, "encoder": encoder, "encoder_size": encoder_size}
        return method.num_trainable(method.read_settings(settings), shape)

    assert formula(0) == formula(size)
    assert sum(one.numel() for one in trainable(adapter(folder, encoder)).values()) == formula(size)


@pytest.mark.parametrize("encoder", ["MLP", "LSTM"])
def test_the_encoder_is_dropped_when_saving_and_the_prompt_stays(encoder: str, folder: Path, tmp_path: Path) -> None:
    adapted = adapter(folder, encoder)
    disturb(adapted)
    prompt = adapted.prompt().detach()
    adapters.save(adapted, tmp_path, recipe=recipe_of("p_tuning"), hub_id="owner/base")
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {name: value.shape for name, value in saved.items()} == {"prompt_embeddings": (COUNT, HIDDEN)}
    torch.testing.assert_close(saved["prompt_embeddings"], prompt, rtol=0, atol=0)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "P_TUNING"
    base = base_models.load(folder, "float32", "cpu", checked=True).model
    loaded = adapters.load(base, tmp_path)
    assert [name for name, _ in loaded.prompt_encoder["default"].named_parameters()] == ["embedding.weight"]
    # Saving on the way does not end training.
    assert len(trainable(adapted)) > 1
    ids_BT = torch.tensor(random_rows(9))
    with torch.no_grad():
        # Not to the bit: without gradients torch computes an LSTM by another kernel.
        torch.testing.assert_close(
            loaded(input_ids=ids_BT).logits, adapted.eval()(input_ids=ids_BT).logits, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("encoder", ["MLP", "LSTM"])
def test_a_fresh_prompt_is_no_larger_than_words_are(encoder: str, folder: Path) -> None:
    adapted = adapter(folder, encoder)
    words = adapted.get_base_model().get_input_embeddings().weight
    # peft's noise for prompt tuning, normal with a spread of 1, is twenty times as large as this base's words.
    assert adapted.prompt().std() < 5 * words.std()

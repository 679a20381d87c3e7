from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional

from tests.tiny import make_tiny_base
from workers import base_models
from workers.errors import BaseModelError
from workers.methods import get_method


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_tiny_base(tmp_path_factory.mktemp("bases") / "llama")


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "nf4", "int8"])
def test_it_loads_frozen_at_each_precision(folder: Path, precision) -> None:
    import bitsandbytes

    model = base_models.load(folder, precision, "cpu").model
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training
    projection = model.model.layers[0].self_attn.q_proj
    expected = {"nf4": bitsandbytes.nn.Linear4bit, "int8": bitsandbytes.nn.Linear8bitLt}
    assert type(projection) is expected.get(precision, torch.nn.Linear)
    if precision == "nf4":
        assert projection.weight.quant_state.nested, "double quantisation"
        assert projection.weight.quant_state.quant_type == "nf4"
    if precision in ("float32", "bfloat16"):
        assert projection.weight.dtype == getattr(torch, precision)


def test_4_bit_layers_are_kept_from_the_kernel_without_autograd(folder: Path) -> None:
    import bitsandbytes

    layers = [
        module
        for module in base_models.load(folder, "nf4", "cpu").model.modules()
        if isinstance(module, bitsandbytes.nn.Linear4bit)
    ]
    assert layers
    assert all(module.support_avx512bf16_for_cpu is False for module in layers)


def adapter_gradients(model, ids_BT) -> torch.Tensor:
    model.zero_grad()
    logits = model(input_ids=ids_BT).logits
    functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids_BT[:, 1:].flatten()).backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.requires_grad])


def test_qlora_gradients_are_right_before_and_after_an_evaluation(folder: Path) -> None:
    import bitsandbytes

    loaded = base_models.load(folder, "nf4", "cpu", compute_dtype=torch.float32).model
    reference = base_models.load(folder, "float32", "cpu").model
    for name, module in loaded.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            reference.get_submodule(name).weight.data.copy_(weight)
    settings = get_method("lora").read_settings({"dropout": 0.0})
    qlora, lora = (get_method("lora").attach(model, settings) for model in (loaded, reference))
    torch.manual_seed(3)
    values = {name: torch.randn_like(p) * 0.05 for name, p in lora.named_parameters() if p.requires_grad}
    for model in (qlora, lora):
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.data.copy_(values[name])
        model.train()
    ids_BT = torch.randint(4, 200, (2, 24))
    expected = adapter_gradients(lora, ids_BT)
    before = adapter_gradients(qlora, ids_BT)
    qlora.eval()
    with torch.no_grad():
        qlora(input_ids=ids_BT)
        qlora(input_ids=ids_BT[:, :1])
    qlora.train()
    after = adapter_gradients(qlora, ids_BT)
    for found in (before, after):
        assert functional.cosine_similarity(found, expected, dim=0) > 0.9999
        assert (found - expected).norm() / expected.norm() < 1e-3


def test_it_refuses_weights_that_are_not_finite(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    made = make_tiny_base(tmp_path / "broken")
    weights = load_file(made / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, made / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseModelError, match="not finite"):
        base_models.load(made, "float32", "cpu")


def test_it_refuses_weights_of_another_model(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    made = make_tiny_base(tmp_path / "broken")
    weights = load_file(made / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, made / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseModelError, match="up_proj"):
        base_models.load(made, "float32", "cpu")


def test_it_refuses_an_unknown_family_in_a_sentence(tmp_path: Path) -> None:
    import json

    made = make_tiny_base(tmp_path / "odd")
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps(config | {"model_type": "llamoid"}))
    with pytest.raises(BaseModelError, match="transformers cannot load"):
        base_models.load(made, "float32", "cpu")

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, PeftModel, TaskType, get_peft_model
from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
from torch import Tensor

from tests.tiny import FAMILIES, make_tiny_base
from tests.workers.methods.test_every_method import (
    attach,
    disturb,
    gradients,
    padded,
    random_rows,
    recipe_of,
    trainable,
)
from workers import adapters, base_models
from workers.base_folders import read_base_folder
from workers.errors import RecipeError
from workers.generation import generate
from workers.losses import summed_cross_entropy
from workers.methods import get_method
from workers.methods.ia3 import rescaled
from workers.recipe import Recipe
from workers.shapes import LinearShape

# (layers whose outputs, the layer whose input), written down from each family's source, not from the method.
PLACES = {
    "llama": (("self_attn.k_proj", "self_attn.v_proj"), "mlp.down_proj"),
    "qwen2": (("self_attn.k_proj", "self_attn.v_proj"), "mlp.down_proj"),
    "qwen3": (("self_attn.k_proj", "self_attn.v_proj"), "mlp.down_proj"),
    "mistral": (("self_attn.k_proj", "self_attn.v_proj"), "mlp.down_proj"),
    "gemma": (("self_attn.k_proj", "self_attn.v_proj"), "mlp.down_proj"),
    "phi3": (("self_attn.qkv_proj",), "mlp.down_proj"),
    "gpt2": (("attn.c_attn",), "mlp.c_proj"),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {family: make_tiny_base(root / family, family) for family in FAMILIES}


def load(folder: Path, precision: Any, dtype: torch.dtype | None = None) -> Any:
    return base_models.load(folder, precision, "cpu", checked=True, compute_dtype=dtype).model


def scaled_by_hand(model: Any, vectors: dict[str, Tensor], family: str) -> Any:
    """The base with the vectors multiplied in by hooks, as Liu et al. 2022 write it in section 3.3."""
    outputs, feed_forward = PLACES[family]
    for path, module in model.named_modules():
        if path.endswith(outputs):
            module.register_forward_hook(lambda _m, _i, output, at=path: output * vectors[at])
        if path.endswith(feed_forward):
            module.register_forward_pre_hook(lambda _m, inputs, at=path: (inputs[0] * vectors[at],))
    return model


def vectors_of(adapted: Any) -> dict[str, Tensor]:
    return {
        name.removeprefix("base_model.model.").removesuffix(".ia3_l.default"): value
        for name, value in trainable(adapted).items()
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_it_rescales_keys_values_and_the_feed_forwards_inside(family, bases) -> None:
    adapted = attach("ia3", bases[family], "float32")
    disturb(adapted)
    batch = padded(random_rows(18, 11))
    loss, gradient = gradients(adapted, batch)
    written = {name: value.detach().flatten().clone().requires_grad_() for name, value in vectors_of(adapted).items()}
    by_hand = scaled_by_hand(load(bases[family], "float32"), written, family).train()
    expected, count = summed_cross_entropy(by_hand, batch)
    (expected / count).backward()
    assert len(written) == 2 * (len(PLACES[family][0]) + 1), "two layers"
    assert loss == pytest.approx(expected.item() / int(count), rel=1e-5)
    torch.testing.assert_close(gradient, torch.cat([value.grad for value in written.values()]), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("family", "precision", "close"),
    [("llama", "nf4", 1e-4), ("phi3", "nf4", 1e-4), ("gpt2", "nf4", 1e-4), ("llama", "int8", 1e-4)],
)
def test_quantised_bases_give_the_gradients_of_hooks_on_the_same_base(family, precision, close: float, bases) -> None:
    torch.manual_seed(5)
    method = get_method("ia3")
    adapted = method.attach(load(bases[family], precision, torch.float32), method.read_settings({})).train()
    disturb(adapted)
    batch = padded(random_rows(18, 11))
    loss, gradient = gradients(adapted, batch)
    written = {name: value.detach().flatten().clone().requires_grad_() for name, value in vectors_of(adapted).items()}
    by_hand = scaled_by_hand(load(bases[family], precision, torch.float32), written, family).train()
    expected, count = summed_cross_entropy(by_hand, batch)
    (expected / count).backward()
    other = torch.cat([value.grad for value in written.values()])
    assert loss == pytest.approx(expected.item() / int(count), rel=1e-4)
    assert (gradient - other).norm() < close * other.norm()


@pytest.mark.parametrize("precision", ["nf4", "int8"])
def test_in_bfloat16_a_quantised_base_trains_and_is_proved_in_plain_peft(precision, bases, tmp_path: Path) -> None:
    method = get_method("ia3")
    adapted = method.attach(load(bases["llama"], precision, torch.bfloat16), method.read_settings({})).train()
    disturb(adapted)
    batch = padded(random_rows(18, 11))
    _, gradient = gradients(adapted, batch)
    assert {value.grad.dtype for value in trainable(adapted).values()} == {torch.float32}
    exact = method.attach(load(bases["llama"], precision, torch.float32), method.read_settings({})).train()
    disturb(exact)
    _, expected = gradients(exact, batch)
    assert (gradient - expected).norm() < 0.1 * expected.norm()
    adapted.eval()
    with torch.no_grad():
        assert adapted(input_ids=batch.input_ids).logits.dtype == torch.bfloat16
    adapters.save(adapted, tmp_path, recipe=recipe_of("ia3"), hub_id="owner/base")
    with torch.no_grad():
        before = adapted(input_ids=batch.input_ids).logits
    verified, _ = adapters.prove(adapted, tmp_path, random_rows(9, 7))
    assert verified
    again = adapters.load(load(bases["llama"], precision, torch.bfloat16), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=batch.input_ids).logits, before, rtol=0, atol=0)


@pytest.mark.parametrize("precision", get_method("ia3").precisions)
def test_taking_it_off_gives_the_base_on_every_precision(precision, bases) -> None:
    ids_BT = torch.tensor(random_rows(16))
    adapted = attach("ia3", bases["llama"], precision).eval()
    disturb(adapted)
    with torch.no_grad():
        expected = load(bases["llama"], precision)(input_ids=ids_BT).logits
        assert not torch.equal(adapted(input_ids=ids_BT).logits, expected)
        torch.testing.assert_close(adapted.unload()(input_ids=ids_BT).logits, expected, rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("use_cache", [True, False])
def test_batched_left_padded_answers_are_those_of_single_prompts(family, use_cache: bool, bases) -> None:
    adapted = attach("ia3", bases[family], "float32").eval()
    disturb(adapted)
    prompts = random_rows(13, 6, 9)
    alone = [generate(adapted, [prompt], max_new_tokens=8, stop_ids=())[0] for prompt in prompts]
    assert generate(adapted, prompts, max_new_tokens=8, stop_ids=(), use_cache=use_cache) == alone


@pytest.mark.parametrize("family", FAMILIES)
def test_merging_gives_the_same_logits(family, bases) -> None:
    adapted = attach("ia3", bases[family], "float32").eval()
    disturb(adapted)
    ids_BT = torch.tensor(random_rows(16))
    with torch.no_grad():
        expected = adapted(input_ids=ids_BT).logits
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=ids_BT).logits, expected, rtol=1e-4, atol=1e-4)


def test_the_configuration_names_its_layers_in_a_fixed_order_and_loads_in_plain_peft(bases, tmp_path: Path) -> None:
    adapted = attach("ia3", bases["gpt2"], "float32").eval()
    disturb(adapted)
    adapters.save(adapted, tmp_path, recipe=recipe_of("ia3"), hub_id="owner/base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["c_attn", "mlp.c_proj"]
    assert config["feedforward_modules"] == ["mlp.c_proj"]
    ids_BT = torch.tensor(random_rows(16))
    loaded = PeftModel.from_pretrained(load(bases["gpt2"], "float32"), str(tmp_path)).eval()
    with torch.no_grad():
        expected = adapted(input_ids=ids_BT).logits
        torch.testing.assert_close(loaded(input_ids=ids_BT).logits, expected, rtol=0, atol=0)


# --- refusals ---


def refusals(shape, **training: Any) -> dict[str, str]:
    recipe = Recipe.from_dict(recipe_of("ia3").to_dict() | {"training": training})
    return get_method("ia3").refusals(recipe, shape)


@pytest.mark.parametrize("family", FAMILIES)
def test_known_families_are_taken(family, bases) -> None:
    assert refusals(read_base_folder(bases[family]).shape) == {}


def test_a_family_with_other_layers_is_refused_with_the_names_it_has(bases) -> None:
    linears = tuple(LinearShape(name=name, in_features=64, out_features=64) for name in ("in_proj", "out_proj", "w1"))
    shape = read_base_folder(bases["llama"]).shape.model_copy(update={"family": "mamba", "linears": linears})
    text = refusals(shape)["method"]
    assert "mamba" in text
    assert "in_proj, out_proj, w1" in text
    assert "LoRA" in text


def test_a_mixture_of_experts_is_refused(bases) -> None:
    shape = read_base_folder(bases["llama"]).shape
    experts = shape.model_copy(update={"linears": (*shape.linears, shape.linears[-1])})
    assert rescaled(shape) is not None
    assert "method" in refusals(experts)


def test_a_model_with_other_layers_is_refused_before_it_is_touched(bases) -> None:
    model = load(bases["llama"], "float32")
    for layer in model.model.layers:
        layer.mlp.other = layer.mlp.down_proj
        del layer.mlp.down_proj
    with pytest.raises(RecipeError, match=r"k_proj.*other.*v_proj"):
        get_method("ia3").attach(model, get_method("ia3").read_settings({}))


def test_a_block_without_keys_of_its_own_is_refused(bases) -> None:
    model = load(bases["llama"], "float32")
    del model.model.layers[1].self_attn.k_proj
    with pytest.raises(RecipeError, match="one k_proj in each of the 2 blocks, and this model has 1"):
        get_method("ia3").attach(model, get_method("ia3").read_settings({}))


def test_weight_decay_is_refused_because_it_would_pull_the_vectors_to_zero(bases) -> None:
    shape = read_base_folder(bases["llama"]).shape
    assert "Set weight decay to 0" in refusals(shape, weight_decay=0.01)["training.weight_decay"]
    assert "training.weight_decay" not in refusals(shape, weight_decay=0.0)


# --- what is wrong in peft 0.21.2; when one of these fails, peft was mended ---


def upstream(folder: Path, precision: Any, dtype: torch.dtype | None = None) -> Any:
    config = IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"],
        feedforward_modules=["down_proj"],
        task_type=TaskType.CAUSAL_LM,
    )
    return get_peft_model(load(folder, precision, dtype), config)


@pytest.mark.parametrize("precision", ["nf4", "int8"])
def test_upstream_still_fails_on_a_quantised_base_that_computes_in_bfloat16(precision, bases) -> None:
    model = upstream(bases["llama"], precision, torch.bfloat16)
    with pytest.raises(RuntimeError, match="same dtype"):
        model(input_ids=torch.tensor(random_rows(8)))


def test_upstream_still_rescales_queries_instead_of_keys_and_lacks_phi3() -> None:
    table = TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
    assert "phi3" not in table
    for family in ("gemma", "qwen2", "qwen3"):
        assert "q_proj" in table[family]
        assert "k_proj" not in table[family]


@pytest.mark.parametrize(("precision", "bits"), [("nf4", 4), ("int8", 8)])
def test_upstream_still_refuses_to_take_itself_off_a_quantised_base(precision, bits: int, bases) -> None:
    with pytest.raises(ValueError, match=f"{bits}-bit mode"):
        upstream(bases["llama"], precision).unload()


@pytest.mark.parametrize(("precision", "bits"), [("nf4", 4), ("int8", 8)])
def test_upstream_still_refuses_to_merge_into_quantised_weights(precision, bits: int, bases) -> None:
    with pytest.raises(ValueError, match=f"{bits}-bit mode"):
        upstream(bases["llama"], precision).merge_and_unload()

from __future__ import annotations

import ast
import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method

from tests.tiny import FAMILIES, make_tiny_base
from tests.workers.methods.test_every_method import (
    attach,
    disturb,
    gradients,
    packed,
    padded,
    random_rows,
    recipe_of,
    trainable,
)
from workers import adapters, base_models
from workers.base_folders import read_base_folder
from workers.errors import RecipeError
from workers.generation import generate
from workers.layers.bottleneck import NON_LINEARITIES, BottleneckConfig, BottleneckLayer
from workers.methods import get_method

METHOD = get_method("bottleneck")
PLACEMENTS = ("houlsby", "pfeiffer", "parallel")

# What a person runs beside the unzipped folder; argv: base model, adapter. Reads ids, writes logits and answer.
OUTSIDE = """
import json, sys
sys.path.insert(0, sys.argv[2])
import peft_bottleneck
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
model = PeftModel.from_pretrained(model, sys.argv[2]).eval()
ids = torch.tensor(json.load(sys.stdin))
with torch.no_grad():
    logits = model(input_ids=ids).logits
written = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8,
                         eos_token_id=383, pad_token_id=0)
assert not [name for name in sys.modules if name.split(".")[0] in ("workers", "studio", "jobs")]
print(json.dumps({"logits": logits.tolist(), "written": written[:, ids.shape[1]:].tolist()}))
"""


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {family: make_tiny_base(root / family, family) for family in FAMILIES}


def adapted_base(folder: Path, placement: str, precision="float32", **settings):
    return attach("bottleneck", folder, precision, {"placement": placement, **settings})


def load_base(folder: Path, precision="float32"):
    return base_models.load(folder, precision, "cpu", checked=True).model


def tiny_model(family: str, **settings):
    """A random model of a family that tests/tiny.py does not have."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 256, "pad_token_id": 0}  # fmt: skip
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(sizes | settings))
    # Gemma 2 caps its attention scores, which the fused attention cannot.
    attention = "eager" if family == "gemma2" else "sdpa"
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval().requires_grad_(False)


def blocks_of(model):
    base = model.get_base_model()
    return base.transformer.h if hasattr(base, "transformer") else base.model.layers


def layers_of(module) -> list[BottleneckLayer]:
    return [one for one in module.modules() if isinstance(one, BottleneckLayer)]


# --- what the papers say ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_it_begins_as_the_base_exactly(family, placement: str, bases) -> None:
    ids_BT = torch.tensor(random_rows(14, 14))
    with torch.no_grad():
        expected = load_base(bases[family])(input_ids=ids_BT).logits
        found = adapted_base(bases[family], placement).eval()(input_ids=ids_BT).logits
    assert torch.equal(found, expected)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("precision", METHOD.precisions)
def test_it_begins_as_the_base_exactly_at_every_precision(precision, placement: str, bases) -> None:
    ids_BT = torch.tensor(random_rows(14))
    adapted = adapted_base(bases["llama"], placement, precision).eval()
    with torch.no_grad():
        expected = load_base(bases["llama"], precision)(input_ids=ids_BT).logits
        assert torch.equal(adapted(input_ids=ids_BT).logits, expected)
    assert {parameter.dtype for parameter in trainable(adapted).values()} == {torch.float32}


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_formula_counts_every_placement(family, placement: str, bases) -> None:
    settings = METHOD.read_settings({"placement": placement, "reduction_factor": 5})
    adapted = adapted_base(bases[family], placement, reduction_factor=5)
    expected = METHOD.num_trainable(settings, read_base_folder(bases[family]).shape)
    assert sum(parameter.numel() for parameter in trainable(adapted).values()) == expected


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("family", [*FAMILIES, "gemma2", "gemma3_text"])
def test_a_block_gives_what_the_paper_says(family: str, placement: str, bases) -> None:
    """The formulas, from parts of the block itself; sublayers here include the norms around them."""
    if family in FAMILIES:
        adapted = adapted_base(bases[family], placement, reduction_factor=8).eval()
    else:
        adapted = METHOD.attach(tiny_model(family), METHOD.read_settings({"placement": placement})).eval()
    disturb(adapted)
    block = blocks_of(adapted)[0]
    names = ("pre_feedforward_layernorm", "post_attention_layernorm", "ln_2")
    norm = next(getattr(block, name) for name in names if hasattr(block, name))
    seen: dict[str, torch.Tensor] = {}
    block.register_forward_pre_hook(lambda _, args: seen.update(before=args[0]))
    norm.register_forward_pre_hook(lambda _, args: seen.update(middle=args[0]))
    block.register_forward_hook(lambda _, args, output: seen.update(after=output))

    def run() -> dict[str, torch.Tensor]:
        adapted(input_ids=torch.tensor(random_rows(9)))
        return dict(seen)

    def change(layer: BottleneckLayer, x_BTH: torch.Tensor) -> torch.Tensor:
        down, up = layer.bottleneck_down["default"], layer.bottleneck_up["default"]
        inner = (x_BTH @ down.weight.T + down.bias).clamp(min=0)
        return (4.0 if placement == "parallel" else 1.0) * (inner @ up.weight.T + up.bias)

    def feed_forward(middle_BTH: torch.Tensor) -> torch.Tensor:
        normed = block.mlp(norm(middle_BTH))
        return block.post_feedforward_layernorm(normed) if hasattr(block, "post_feedforward_layernorm") else normed

    with torch.no_grad():
        on = run()
        with adapted.disable_adapter():
            off = run()
            plain = feed_forward(on["middle"])
        adapters_in_block = layers_of(block)
        last = adapters_in_block[-1]
        attention = off["middle"] - off["before"]
        middle = off["middle"]
        if placement == "houlsby":
            assert len(adapters_in_block) == 2
            expected_middle = middle + change(adapters_in_block[0], attention)
            expected = on["middle"] + plain + change(last, plain)
        elif placement == "pfeiffer":
            expected_middle, expected = middle, off["after"] + change(last, off["after"])
        else:
            expected_middle, expected = middle, off["after"] + change(last, middle)
    torch.testing.assert_close(on["middle"], expected_middle, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(on["after"], expected, rtol=1e-5, atol=1e-5)
    assert (on["after"] - off["after"]).abs().max() > 1e-3


@pytest.mark.parametrize("name", NON_LINEARITIES)
def test_every_non_linearity_and_scaling_is_what_it_says(name: str, bases) -> None:
    adapted = adapted_base(bases["llama"], "houlsby", non_linearity=name, scaling=0.5).eval()
    disturb(adapted)
    layer = layers_of(adapted)[1]
    down, up = layer.bottleneck_down["default"], layer.bottleneck_up["default"]
    x = torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(0))
    inner = down(x)
    curves = {
        "relu": inner.clamp(min=0),
        "gelu": inner * 0.5 * (1 + torch.erf(inner / 2**0.5)),
        "silu": inner * torch.sigmoid(inner),
        "tanh": torch.tanh(inner),
    }
    sublayer = layer.base_layer
    layer.base_layer = torch.nn.Identity()
    torch.testing.assert_close(layer(x), x + 0.5 * up(curves[name]))
    layer.base_layer = sublayer


def test_dropout_works_while_training_only(bases) -> None:
    adapted = adapted_base(bases["llama"], "pfeiffer", dropout=0.5)
    disturb(adapted)
    ids_BT = torch.tensor(random_rows(12))
    with torch.no_grad():
        assert not torch.equal(adapted(input_ids=ids_BT).logits, adapted(input_ids=ids_BT).logits)
        adapted.eval()
        assert torch.equal(adapted(input_ids=ids_BT).logits, adapted(input_ids=ids_BT).logits)


# --- what training and writing need ----------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_packing_and_checkpointing_change_no_gradient(family, placement: str, bases) -> None:
    adapted = adapted_base(bases[family], placement)
    disturb(adapted)
    rows = random_rows(21, 9, 14)
    loss, gradient = gradients(adapted, padded(rows))
    for checkpointing in (False, True):
        if checkpointing:
            adapted.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        found, other = gradients(adapted, packed(rows))
        assert found == pytest.approx(loss, rel=1e-5)
        torch.testing.assert_close(other, gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("precision", METHOD.precisions)
def test_every_placement_trains_on_every_precision(precision, placement: str, bases) -> None:
    adapted = adapted_base(bases["llama"], placement, precision)
    adapted.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(trainable(adapted).values(), lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(12):
        losses.append(gradients(adapted, padded(random_rows(24, 17)))[0])
        optimizer.step()
    assert losses[-1] < losses[0] - 0.2


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_batches_and_caches_change_no_answer(family, placement: str, bases) -> None:
    adapted = adapted_base(bases[family], placement).eval()
    disturb(adapted)
    prompts = random_rows(12, 5, 8)
    alone = [generate(adapted, [one], max_new_tokens=10, stop_ids=[])[0] for one in prompts]
    for use_cache in (True, False):
        assert generate(adapted, prompts, max_new_tokens=10, stop_ids=[], use_cache=use_cache) == alone


def test_its_parameters_are_all_that_a_resumed_run_needs(bases) -> None:
    adapted = adapted_base(bases["llama"], "parallel").eval()
    disturb(adapted)
    fresh = adapted_base(bases["llama"], "parallel").eval()
    fresh.load_state_dict(trainable(adapted), strict=False)
    ids_BT = torch.tensor(random_rows(12))
    with torch.no_grad():
        assert torch.equal(fresh(input_ids=ids_BT).logits, adapted(input_ids=ids_BT).logits)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_hidden_states_are_those_that_the_next_block_reads(placement: str, bases) -> None:
    adapted = adapted_base(bases["llama"], placement).eval()
    disturb(adapted)
    seen = []
    blocks_of(adapted)[1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        states = adapted(input_ids=torch.tensor(random_rows(9)), output_hidden_states=True).hidden_states
    assert torch.equal(states[1], seen[0])


def test_wrapped_modules_keep_their_attributes(bases) -> None:
    adapted = adapted_base(bases["qwen3"], "houlsby")
    attention = blocks_of(adapted)[1].self_attn
    assert isinstance(attention, BottleneckLayer)
    assert (attention.layer_idx, attention.head_dim) == (1, 16)
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = attention.no_such_thing


def test_what_the_backward_pass_keeps_is_what_the_estimate_counts(bases) -> None:
    shape = read_base_folder(bases["llama"]).shape
    adapted = adapted_base(bases["llama"], "houlsby", "bfloat16", non_linearity="gelu")
    layer = layers_of(adapted)[1]
    layer.base_layer = torch.nn.Identity()
    own = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = 50
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = layer(torch.randn(1, tokens, shape.hidden_size, dtype=torch.bfloat16))
    assert output.dtype == torch.bfloat16
    settings = METHOD.read_settings({"placement": "houlsby", "non_linearity": "gelu"})
    assert 2 * sum(kept.values()) == 4 * METHOD.adapted_features(settings, shape) * tokens


# --- in peft ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_unloading_leaves_nothing_behind(family, placement: str, bases) -> None:
    base = load_base(bases[family])
    before = {name: type(module) for name, module in base.named_modules()}
    adapted = METHOD.attach(base, METHOD.read_settings({"placement": placement}))
    disturb(adapted)
    assert layers_of(adapted)
    after = adapted.unload()
    assert {name: type(module) for name, module in after.named_modules()} == before
    assert not [module for module in after.modules() if module._forward_pre_hooks or module._forward_hooks]


@pytest.mark.parametrize("merge", ["merge_and_unload", "merge_adapter"])
def test_merging_is_refused(merge: str, bases) -> None:
    adapted = adapted_base(bases["llama"], "pfeiffer")
    with pytest.raises(ValueError, match="not linear"):
        getattr(adapted, merge)()
    assert layers_of(adapted)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_saving_and_loading_in_plain_peft_gives_the_same_model(family, placement, bases, tmp_path: Path) -> None:
    settings = {"non_linearity": "tanh", "scaling": 2.5, "reduction_factor": 4}
    adapted = adapted_base(bases[family], placement, **settings).eval()
    disturb(adapted)
    adapters.save(adapted, tmp_path, recipe=recipe_of("bottleneck"), hub_id="owner/base")
    loaded = PeftModel.from_pretrained(load_base(bases[family]), str(tmp_path)).eval()
    assert not trainable(loaded)
    ids_BT = torch.tensor(random_rows(16))
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids_BT).logits, adapted(input_ids=ids_BT).logits)
    twin = adapted_base(bases[family], placement, **settings)
    twin.load_adapter(str(tmp_path), "again")
    twin.set_adapter("again")
    with torch.no_grad():
        assert torch.equal(twin.eval()(input_ids=ids_BT).logits, adapted(input_ids=ids_BT).logits)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_the_configuration_says_everything_in_one_order(placement: str, bases, tmp_path: Path) -> None:
    texts = set()
    for folder in (tmp_path / "one", tmp_path / "two"):
        adapted = adapted_base(bases["llama"], placement)
        adapters.save(adapted, folder, recipe=recipe_of("bottleneck"), hub_id="owner/base")
        texts.add((folder / "adapter_config.json").read_text())
    (text,) = texts
    config = json.loads(text)
    modules = "(self_attn|mlp)" if placement == "houlsby" else "(mlp)"
    assert config["target_modules"] == rf"model\.layers\.\d+\.{modules}"
    assert config["placement"] == placement
    assert config["bottleneck_size"] == 4
    assert config["scaling"] == (4.0 if placement == "parallel" else 1.0)
    assert config.get("residual_module") == (None if placement == "houlsby" else "post_attention_layernorm")


def test_adapters_of_one_placement_share_a_model_and_others_are_refused(bases) -> None:
    adapted = adapted_base(bases["llama"], "pfeiffer").eval()
    ids_BT = torch.tensor(random_rows(12))
    disturb(adapted)
    with torch.no_grad():
        first = adapted(input_ids=ids_BT).logits
        adapted.add_adapter("second", BottleneckConfig(placement="pfeiffer", bottleneck_size=7, task_type="CAUSAL_LM"))
        assert torch.equal(adapted(input_ids=ids_BT).logits, first)
        adapted.set_adapter("second")
        assert not torch.equal(adapted(input_ids=ids_BT).logits, first)
        adapted.delete_adapter("second")
        assert adapted.active_adapters == ["default"]
        assert torch.equal(adapted(input_ids=ids_BT).logits, first)
    with pytest.raises(ValueError, match="one placement"):
        adapted.add_adapter("third", BottleneckConfig(placement="houlsby", bottleneck_size=4, task_type="CAUSAL_LM"))


def test_a_copy_of_an_adapted_model_is_its_own(bases) -> None:
    adapted = adapted_base(bases["llama"], "parallel").eval()
    disturb(adapted)
    ids_BT = torch.tensor(random_rows(12))
    with torch.no_grad():
        expected = adapted(input_ids=ids_BT).logits
        twin = copy.deepcopy(adapted)
        for parameter in trainable(adapted).values():
            parameter.zero_()
        assert torch.equal(twin(input_ids=ids_BT).logits, expected)


@pytest.mark.parametrize(
    ("field", "value"),
    [("placement", "sideways"), ("placement", None), ("bottleneck_size", 0), ("non_linearity", "sine"),
     ("dropout", 1.0), ("target_modules", ["mlp"])],
)  # fmt: skip
def test_a_configuration_that_cannot_be_says_why(field: str, value) -> None:
    with pytest.raises(ValueError, match=field):
        BottleneckConfig(**({"placement": "pfeiffer", "bottleneck_size": 4} | {field: value}))


@pytest.mark.parametrize(
    ("family", "settings"), [("phi", {}), ("granite", {"residual_multiplier": 0.5}), ("olmo2", {})]
)
def test_blocks_that_are_built_otherwise_are_refused(family: str, settings: dict, bases) -> None:
    with pytest.raises(RecipeError, match=family) as caught:
        METHOD.attach(tiny_model(family, **settings), METHOD.read_settings({}))
    assert "LoRA" in caught.value.next_step
    shape = read_base_folder(bases["llama"]).shape.model_copy(update={"family": family})
    assert family in METHOD.refusals(recipe_of("bottleneck"), shape)["method"]


def test_a_bottleneck_of_nothing_is_refused(bases) -> None:
    recipe = recipe_of("bottleneck").model_copy(update={"settings": {"reduction_factor": 65}})
    found = METHOD.refusals(recipe, read_base_folder(bases["llama"]).shape)
    assert "64" in found["settings.reduction_factor"]
    assert not METHOD.refusals(recipe_of("bottleneck"), read_base_folder(bases["llama"]).shape)


# --- elsewhere: the file that travels with an adapter ----------------------------------------------------------------


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_plain_transformers_and_peft_load_it_with_the_file_that_lies_beside_it(placement, bases, tmp_path) -> None:
    adapted = adapted_base(bases["llama"], placement).eval()
    disturb(adapted)
    out = tmp_path / "adapter"
    adapters.save(adapted, out, recipe=recipe_of("bottleneck"), hub_id="owner/base")
    ids = random_rows(14)
    with torch.no_grad():
        logits = adapted(input_ids=torch.tensor(ids)).logits
    done = subprocess.run(
        [sys.executable, "-I", "-c", OUTSIDE, str(bases["llama"]), str(out)],
        input=json.dumps(ids), capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    outside = json.loads(done.stdout.splitlines()[-1])
    torch.testing.assert_close(torch.tensor(outside["logits"]), logits, rtol=1e-5, atol=1e-5)
    assert outside["written"] == generate(adapted, ids, max_new_tokens=8, stop_ids=[])


def test_that_file_needs_nothing_else() -> None:
    assert METHOD.companion_file is not None
    tree = ast.parse(METHOD.companion_file.read_text("utf-8"))
    found = {
        name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module or "."] if isinstance(node, ast.ImportFrom) else [one.name for one in node.names])
    }
    assert found - set(sys.stdlib_module_names) <= {"torch", "peft", "transformers"}


def test_a_second_copy_is_no_trouble_and_another_method_of_that_name_is(tmp_path: Path) -> None:
    assert METHOD.companion_file is not None
    (tmp_path / "peft_bottleneck.py").write_bytes(METHOD.companion_file.read_bytes())
    (tmp_path / "second.py").write_bytes(METHOD.companion_file.read_bytes())

    def run(code: str) -> subprocess.CompletedProcess[str]:
        code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\nimport peft_bottleneck\n{code}"
        return subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False)

    twice = run("import second\nassert peft_bottleneck.BOTTLENECK is second.BOTTLENECK")
    assert twice.returncode == 0, twice.stderr
    foreign = run("peft_bottleneck.BottleneckModel.made_by = 'someone else'\nimport second")
    assert "already knows a method" in foreign.stderr


# --- what is wrong in peft 0.21.2, which workers/layers/bottleneck.py answers; when one fails, peft was mended --------


def test_upstream_still_registers_only_methods_that_its_enum_knows() -> None:
    with pytest.raises(ValueError, match="Unknown PEFT type"):
        register_peft_method(name="somethingnew", config_cls=BottleneckConfig, model_cls=None)


def test_upstream_still_unloads_only_modules_with_a_weight(bases) -> None:
    adapted = adapted_base(bases["llama"], "pfeiffer")
    block = blocks_of(adapted)[0]
    with pytest.raises(AttributeError, match="weight"):
        BaseTuner._replace_module(adapted.base_model, block, "mlp", block.mlp.base_layer, block.mlp)


def test_upstream_still_leaves_a_sublayers_adapters_where_they_were_made(bases) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    layer = layers_of(adapted_base(bases["llama"], "pfeiffer"))[0]
    assert BaseTunerLayer._get_base_layer_device_and_dtype(layer, layer.base_layer) == (None, None)


def test_a_configuration_is_all_that_peft_needs(bases) -> None:
    config = BottleneckConfig(task_type="CAUSAL_LM", placement="parallel", bottleneck_size=8)
    adapted = get_peft_model(load_base(bases["gpt2"]), config)
    assert config.target_modules == r"transformer\.h\.\d+\.(mlp)"
    assert config.residual_module == "ln_2"
    assert len(layers_of(adapted)) == 2

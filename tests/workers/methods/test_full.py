"""Full fine-tuning: what it trains, what it leaves on disk, what it costs, and when it is refused."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open

from tests.tiny import FAMILIES, make_tiny_base, tiny_rows, write_rows
from tests.workers.methods.trying import attach, disturb, gradients, packed, padded, random_rows, recipe_of, trainable
from tests.workers.test_adapters import RESULT
from tests.workers.test_resolving import CPU, GIB, GPU, ROWS, SEVEN_B, recipe
from workers import adapters, base_models, devices
from workers.__main__ import main
from workers.base_folders import read_base_folder
from workers.errors import RecipeProblems
from workers.facts import DatasetFacts, DeviceFacts
from workers.layers import full
from workers.losses import summed_cross_entropy
from workers.memory import estimate
from workers.methods import get_method
from workers.recipe import Recipe
from workers.resolving import alternatives, resolve
from workers.results import Result
from workers.training import Folders, train

PROMPT = random_rows(17)[0]
OUTSIDE = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, prompt = sys.argv[1], json.loads(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(folder).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
ids = torch.tensor([prompt])
with torch.no_grad():
    logits = model(input_ids=ids).logits[0]
chat = tokenizer.apply_chat_template([{"role": "user", "content": "moo"}], tokenize=False, add_generation_prompt=True)
strangers = [name for name in sys.modules if name.split(".")[0] in ("peft", "workers", "studio", "jobs")]
print(json.dumps({"logits": logits.tolist(), "chat": chat, "dtype": str(model.dtype), "strangers": strangers}))
"""


def outside(folder: Path) -> dict[str, Any]:
    """Logits of PROMPT, and a rendered turn, by a fresh process in which our code cannot be imported."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", OUTSIDE, str(folder), json.dumps(PROMPT)],
        capture_output=True, text=True, check=False, cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def stored(folder: Path) -> dict[str, tuple[torch.dtype, int]]:
    """Type and number of entries of every stored tensor."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                tensor = file.get_tensor(name)
                assert name not in found, f"{name} is stored twice"
                found[name] = (tensor.dtype, tensor.numel())
    return found


def finish(tuned: Any, folder: Path, base: Path) -> Result:
    return adapters.finish(
        tuned, folder, recipe=recipe_of("full"), result=RESULT, base_model_folder=base, template="none",
        hub_id="owner/base", licence="apache-2.0", probe_ids=[PROMPT],
    )  # fmt: skip


# --- a run and its product --------------------------------------------------------------------------------------------


def test_a_run_learns_and_leaves_a_model_that_needs_neither_base_nor_peft(tmp_path: Path) -> None:
    base = make_tiny_base(tmp_path / "base", "qwen2")
    before = digests(base)
    dataset = write_rows(tmp_path / "rows.jsonl", tiny_rows(60))
    asked = Recipe.from_dict(
        recipe_of("full").to_dict()
        | {
            "training": {"learning_rate": 3e-3, "batch_size": 4, "max_length": 96, "epochs": 4, "packing": True},
            "evaluation": {"num_generated": 2, "max_new_tokens": 4, "general": False},
        }
    )
    product = train(asked, Folders(base, dataset, tmp_path / "out"), report=lambda _: None, should_stop=lambda: None)
    assert product is not None
    result = Result.from_folder(product)
    assert result.provenance.last_loss < 0.5 * result.provenance.first_loss  # type: ignore[operator]
    assert result.scores[0].difference_high < 0
    assert result.provenance.verified is True
    assert result.num_trainable == read_base_folder(base).shape.num_parameters
    assert digests(base) == before, "the base's own folder is never written"
    files = {path.relative_to(product).as_posix() for path in product.rglob("*") if path.is_file()}
    # The evaluation harness puts the time into its files' names.
    assert {name for name in files if not name.startswith("eval/lm_eval/")} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "README.md", "studio.json", "result.json", "SHA256SUMS", "eval/scores.json",
        "eval/samples.jsonl", "eval/held_out.jsonl",
        "eval/row_counts.json",
    }  # fmt: skip
    for path in product.rglob("*"):
        if path.is_file() and path.suffix != ".safetensors":
            assert str(tmp_path) not in path.read_text("utf-8"), path.name
    assert outside(product)["chat"] == "<|im_start|>user\nmoo<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_process_with_transformers_alone_gives_the_same_logits(
    family: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    tuned = attach("full", bases[family], "float32").eval()
    disturb(tuned)
    with torch.no_grad():
        logits = tuned(input_ids=torch.tensor([PROMPT])).logits[0]
    result = finish(tuned, tmp_path / "model", bases[family])
    found = outside(tmp_path / "model")
    torch.testing.assert_close(torch.tensor(found["logits"]), logits, rtol=1e-4, atol=1e-4)
    assert found["dtype"] == "torch.float32"
    assert found["strangers"] == []
    assert result.provenance.verified is True
    weights = stored(tmp_path / "model")
    shape = read_base_folder(bases[family]).shape
    assert {dtype for dtype, _ in weights.values()} == {torch.float32}
    assert sum(count for _, count in weights.values()) == shape.num_parameters, "a tied weight is stored once"
    assert ("lm_head.weight" in weights) == (not shape.tied_embeddings)
    assert result.provenance.num_adapter_bytes == pytest.approx(4 * shape.num_parameters, rel=0.05)


def test_its_card_says_what_it_is_and_how_it_loads(bases: dict[str, Path], tmp_path: Path) -> None:
    finish(attach("full", bases["llama"], "float32"), tmp_path / "model", bases["llama"])
    card = (tmp_path / "model" / "README.md").read_text()
    for words in (
        'base_model: "owner/base"', "base_model_relation: finetune", "library_name: transformers",
        "base_model:finetune:owner/base", "Full fine-tuning of `owner/base`",
        'AutoModelForCausalLM.from_pretrained(".")',
        "loaded in plain transformers, gives the same logits", "| measure | base | model |",
    ):  # fmt: skip
        assert words in card
    assert "adapter" not in card
    assert "import PeftModel" not in card


def test_a_model_in_shards_is_whole_and_can_be_a_base_again(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(full, "SHARD_BYTES", "200KB")
    base = tmp_path / "base"
    shutil.copytree(bases["llama"], base)
    (base / "LICENSE.txt").write_text("as you like")
    tuned = attach("full", base, "float32").eval()
    disturb(tuned)
    finish(tuned, tmp_path / "model", base)
    shards = list((tmp_path / "model").glob("*.safetensors"))
    assert len(shards) > 2
    assert (tmp_path / "model" / "LICENSE.txt").read_text() == "as you like"
    assert read_base_folder(tmp_path / "model").shape == read_base_folder(base).shape
    again = base_models.load(tmp_path / "model", "float32", "cpu").model
    for (name, one), other in zip(tuned.get_base_model().named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_a_folder_that_lost_weights_is_not_called_verified(bases: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tuned = attach("full", bases["llama"], "float32").eval()
    adapters.save(tuned, tmp_path / "model", recipe=recipe_of("full"), hub_id="")
    path = tmp_path / "model" / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.1.mlp.up_proj.weight"] *= 0.5
    save_file(weights, path, metadata={"format": "pt"})
    verified, difference = adapters.prove(tuned, tmp_path / "model", [PROMPT], reload=get_method("full").reload)
    assert not verified
    assert difference > 1e-3


def test_a_disk_without_room_is_seen_before_anything_is_written(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = attach("full", bases["llama"], "float32")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100_000))
    with pytest.raises(OSError, match="No space") as caught:
        adapters.save(tuned, tmp_path / "model", recipe=recipe_of("full"), hub_id="")
    assert caught.value.errno == errno.ENOSPC
    assert list((tmp_path / "model").iterdir()) == []


# --- what is trained --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_exactly_the_declared_parameters_are_trained(family: str, bases: dict[str, Path]) -> None:
    method, shape = get_method("full"), read_base_folder(bases[family]).shape
    for train_embeddings in (True, False):
        settings = {"train_embeddings": train_embeddings}
        tuned = attach("full", bases[family], "float32", settings)
        frozen = {name for name, one in tuned.named_parameters() if not one.requires_grad}
        assert bool(frozen) == (not train_embeddings)
        assert all(name.endswith(("embed_tokens.weight", "wte.weight", "lm_head.weight")) for name in frozen)
        before = {name: one.detach().clone() for name, one in tuned.named_parameters()}
        optimizer = torch.optim.AdamW(trainable(tuned).values(), lr=1e-2)
        loss, _ = summed_cross_entropy(tuned, padded(random_rows(24, 17)))
        loss.backward()
        optimizer.step()
        assert {name for name, one in tuned.named_parameters() if not torch.equal(one, before[name])} == set(
            trainable(tuned)
        )
        counted = sum(one.numel() for one in trainable(tuned).values())
        assert counted == method.num_trainable(method.read_settings(settings), shape)


# --- mixed precision --------------------------------------------------------------------------------------------------


@pytest.fixture
def with_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that multiplies bfloat16; this one may have to emulate it, with the same numbers."""
    monkeypatch.setattr(devices, "supports_bfloat16", lambda _: True)


@pytest.mark.usefixtures("with_bfloat16")
@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_mixed_precision_trains_nearly_as_float32_does(
    family: str, checkpointing: bool, bases: dict[str, Path]
) -> None:
    exact = attach("full", bases[family], "float32", {"mixed_precision": False})
    mixed = attach("full", bases[family], "float32", {"mixed_precision": True})
    if checkpointing:
        mixed.gradient_checkpointing_enable({"use_reentrant": False})
    rows = random_rows(21, 9, 14)
    loss, gradient = gradients(exact, padded(rows))
    for batch in (padded(rows), packed(rows)):
        near_loss, near = gradients(mixed, batch)
        assert near_loss == pytest.approx(loss, rel=1e-2)
        assert near_loss != loss, "nothing was multiplied in 16 bits"
        assert (near - gradient).norm() / gradient.norm() < 0.05
    assert {one.dtype for one in mixed.parameters()} == {torch.float32}
    assert {one.grad.dtype for one in mixed.parameters() if one.grad is not None} == {torch.float32}


@pytest.mark.usefixtures("with_bfloat16")
def test_the_output_layer_multiplies_in_16_bits_too(bases: dict[str, Path]) -> None:
    """It runs apart from the model's forward, chunk by chunk, and is the largest product of a small model."""
    tuned = attach("full", bases["llama"], "float32", {"mixed_precision": True})
    seen = set()
    tuned.get_base_model().lm_head.register_forward_hook(lambda _m, _i, output: seen.add(output.dtype))
    summed_cross_entropy(tuned, padded(random_rows(21, 9)))[0].backward()
    assert seen == {torch.bfloat16}


@pytest.mark.usefixtures("with_bfloat16")
def test_it_is_evaluated_in_float32(bases: dict[str, Path]) -> None:
    ids_BT = torch.tensor([PROMPT])
    exact = attach("full", bases["llama"], "float32", {"mixed_precision": False}).eval()
    mixed = attach("full", bases["llama"], "float32", {"mixed_precision": True})
    with torch.no_grad():
        assert not torch.equal(mixed(input_ids=ids_BT).logits, exact(input_ids=ids_BT).logits)
        assert torch.equal(mixed.eval()(input_ids=ids_BT).logits, exact(input_ids=ids_BT).logits)


def test_a_device_that_would_emulate_bfloat16_is_spared(
    bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "supports_bfloat16", lambda _: False)
    ids_BT = torch.tensor([PROMPT])
    exact = attach("full", bases["llama"], "float32", {"mixed_precision": False})
    asked = attach("full", bases["llama"], "float32", {"mixed_precision": True})
    with torch.no_grad():
        assert torch.equal(asked(input_ids=ids_BT).logits, exact(input_ids=ids_BT).logits)


# --- what it costs ----------------------------------------------------------------------------------------------------

LARGE = DeviceFacts("cuda", "NVIDIA H200", 141 * GIB, 8)


def test_it_needs_sixteen_bytes_per_parameter_besides_activations() -> None:
    found = estimate(resolve(recipe(method="full"), SEVEN_B, ROWS, LARGE), SEVEN_B, ROWS, LARGE)
    assert found.num_trainable == SEVEN_B.num_parameters
    assert found.trainable_share == 1.0
    assert found.weights_bytes == 0, "the base is not held a second time"
    assert found.adapter_bytes + found.optimizer_bytes == 16 * SEVEN_B.num_parameters
    assert found.checkpoint_bytes == 12 * SEVEN_B.num_parameters


def test_without_embeddings_these_are_held_once_in_float32() -> None:
    asked = recipe(method="full", settings={"train_embeddings": False})
    found = estimate(resolve(asked, SEVEN_B, ROWS, LARGE), SEVEN_B, ROWS, LARGE)
    embeddings = 2 * 32000 * 4096
    assert found.weights_bytes == 4 * embeddings
    assert found.adapter_bytes + found.optimizer_bytes == 16 * (SEVEN_B.num_parameters - embeddings)


def test_it_trains_three_products_per_weight_where_an_adapter_of_the_same_blocks_has_two() -> None:
    rows = DatasetFacts(num_rows=100_000, total_tokens=20_000_000, longest=220)
    settings = {"gradient_checkpointing": False, "packing": False, "micro_batch_size": 8}
    full_run, ia3_run = (
        estimate(resolve(recipe(method=name, training=settings), SEVEN_B, rows, LARGE), SEVEN_B, rows, LARGE)
        for name in ("full", "ia3")
    )
    assert 1.4 < full_run.seconds_low / ia3_run.seconds_low < 1.6


def test_mixed_precision_halves_activations_and_keeps_copies_of_the_weights() -> None:
    def activations(**settings: bool) -> int:
        training = {"packing": False, "micro_batch_size": 1, "gradient_checkpointing": False}
        asked = recipe(method="full", settings=settings, training=training)
        return estimate(resolve(asked, SEVEN_B, ROWS, LARGE), SEVEN_B, ROWS, LARGE).activations_bytes

    blocks, head = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008), 32000 * 4096
    kept = activations(mixed_precision=True) - 2 * (blocks + 2 * head)
    assert 0.5 < kept / activations(mixed_precision=False) < 0.75


# --- refused where it cannot fit --------------------------------------------------------------------------------------


def test_it_is_refused_with_the_method_that_fits() -> None:
    with pytest.raises(RecipeProblems) as caught:
        resolve(recipe(method="full"), SEVEN_B, ROWS, GPU)
    assert set(caught.value.fields) == {"method"}
    lora = estimate(resolve(recipe(), SEVEN_B, ROWS, GPU), SEVEN_B, ROWS, GPU)
    sentence = caught.value.fields["method"]
    assert "the card has 24.0 GiB" in sentence
    assert f"Choose LoRA, which needs about {lora.total_bytes / GIB:.1f} GiB" in sentence
    assert f"trains {lora.num_trainable:,} parameters (0.59 %)" in sentence


def test_where_lora_does_not_fit_either_qlora_is_named() -> None:
    card = DeviceFacts("cuda", "NVIDIA T4", 12 * GIB, 4)
    with pytest.raises(RecipeProblems, match="Choose QLoRA, which needs about"):
        resolve(recipe(method="full"), SEVEN_B, ROWS, card)


def test_where_nothing_fits_a_smaller_base_is_named() -> None:
    with pytest.raises(RecipeProblems, match=r"LoRA needs .* QLoRA needs .* Choose a smaller base model\."):
        resolve(recipe(method="full"), SEVEN_B, ROWS, DeviceFacts("cpu", "CPU", 2 * GIB, 2, has_fast_bfloat16=False))


def test_other_methods_are_warned_of_and_not_refused() -> None:
    card = DeviceFacts("cuda", "NVIDIA T4", 12 * GIB, 4)
    assert estimate(resolve(recipe(), SEVEN_B, ROWS, card), SEVEN_B, ROWS, card).verdict == "too_large"


def test_a_device_of_unknown_memory_refuses_nothing() -> None:
    unknown = DeviceFacts("cuda", "NVIDIA", 0, 4)
    assert resolve(recipe(method="full"), SEVEN_B, ROWS, unknown).method == "full"


def test_the_alternative_keeps_the_rows_and_takes_its_own_defaults() -> None:
    asked = recipe(method="full", precision="float32", training={"learning_rate": 1e-5, "max_length": 256})
    lora, qlora = alternatives(asked, SEVEN_B, ROWS, CPU)
    assert (lora.method.name, qlora.method.name) == ("lora", "qlora")
    assert lora.recipe.training.learning_rate == get_method("lora").learning_rate
    assert lora.recipe.training.max_length == 256
    assert qlora.recipe.precision == "nf4"
    assert alternatives(recipe(), SEVEN_B, ROWS, CPU) == []


def test_the_command_line_refuses_by_the_same_words(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = write_rows(tmp_path / "rows.jsonl", tiny_rows(40))
    asked = recipe_of("full").to_dict() | {"training": {"max_length": 96}}
    (tmp_path / "recipe.json").write_text(json.dumps(asked))
    monkeypatch.setattr(devices, "memory_bytes", lambda _: GIB // 4)
    status = main(
        [str(tmp_path / "recipe.json"), "--out", str(tmp_path / "out"), "--base-model-folder", str(bases["llama"]),
         "--dataset-file", str(dataset)]
    )  # fmt: skip
    said = capsys.readouterr().out
    assert status == 1
    assert "Failed (method): Full fine-tuning of this base needs about 0.5 GiB, and this machine has 0.2 GiB." in said
    assert not (tmp_path / "out" / "attempts").exists()

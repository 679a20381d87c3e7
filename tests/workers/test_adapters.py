from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from tests.tiny import make_tiny_base
from workers import adapters, base_models
from workers.generation import generate
from workers.methods import get_method
from workers.recipe import Recipe
from workers.results import Result, SampleRecord, ScoreRecord

PROMPT = [5, 9, 40, 77, 102, 33]
OUTSIDE = """
import json, sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, folder, *companions = sys.argv[1:]
sys.path.insert(0, folder)
for name in companions:
    __import__(name)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
ids = torch.tensor([json.loads(sys.stdin.read())])
logits = model(input_ids=ids).logits[0]
written = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8,
                         eos_token_id=383, pad_token_id=0)
assert not [name for name in sys.modules if name.split(".")[0] in ("workers", "studio", "jobs")]
print(json.dumps({"logits": logits.tolist(), "written": written[0, ids.shape[1]:].tolist()}))
"""


def recipe_of(name: str, folder: Path) -> Recipe:
    return Recipe.from_dict(
        {
            "name": 'An "odd" name: yes',
            "method": name,
            "precision": "float32",
            "base_model": {"name": "tiny", "path": str(folder)},
            "dataset": {"name": "rows", "format": "alpaca", "path": "/somewhere/rows.jsonl"},
        }
    )


RESULT = Result(
    scores=(
        ScoreRecord(
            evaluation="loss", label="Held-out loss", unit="nats/token", higher_is_better=False, num_rows=20, value=1.5,
            low=1.4, high=1.6, base_value=2.0, base_low=1.9, base_high=2.1, difference=-0.5, difference_low=-0.6,
            difference_high=-0.4, interval_method="BCa",
        ),
    ),
    samples=(SampleRecord(line=3, prompt="a", reference="b", base_answer="c", adapter_answer="\u00e9"),),
    num_trainable=12,
)  # fmt: skip


def train_a_little(model) -> None:
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("name", ["lora", "prefix_tuning", "bottleneck"])
def test_the_unzipped_folder_gives_the_same_model_in_plain_peft(name: str, tmp_path: Path) -> None:
    folder = make_tiny_base(tmp_path / "base")
    method = get_method(name)
    model = method.attach(base_models.load(folder, "float32", "cpu").model, method.read_settings({})).eval()
    train_a_little(model)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([PROMPT])).logits[0]
    written = generate(model, [PROMPT], max_new_tokens=8, stop_ids=[])[0]
    out = tmp_path / "adapter"
    result = adapters.finish(
        model, out, recipe=recipe_of(name, folder), result=RESULT, base_model_folder=folder, template="",
        hub_id="owner/base", licence="apache-2.0", probe_ids=[PROMPT],
    )  # fmt: skip
    assert result.provenance.verified is True
    assert result.provenance.max_logit_difference is not None

    companions = [method.companion_module] if method.companion_module else []
    card = (out / "README.md").read_text("utf-8")
    assert all(f"\nimport {name}  #" in card for name in companions)
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert names == {f"{name}.py" for name in companions} | {
        "adapter_config.json", "adapter_model.safetensors", "README.md", "studio.json", "eval/scores.json",
        "eval/samples.jsonl", "eval/held_out.jsonl", "result.json", "SHA256SUMS",
    }  # fmt: skip
    for name_in_folder in names - {"adapter_model.safetensors"}:
        assert str(tmp_path) not in (out / name_in_folder).read_text("utf-8"), name_in_folder
    for line in (out / "SHA256SUMS").read_text().splitlines():
        digest, file_name = line.split("  ")
        assert hashlib.sha256((out / file_name).read_bytes()).hexdigest() == digest
        names.discard(file_name)
    assert names == {"SHA256SUMS"}
    assert Result.from_folder(out) == result

    archive = tmp_path / "adapter.zip"
    with zipfile.ZipFile(archive, "w") as writer:
        for path in out.rglob("*"):
            writer.write(path, path.relative_to(out))
    unpacked = tmp_path / "elsewhere"
    zipfile.ZipFile(archive).extractall(unpacked)
    done = subprocess.run(
        [sys.executable, "-c", OUTSIDE, str(folder), str(unpacked), *companions],
        input=json.dumps(PROMPT), capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    outside = json.loads(done.stdout.splitlines()[-1])
    torch.testing.assert_close(torch.tensor(outside["logits"]), logits, rtol=1e-4, atol=1e-4)
    assert outside["written"] == written


def test_the_configuration_is_portable(tmp_path: Path) -> None:
    folder = make_tiny_base(tmp_path / "base")
    method = get_method("lora")
    model = method.attach(base_models.load(folder, "float32", "cpu").model, method.read_settings({}))
    adapters.save(model, tmp_path / "out", recipe=recipe_of("lora", folder), hub_id="owner/base")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "owner/base"
    assert config["revision"] is None
    assert config["target_modules"] == sorted(config["target_modules"])
    assert "q_proj" in config["target_modules"]
    assert (config["modules_to_save"], config["bias"], config["inference_mode"]) == (None, "none", True)


def test_a_folder_that_lost_its_weights_is_not_called_verified(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = make_tiny_base(tmp_path / "base")
    method = get_method("lora")
    model = method.attach(base_models.load(folder, "float32", "cpu").model, method.read_settings({})).eval()
    train_a_little(model)
    adapters.save(model, tmp_path / "out", recipe=recipe_of("lora", folder), hub_id="")
    path = tmp_path / "out" / "adapter_model.safetensors"
    save_file({name: tensor * 0.5 for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    verified, difference = adapters.prove(model, tmp_path / "out", [PROMPT])
    assert not verified
    assert difference > 1e-3

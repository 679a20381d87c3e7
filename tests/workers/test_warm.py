"""A resident trainer: what it makes is bit for bit what a fresh process makes, whatever it did before."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import make_tiny_base, tiny_rows, write_rows
from workers import base_models
from workers.bases import HeldBases, share, weights_digest
from workers.events import (
    EXIT_STOPPED,
    EndedEvent,
    FailedEvent,
    PhaseEvent,
    ResultEvent,
    StepEvent,
    parse_event,
)
from workers.methods import get_method
from workers.resident import ProcessState

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
# One after another in one process: each sees what all before it have left behind.
METHODS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("lora", "float32", {"rank": 4, "dropout": 0.1}),
    ("prefix_tuning", "float32", {"num_virtual_tokens": 4}),
    ("bottleneck", "float32", {"dropout": 0.1}),
    ("prompt_tuning", "float32", {"num_virtual_tokens": 4}),
    ("ia3", "float32", {}),
    ("dora", "float32", {"rank": 4}),
    ("qlora", "nf4", {"rank": 4}),
    ("qlora", "int8", {"rank": 4}),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a dataset and a recipe for each method."""
    folder = tmp_path_factory.mktemp("warm")
    make_tiny_base(folder / "base")
    write_rows(folder / "data.jsonl", tiny_rows(40))
    for method, precision, settings in METHODS:
        write_recipe(folder, f"{method}-{precision}", method=method, precision=precision, settings=settings)
    return folder


def write_recipe(folder: Path, name: str, *, training: dict[str, Any] | None = None, **values: Any) -> Path:
    recipe = {
        "name": "Sounds",
        "base_model": {"name": "tiny", "path": str(folder / "base")},
        "dataset": {"name": "sounds", "format": "alpaca", "path": str(folder / "data.jsonl")},
        "training": {
            "learning_rate": 0.01, "batch_size": 4, "micro_batch_size": 2, "max_length": 128, "packing": False,
            "max_steps": 4, "checkpoint_every_steps": 2, "gradient_checkpointing": False, "neftune_alpha": 5,
        } | (training or {}),
        "evaluation": {"num_generated": 2, "max_new_tokens": 4, "general": False},
    } | values  # fmt: skip
    path = folder / f"{name}.json"
    path.write_text(json.dumps(recipe))
    return path


@dataclass
class Resident:
    """A real `python -m workers --resident`."""

    process: subprocess.Popen[bytes]
    stream: Any

    def give(self, recipe: Path, out: Path, *arguments: str) -> None:
        job = {"arguments": [str(recipe), "--out", str(out), *arguments], "log": str(out / "trainer.log")}
        self.write({"job": job})

    def write(self, message: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(message).encode() + b"\n")
        self.process.stdin.flush()

    def events(self) -> Iterator[Any]:
        """Those of one job, to its end."""
        for line in self.stream:
            event = parse_event(line)
            yield event
            if isinstance(event, EndedEvent):
                return

    def run(self, recipe: Path, out: Path) -> list[Any]:
        self.give(recipe, out)
        return list(self.events())


@pytest.fixture
def resident() -> Iterator[Resident]:
    reading, writing = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-m", "workers", "--resident", "--events", str(writing), "--supervised"],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdin=subprocess.PIPE, pass_fds=[writing],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(writing)
    with os.fdopen(reading, "rb") as stream:
        yield Resident(process, stream)
        process.kill()
        process.wait()


def alone(recipe: Path, out: Path) -> dict[str, bytes]:
    """What a process of its own makes."""
    subprocess.run(
        [sys.executable, "-m", "workers", str(recipe), "--out", str(out)],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    return product(out)


def product(out: Path) -> dict[str, bytes]:
    """Everything of a run that must not depend on where it ran: weights, scores, samples, configuration."""
    adapter = out / "attempts" / "1" / "adapter"
    names = ("adapter_model.safetensors", "adapter_config.json", "eval/scores.json", "eval/samples.jsonl")
    found = {name: (adapter / name).read_bytes() for name in (*names, "eval/held_out.jsonl")}
    # The base's rows, and its answers to the fixed prompts.
    kept = list((out / "base_scores").rglob("*.json"))
    assert len(kept) == 2
    found |= {f"base_scores {path.name}": path.read_bytes() for path in kept}
    for name in ("adapter.safetensors", "optimizer.safetensors", "random.safetensors"):
        found[f"checkpoint {name}"] = next((out / "checkpoints").glob(f"4-*/{name}")).read_bytes()
    return found


def test_every_method_makes_warm_what_it_makes_in_a_process_of_its_own(
    folder: Path, resident: Resident, tmp_path: Path
) -> None:
    names = [f"{method}-{precision}" for method, precision, _ in METHODS]
    # Twice on every base, the second time after all the others on it: A, B, ..., A'.
    order = [*names[:6], names[0], names[5], names[6], names[6], names[7], names[7]]
    made: dict[str, list[dict[str, bytes]]] = {}
    for turn, name in enumerate(order):
        out = tmp_path / f"{turn}-{name}"
        *_, result, ended = resident.run(folder / f"{name}.json", out)
        assert isinstance(result, ResultEvent), result
        assert ended == EndedEvent(exit_status=0, stays=True), f"{name} has changed the base"
        made.setdefault(name, []).append(product(out))
    for name in names:
        expected = alone(folder / f"{name}.json", tmp_path / f"alone-{name}")
        for found in made[name]:
            different = [part for part in expected if found[part] != expected[part]]
            assert not different, f"{name}: {different}"


@pytest.mark.parametrize("precision", ["float32", "nf4", "int8"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma"])
def test_a_shared_model_gives_the_numbers_and_leaves_the_original_alone(
    family: str, precision: Any, tmp_path: Path
) -> None:
    base = make_tiny_base(tmp_path / "base", family)
    model = base_models.load(base, precision, "cpu").model
    before, kinds = weights_digest(model), [type(module) for module in model.modules()]
    ids_BT = torch.arange(4, 20)[None]
    expected = base_models.load(base, precision, "cpu").model(input_ids=ids_BT).logits
    for _ in range(2):
        own = share(model)
        assert torch.equal(own(input_ids=ids_BT).logits, expected)
        weight, original = own.get_input_embeddings().weight, model.get_input_embeddings().weight
        assert weight is not original
        assert weight.data_ptr() == original.data_ptr()
        assert (own.get_output_embeddings().weight is weight) == (model.get_output_embeddings().weight is original)
        method = get_method("ia3")
        method.attach(own, method.read_settings({})).train()(input_ids=ids_BT).logits.sum().backward()
        own.config._attn_implementation = "eager"
        own.to(torch.bfloat16) if precision == "float32" else None
    assert weights_digest(model) == before
    assert [type(module) for module in model.modules()] == kinds
    assert model.config._attn_implementation == "sdpa"
    assert not [name for name, one in model.named_parameters() if one.requires_grad or one.grad is not None]


def test_a_single_changed_bit_of_a_held_weight_is_noticed(tmp_path: Path) -> None:
    held = HeldBases()
    base = held.read(make_tiny_base(tmp_path / "base"))
    own = held.load(base, "float32", CPU, say=print)
    assert held.is_untouched()
    weight = own.model.norm.weight.data
    weight.view(torch.int32)[5] ^= 1
    assert not held.is_untouched()
    weight.view(torch.int32)[5] ^= 1
    assert held.is_untouched()


def test_a_base_is_loaded_once_while_its_files_stay_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    real = base_models.load
    monkeypatch.setattr(base_models, "load", lambda *args, **named: loaded.append(args[1]) or real(*args, **named))
    folder, held = make_tiny_base(tmp_path / "base"), HeldBases()
    for precision in ("float32", "float32", "bfloat16", "bfloat16", "float32"):
        held.load(held.read(folder), precision, CPU, say=print)
    assert loaded == ["float32", "bfloat16", "float32"]
    before = held.read(folder)
    (folder / "generation_config.json").write_text("{}")
    after = held.read(folder)
    assert after.revision != before.revision
    held.load(after, "float32", CPU, say=print)
    assert len(loaded) == 4


def test_a_process_is_put_back_as_it_was() -> None:
    before = ProcessState.now()
    drawn = torch.rand(3)
    os.environ["SOMETHING_OF_A_JOB"] = "1"
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_default_dtype(torch.bfloat16)
    torch.set_grad_enabled(False)
    torch.backends.cudnn.benchmark = True
    before.restore()
    assert "SOMETHING_OF_A_JOB" not in os.environ
    assert ProcessState.now().switches == before.switches
    assert torch.equal(torch.rand(3), drawn)


def test_after_a_failure_the_process_ends(folder: Path, resident: Resident, tmp_path: Path) -> None:
    bad = write_recipe(folder, "bad", method="lorra", precision="float32")
    *_, failed, ended = resident.run(bad, tmp_path / "bad")
    assert isinstance(failed, FailedEvent)
    assert failed.field == "method"
    assert ended == EndedEvent(exit_status=1, stays=False)
    assert resident.process.wait(timeout=60) == 1


@pytest.mark.parametrize(("mode", "stays"), [("now", False), ("checkpoint", True)])
def test_a_stop_ends_its_job_and_only_a_clean_one_keeps_the_process(
    folder: Path, resident: Resident, tmp_path: Path, mode: str, stays: bool
) -> None:
    long = write_recipe(
        folder, f"long-{mode}", method="lora", precision="float32",
        training={"max_steps": 5000, "epochs": 100, "checkpoint_every_steps": 5000},
    )  # fmt: skip
    resident.give(long, tmp_path / "long")
    heard = []
    for event in resident.events():
        heard.append(event)
        if isinstance(event, StepEvent) and event.step == 2:
            resident.write({"stop": mode})
    assert event == EndedEvent(exit_status=EXIT_STOPPED, stays=stays), heard
    if not stays:
        assert resident.process.wait(timeout=60) == EXIT_STOPPED
        return
    # The stop was for the job before: the next one runs to its end.
    *_, ended = resident.run(folder / "lora-float32.json", tmp_path / "next")
    assert ended == EndedEvent(exit_status=0, stays=True)
    assert product(tmp_path / "next") == alone(folder / "lora-float32.json", tmp_path / "alone")


def test_each_job_prints_into_its_own_log(folder: Path, resident: Resident, tmp_path: Path) -> None:
    for turn in ("first", "second"):
        events = resident.run(folder / "lora-float32.json", tmp_path / turn)
        assert next(event.phase for event in events if isinstance(event, PhaseEvent)) == "preparing"
        for descriptor in (1, 2):
            opened = Path(f"/proc/{resident.process.pid}/fd/{descriptor}").readlink()
            assert opened == tmp_path / turn / "trainer.log"

"""One training run twice: by our engine, and as a job that another trainer can do without knowing ours."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.parity.environments import run_alone
from tests.tiny import make_tiny_base, tiny_rows, write_rows
from workers import adapters, base_models, training
from workers.batching import Plan
from workers.checkpoints import trainable_parameters
from workers.events import StepEvent
from workers.recipe import Recipe
from workers.schedule import num_warmup_steps
from workers.training import Folders

PINS = ["trl==1.16.0", "peft==0.21.2", "transformers==5.23.0", "torch==2.13.0", "bitsandbytes==0.50.2"]
"""The other trainers' environment."""
NUM_STEPS = 50
TOLERANCE = 1e-4
"""Largest relative difference of a step's loss. Measured: below 1e-6 for every method, and 1e-3 where
one side leaves out the weight decay, which 1e-3 would barely find."""

WAYS: dict[str, dict[str, Any]] = {
    "padded": {"packing": False, "gradient_checkpointing": False},
    "packed and checkpointed": {"packing": True, "gradient_checkpointing": True},
}
"""Neither packing nor checkpointing may change what is learned; the other trainers do without both."""

# What is the same for every method. The norm is one that clips the first steps and lets later ones be.
TRAINING: dict[str, Any] = {
    "batch_size": 8,
    "micro_batch_size": 4,
    "max_steps": NUM_STEPS,
    "epochs": 6,
    "max_length": 256,
    "schedule": "cosine",
    "warmup_share": 0.0,
    "weight_decay": 0.1,
    "max_grad_norm": 0.5,
}


@dataclass(frozen=True)
class Step:
    """What a trainer says of one optimizer step."""

    loss: float
    learning_rate: float
    grad_norm: float


@dataclass(frozen=True)
class Case:
    """A method as both sides train it; `training` are its settings that differ from TRAINING."""

    method: str
    settings: dict[str, Any]
    learning_rate: float
    family: str = "llama"
    precision: str = "float32"
    training: dict[str, Any] = field(default_factory=dict)

    def recipe(self, **changed: Any) -> Recipe:
        """The recipe; `changed` are settings of the training that may not change what is learned."""
        return Recipe.from_dict(
            {
                "name": "Parity",
                "base_model": {"name": "tiny"},
                "dataset": {"name": "sounds", "format": "alpaca"},
                "method": self.method,
                "settings": self.settings,
                "precision": self.precision,
                "training": TRAINING | WAYS["padded"] | {"learning_rate": self.learning_rate} | self.training | changed,
                "split": {"held_out_share": 0.05},
                "evaluation": {"num_generated": 0, "max_new_tokens": 1, "metrics": ["loss"]},
            }
        )


def make_folders(root: Path, family: str) -> Folders:
    """A tiny base and about a hundred rows of many lengths."""
    rows = [row | {"input": " ".join([row["input"]] * (1 + at % 7))} for at, row in enumerate(tiny_rows(104))]
    return Folders(make_tiny_base(root / "base", family), write_rows(root / "rows.jsonl", rows), root / "ours")


def train_ours(recipe: Recipe, folders: Folders) -> list[Step]:
    """Every step of our own engine, on the CPU, with float32 activations."""
    steps: list[Step] = []

    def report(event: Any) -> None:
        if isinstance(event, StepEvent):
            steps.append(Step(event.loss, event.learning_rate, event.grad_norm))

    with _in_float32():
        training.train(recipe, folders, report=report, should_stop=lambda: None)
    return steps


def write_job(recipe: Recipe, folders: Folders, root: Path) -> Path:
    """The run as a file: the rows of every step in their order, the adapter as it begins, the settings.

    `adapter` is the saved adapter, whose configuration counts; `trainable` has every trained parameter by name, also
    those that saving drops.
    """
    settings = recipe.training
    run = training.prepare(
        recipe,
        Folders(folders.base_model, folders.dataset, root / "prepared"),
        report=lambda event: None,
        should_stop=lambda: None,
        attempt=1,
        device=torch.device("cpu"),
    )
    with _in_float32():
        model = training.attach(run, training.load_base(run))
    adapters.save(model, root / "adapter", recipe=recipe, hub_id="")
    save_file(trainable_parameters(model), root / "trainable.safetensors")
    plan = Plan(len(run.data.train), settings.batch_size, settings.epochs, settings.seed, settings.max_steps)
    assert plan.num_steps == NUM_STEPS
    order = [run.data.train[row] for step in range(NUM_STEPS) for row in plan.rows(step)]
    tokens = run.data.tokens
    job = {
        "base_model": str(folders.base_model),
        "adapter": str(root / "adapter"),
        "trainable": str(root / "trainable.safetensors"),
        "scratch": str(root / "scratch"),
        "precision": recipe.precision,
        "rows": [{"ids": tokens.ids(row).tolist(), "trained": tokens.trained(row).tolist()} for row in order],
        "batch_size": settings.batch_size,
        "micro_batch_size": settings.micro_batch_size,
        "learning_rate": settings.learning_rate,
        "learning_rate_ratio": recipe.settings.get("learning_rate_ratio"),
        "schedule": settings.schedule,
        "num_warmup_steps": num_warmup_steps(NUM_STEPS, settings.warmup_share),
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "seed": settings.seed,
    }
    path = root / "job.json"
    path.write_text(json.dumps(job), "utf-8")
    return path


def train_theirs(python: Path, script: Path, job: Path) -> list[Step]:
    """Every step of a job, by a script in an environment of its own."""
    steps = job.with_name("steps.json")
    run_alone(python, script, job, steps, home=job.parent)
    return [Step(**step) for step in json.loads(steps.read_text("utf-8"))]


def compare(case: Case, way: str, ours: list[Step], theirs: list[Step]) -> None:
    """Holds both curves together and prints the largest relative difference of the loss."""
    assert len(ours) == len(theirs) == NUM_STEPS
    difference = max(abs(one.loss - other.loss) / abs(other.loss) for one, other in zip(ours, theirs, strict=True))
    print(
        f"\n{case.method} {case.settings} on {case.family}, {way}: loss from {theirs[0].loss:.4f} to "
        f"{theirs[-1].loss:.4f}, largest relative difference {difference:.1e}"
    )
    assert difference < TOLERANCE
    assert [one.learning_rate for one in ours] == pytest.approx([one.learning_rate for one in theirs], rel=1e-9)
    assert [one.grad_norm for one in ours] == pytest.approx([one.grad_norm for one in theirs], rel=1e-2)
    # Else the curves would agree because nothing happens: something was learned, and some gradients were clipped.
    assert theirs[-1].loss < 0.95 * theirs[0].loss
    assert max(one.grad_norm for one in theirs) > case.recipe().training.max_grad_norm


@contextmanager
def _in_float32() -> Iterator[None]:
    """Whatever the machine: on the CPU, where a 4-bit base would compute in bfloat16 if that is fast there."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(training.devices, "choose_device", lambda: torch.device("cpu"))
        patched.setitem(base_models.COMPUTE_DTYPES, "nf4", torch.float32)
        yield

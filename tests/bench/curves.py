"""Whether equal work gives equal loss: curves of ours and of TRL's SFTTrainer at the same settings, over seeds.

    python -m tests.bench.curves --base DIR --data ROWS.jsonl --out DIR
    python -m tests.bench.curves --out DIR     (the tests' tiny model and rows)

ROWS.jsonl has a question and an answer per line (GSM8K's form). For each seed both train on the same rows in the same
order, and each has peft make the adapter's beginning from that seed. A window of steps agrees when the means over the
seeds are no further apart than the seeds of one trainer are.

A run that the folder has already is not done again. TRL is installed into an environment of its own.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from tests.parity.environments import environment, run_alone
from tests.parity.jobs import PINS
from tests.tiny import make_tiny_base, tiny_rows, write_rows
from workers import adapters, training
from workers.batching import Plan
from workers.devices import seed_everything
from workers.events import Event, StepEvent
from workers.recipe import Recipe
from workers.training import Folders

SCRIPT = Path(__file__).parents[1] / "parity" / "trl_losses.py"
TRAINERS = ("ours", "TRL")
NUM_WINDOWS = 6


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.curves", description=__doc__.split("\n\n")[0])
    parser.add_argument("--base", type=Path, help="folder of a base model; by default the tests' tiny one")
    parser.add_argument("--data", type=Path, help="JSON Lines of question and answer; by default the tests' rows")
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=8, help="rows of a step")
    parser.add_argument("--micro", type=int, default=4, help="rows in memory at once")
    parser.add_argument("--rows", type=int, default=400, help="the first of the data")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    options = parser.parse_args()
    if len(options.seeds) < 2:
        parser.error("--seeds needs two or more: their spread is what the trainers are held to")
    options.out.mkdir(parents=True, exist_ok=True)
    curves: dict[str, list[list[float]]] = {trainer: [] for trainer in TRAINERS}
    for seed in options.seeds:
        for trainer in TRAINERS:
            file = options.out / f"{trainer}-{seed}.json"
            if not file.exists():
                losses = train(trainer, seed, options)
                file.write_text(json.dumps({"trainer": trainer, "seed": seed, "losses": losses}) + "\n", "utf-8")
            curves[trainer].append(json.loads(file.read_text("utf-8"))["losses"])
            print(f"{trainer}, seed {seed}: {curves[trainer][-1][0]:.4f} to {curves[trainer][-1][-1]:.4f}", flush=True)
    found = windows(curves["ours"], curves["TRL"])
    print_table(found)
    print(f"Largest relative difference of a step: {largest_difference(curves['ours'], curves['TRL']):.1e}.")
    raise SystemExit(0 if agree(found) else 1)


@dataclass(frozen=True)
class Window:
    """Mean loss of some steps in a row, for each seed of both trainers."""

    first: int
    last: int
    ours: tuple[float, ...]
    theirs: tuple[float, ...]

    @property
    def difference(self) -> float:
        return fmean(self.ours) - fmean(self.theirs)

    @property
    def spread(self) -> float:
        """How far the seeds of one trainer are apart; of the two, the trainer with less of it."""
        return min(max(one) - min(one) for one in (self.ours, self.theirs))

    @property
    def agrees(self) -> bool:
        return abs(self.difference) <= self.spread


def windows(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> list[Window]:
    """Both trainers' curves, one per seed, in windows of equal length; what is left over joins the last."""
    num_steps = len(ours[0])
    assert {len(curve) for curve in (*ours, *theirs)} == {num_steps}, "curves of one length are compared"
    size = max(1, num_steps // NUM_WINDOWS)
    starts = list(range(0, num_steps - size + 1, size))
    bounds = [*starts, num_steps]
    return [
        Window(
            first + 1, last, tuple(fmean(curve[first:last]) for curve in ours),
            tuple(fmean(curve[first:last]) for curve in theirs),
        )
        for first, last in pairwise(bounds)
    ]  # fmt: skip


def agree(found: Sequence[Window]) -> bool:
    """Whether every window agrees, and something was learned: curves that stay flat agree about nothing."""
    learned = all(fmean(pair[-1]) < fmean(pair[0]) for pair in
                  ([one.ours for one in found], [one.theirs for one in found]))  # fmt: skip
    return learned and all(one.agrees for one in found)


def print_table(found: Sequence[Window]) -> None:
    print("| steps | ours, mean (lowest to highest seed) | TRL | difference | spread of the seeds | agree |")
    print("| --- | --- | --- | --- | --- | --- |")
    for one in found:
        sides = " | ".join(f"{fmean(side):.4f} ({min(side):.4f} to {max(side):.4f})" for side in (one.ours, one.theirs))
        said = "yes" if one.agrees else "no"
        print(f"| {one.first} to {one.last} | {sides} | {one.difference:+.4f} | {one.spread:.4f} | {said} |")
    print(f"Equal work is equal loss: {'yes' if agree(found) else 'no'}.")


def largest_difference(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> float:
    """The largest difference of one step's loss under one seed, relative to it."""
    pairs = zip(ours, theirs, strict=True)
    return max(abs(one - other) / abs(other) for mine, peer in pairs for one, other in zip(mine, peer, strict=True))


# --- the runs --------------------------------------------------------------------------------------------------------


def recipe_of(seed: int, options: argparse.Namespace) -> Recipe:
    """LoRA in float32 at a constant rate; what both are given."""
    return Recipe.from_dict(
        {
            "name": "Curves", "base_model": {"name": "base"},
            "dataset": {"name": "rows", "format": "alpaca" if options.data is None else "prompt_completion"},
            "method": "lora", "settings": {"rank": 16, "alpha": 32, "dropout": 0.0}, "precision": "float32",
            "training": {
                "seed": seed, "max_length": 512, "max_steps": options.steps, "epochs": 100.0,
                "batch_size": options.batch, "micro_batch_size": options.micro, "packing": False,
                "gradient_checkpointing": False, "learning_rate": options.learning_rate, "schedule": "constant",
                "warmup_share": 0.0, "weight_decay": 0.01, "max_grad_norm": 1.0, "checkpoint_every_steps": 10**6,
                "validate_every_steps": 0,
            },
            "split": {"held_out_share": 0.02},
            "evaluation": {"num_generated": 0, "metrics": ["loss"]},
        }
    )  # fmt: skip


def train(trainer: str, seed: int, options: argparse.Namespace) -> list[float]:
    """The loss of every step of one run."""
    recipe = recipe_of(seed, options)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        losses: list[float] = []

        def report(event: Event) -> None:
            if isinstance(event, StepEvent):
                losses.append(event.loss)

        run = training.prepare(
            recipe, folders_of(options, root), report=report, should_stop=lambda: None, attempt=1,
            device=torch.device("cpu"),
        )  # fmt: skip
        seed_everything(seed)
        model = training.attach(run, training.load_base(run))
        if trainer == "ours":
            with training.computed_by_hand(run, model):
                training.optimise(run, model)
        else:
            adapters.save(model, root / "adapter", recipe=recipe, hub_id="")
            del model
            losses += train_theirs(run, recipe, root)
    assert len(losses) == options.steps
    return losses


def folders_of(options: argparse.Namespace, root: Path) -> Folders:
    """The base and the rows where they are, or made."""
    if options.data is None:
        data = write_rows(root / "rows.jsonl", tiny_rows(options.rows))
    else:
        lines = [json.loads(line) for line in options.data.read_text("utf-8").splitlines()[: options.rows]]
        data = write_rows(
            root / "rows.jsonl", [{"prompt": one["question"], "completion": one["answer"]} for one in lines]
        )
    base = make_tiny_base(root / "base") if options.base is None else options.base.resolve()
    return Folders(base, data, root / "out")


def train_theirs(run: training.Run, recipe: Recipe, root: Path) -> list[float]:
    """TRL on the rows of every step, in our order; it draws the adapter's beginning itself."""
    settings, tokens = recipe.training, run.data.tokens
    plan = Plan(len(run.data.train), settings.batch_size, settings.epochs, settings.seed, settings.max_steps)
    order = [run.data.train[row] for step in range(plan.num_steps) for row in plan.rows(step)]
    job: dict[str, Any] = {
        "base_model": str(run.folders.base_model),
        "adapter": str(root / "adapter"),
        "trainable": None,
        "scratch": str(root / "scratch"),
        "precision": recipe.precision,
        "rows": [{"ids": tokens.ids(row).tolist(), "trained": tokens.trained(row).tolist()} for row in order],
        "batch_size": settings.batch_size,
        "micro_batch_size": settings.micro_batch_size,
        "learning_rate": settings.learning_rate,
        "learning_rate_ratio": None,
        "schedule": settings.schedule,
        "num_warmup_steps": 0,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "seed": settings.seed,
    }
    (root / "job.json").write_text(json.dumps(job), "utf-8")
    run_alone(environment("trl", PINS), SCRIPT, root / "job.json", root / "steps.json", home=root)
    return [step["loss"] for step in json.loads((root / "steps.json").read_text("utf-8"))]


if __name__ == "__main__":
    main()

"""How far estimates of memory and time are off on a real device, before and after ten runs have corrected them.

    python -m tests.bench.estimate_error run ROWS.jsonl [--folder DIR] [--seconds 460]     (a GPU; 1B, 3B, 8B shapes)
    python -m tests.bench.estimate_error run ROWS.jsonl --small                            (a CPU; small shapes)
    python -m tests.bench.estimate_error merge ROWS.jsonl

`run` trains twenty recipes (methods x precisions x lengths x shapes) for a few steps each with the product's own
resident trainer, on random weights, and appends a line per recipe with what was estimated and what was measured. A
recipe that is there is not run again, and none is begun after --seconds; so it can be called until all are there.
`merge` corrects the estimates by the ten recipes that are for learning, as a studio does, and prints for all twenty the
error of peak memory and of the time of a step by arithmetic alone and corrected; what counts is the ten others.

Peak memory is what a trainer reports with its last step: tensors on a GPU, the process on a CPU. The time of a step is
the median over all but the first two.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

from tests.bench.start import Trainer, make_base
from tests.bench.workload import LLAMA_SHAPES
from tests.tiny import write_rows
from workers.base_folders import read_base_folder
from workers.events import FailedEvent, PlanEvent, StepEvent
from workers.examples import Example
from workers.measured_memory import MeasuredRun, MemoryParts, held_out_errors, learn_memory, shape_key
from workers.memory import DatasetFacts, DeviceFacts, estimate
from workers.reading import read_examples
from workers.recipe import Recipe
from workers.rendering import Renderer
from workers.resolving import resolve
from workers.shapes import ModelShape

NUM_STEPS = 6
BATCH_SIZE = 8
NUM_ROWS = 80
ANY_MEMORY = 2**50
"""A device on which everything fits: what is trained here is said by the recipe, not chosen by its room."""


@dataclass(frozen=True)
class Case:
    """A recipe of the twenty; `learns` are corrected from, the others are checked."""

    shape: str
    method: str
    precision: str
    length: int
    micro_batch: int
    checkpointing: bool
    learns: bool

    @property
    def label(self) -> str:
        kept = "recomputed" if self.checkpointing else "kept"
        return f"{self.shape} {self.method} {self.precision} {self.length}x{self.micro_batch} {kept}"


# By base and precision, so that the resident trainer keeps its base; what is checked has another length or method than
# what is learned from, or both.
CASES = (
    Case("1b", "lora", "bfloat16", 512, 8, False, True),
    Case("1b", "lora", "bfloat16", 2048, 4, False, False),
    Case("1b", "ia3", "bfloat16", 1024, 4, False, True),
    Case("1b", "prefix_tuning", "bfloat16", 512, 8, False, False),
    Case("1b", "qlora", "nf4", 1024, 4, False, True),
    Case("1b", "qlora", "nf4", 2048, 8, True, False),
    Case("3b", "lora", "bfloat16", 1024, 4, False, True),
    Case("3b", "lora", "bfloat16", 2048, 2, False, False),
    Case("3b", "dora", "bfloat16", 512, 4, False, False),
    Case("3b", "bottleneck", "bfloat16", 1024, 4, False, True),
    Case("3b", "bottleneck", "bfloat16", 512, 8, False, False),
    Case("3b", "qlora", "nf4", 512, 8, False, False),
    Case("3b", "qlora", "nf4", 2048, 2, False, True),
    Case("8b", "lora", "bfloat16", 512, 4, False, False),
    Case("8b", "lora", "bfloat16", 2048, 4, True, True),
    Case("8b", "lora", "bfloat16", 1024, 2, False, True),
    Case("8b", "ia3", "bfloat16", 512, 4, False, False),
    Case("8b", "qlora", "nf4", 512, 4, False, True),
    Case("8b", "qlora", "nf4", 2048, 4, True, False),
    Case("8b", "qlora", "nf4", 1024, 2, True, True),
)
SMALL_SHAPES = {
    "1b": {
        "vocab_size": 8192, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    },
    "3b": {
        "vocab_size": 8192, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6,
        "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64,
    },
    "8b": {
        "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64,
    },
}  # fmt: skip
"""Stand-ins of the three sizes for a machine without a GPU, on rows an eighth as long, in float32 for bfloat16."""


def small(case: Case) -> Case:
    """The case on a machine without a GPU."""
    precision = "float32" if case.precision == "bfloat16" else case.precision
    return Case(case.shape, case.method, precision, case.length // 8, case.micro_batch, case.checkpointing, case.learns)


def recipe_of(case: Case) -> Recipe:
    """The method's defaults; nothing but a few steps is done."""
    return Recipe.from_dict(
        {
            "name": case.label,
            "base_model": {"name": case.shape},
            "dataset": {"name": f"rows of {case.length}", "format": "alpaca"},
            "method": case.method,
            "precision": case.precision,
            "training": {
                "max_length": case.length, "micro_batch_size": case.micro_batch, "batch_size": BATCH_SIZE,
                "gradient_checkpointing": case.checkpointing, "max_steps": NUM_STEPS, "epochs": 10,
                "validate_every_steps": 0, "checkpoint_every_steps": 10_000,
            },
            "split": {"held_out_share": 0.05, "max_held_out": 2},
            "evaluation": {"metrics": ["loss"], "num_generated": 0, "num_samples_shown": 0, "general": False},
        }
    )  # fmt: skip


def rows_of(length: int) -> list[dict[str, str]]:
    """Rows of a quarter to the whole of a length, some longer, so that they are cut: lognormal like real ones."""
    chance = random.Random(length)
    words = ("meow", "woof", "moo", "hoot", "yip", "cluck", "oink", "buzz")
    found = []
    for _ in range(NUM_ROWS):
        share = min(1.5, max(0.1, math.exp(chance.gauss(math.log(0.5), 0.6))))
        answer = " ".join(chance.choice(words) for _ in range(max(4, round(share * length))))
        found.append({"instruction": "What do the animals say?", "input": "", "output": answer})
    return found


def facts_of(data: Path, base: Path) -> DatasetFacts:
    """The rows in tokens of the base, as a dataset's inspection counts them."""
    renderer = Renderer(base, max_length=2**31, loss_on="assistant")
    examples = (one for one in read_examples(data, "alpaca", {}) if isinstance(one, Example))
    lengths = [len(renderer.render(one).ids) for one in examples]
    bins: dict[int, int] = {}
    for one in lengths:
        bound = 2 ** math.ceil(math.log2(max(one, 16)))
        bins[bound] = bins.get(bound, 0) + 1
    return DatasetFacts(len(lengths), sum(lengths), max(lengths), bins)


def seconds_of_step(recipe: Recipe, shape: ModelShape, facts: DatasetFacts, device: DeviceFacts) -> float:
    """What the estimate says of one more step, in the middle of its range."""

    def middle(num_steps: int) -> float:
        training = recipe.training.model_copy(update={"max_steps": num_steps})
        found = estimate(recipe.model_copy(update={"training": training}), shape, facts, device)
        return (found.seconds_low + found.seconds_high) / 2

    return (middle(2 * NUM_STEPS) - middle(NUM_STEPS)) / NUM_STEPS


def measure(case: Case, trainer: Trainer, base: Path, folder: Path) -> dict[str, Any]:
    """One line: the case, what was estimated of it and what was measured."""
    data = folder / f"rows-{case.length}.jsonl"
    if not data.exists():
        write_rows(data, rows_of(case.length))
    shape, facts = read_base_folder(base).shape, facts_of(data, base)
    line: dict[str, Any] = {"label": case.label, **asdict(case), "shape_key": shape_key(shape)}
    began = time.monotonic()
    moments: list[float] = []
    peak, device_name = 0, ""
    for event in trainer.events_of(recipe_of(case).to_dict(), base, data, cache=folder / "quantised"):
        if isinstance(event, PlanEvent):
            device_name = event.device
        elif isinstance(event, StepEvent):
            moments.append(time.monotonic())
            peak = max(peak, event.peak_memory_bytes)
        elif isinstance(event, FailedEvent):
            return line | {"failed": f"{event.code}: {event.message}"}
    return (
        line
        | estimated(case, shape, facts, device_name)
        | {
            "measured_on": datetime.now(UTC).date().isoformat(),
            "peak_bytes": peak,
            "step_seconds": median(after - before for before, after in pairwise(moments[1:])),
            "step_tokens": round(BATCH_SIZE * facts.mean_after_cut(case.length)),
            "job_seconds": round(time.monotonic() - began, 1),
        }
    )


def estimated(case: Case, shape: ModelShape, facts: DatasetFacts, device_name: str) -> dict[str, Any]:
    """What the arithmetic says of a case on a device as a trainer names it."""
    on_cpu = re.search(r"\(CPU, (\d+) threads\)", device_name)
    num_threads = int(on_cpu[1]) if on_cpu else 1
    device = DeviceFacts("cpu" if on_cpu else "cuda", device_name, ANY_MEMORY, num_threads)
    resolved = resolve(recipe_of(case), shape, facts, device)
    needed = estimate(resolved, shape, facts, device)
    fixed = needed.weights_bytes + needed.adapter_bytes + needed.optimizer_bytes
    return {
        "device": device_name,
        "kind": device.kind,
        "parts": asdict(MemoryParts(fixed, needed.activations_bytes, needed.runtime_bytes)),
        "estimated_step_seconds": seconds_of_step(resolved, shape, facts, device),
    }


def run(rows: Path, folder: Path, *, is_small: bool, seconds: float) -> None:
    """Measure the cases that are missing, as long as there is time."""
    began = time.monotonic()
    done = {one["label"] for one in read_lines(rows)}
    cases = [small(case) for case in CASES] if is_small else list(CASES)
    missing = [case for case in cases if case.label not in done]
    sizes = SMALL_SHAPES if is_small else LLAMA_SHAPES
    trainer: Trainer | None = None
    key: tuple[str, str] | None = None
    try:
        for number, case in enumerate(missing):
            if time.monotonic() - began > seconds:
                print(f"{len(missing) - number} recipes are left; call it again to run them.")
                return
            base = make_base(folder, case.shape, sizes[case.shape])
            # On a CPU the peak is the process's own, so that each recipe has a fresh one.
            if trainer is None or is_small or key != (case.shape, case.precision):
                if trainer is not None:
                    trainer.__exit__()
                trainer, key = Trainer(folder).__enter__(), (case.shape, case.precision)
            line = measure(case, trainer, base, folder)
            with rows.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            said = line.get("failed") or (
                f"peak {line['peak_bytes'] / 2**30:.2f} GiB, {1000 * line['step_seconds']:.0f} ms a step"
            )
            print(f"{case.label}: {said} ({time.monotonic() - began:.0f} s so far)", flush=True)
            if "failed" in line:
                trainer.__exit__()
                trainer = None
    finally:
        if trainer is not None:
            trainer.__exit__()


def read_lines(rows: Path) -> list[dict[str, Any]]:
    """The lines that are there."""
    return [json.loads(line) for line in rows.read_text("utf-8").splitlines()] if rows.exists() else []


def run_of(line: dict[str, Any]) -> MeasuredRun:
    """A line as the correction of memory learns from it."""
    return MeasuredRun(
        shape=line["shape_key"], method=line["method"], precision=line["precision"], kind=line["kind"],
        device=line["device"], parts=MemoryParts(**line["parts"]), peak_bytes=line["peak_bytes"],
    )  # fmt: skip


@dataclass(frozen=True)
class Errors:
    """expected / measured - 1 of a line, by arithmetic alone and corrected."""

    line: dict[str, Any]
    memory: float
    memory_corrected: float
    time: float
    time_corrected: float


def errors_of(lines: Sequence[dict[str, Any]]) -> list[Errors]:
    """The errors of every line that was measured, corrected by those that are for learning."""
    measured = [line for line in lines if "failed" not in line]
    devices = {line["device"] for line in measured}
    if len(devices) != 1:
        raise SystemExit(f"The rows are of {len(devices)} devices and cannot be merged: {', '.join(sorted(devices))}.")
    learned = [line for line in measured if line["learns"]]
    memory = learn_memory([run_of(line) for line in learned], devices.pop())
    expected_times = _expected_times(learned, measured)
    found = []
    for line, expected in zip(measured, expected_times, strict=True):
        one = run_of(line)
        correction = memory.correction(one.shape, one.method, one.precision)
        found.append(
            Errors(
                line,
                one.parts.total / one.held_bytes - 1,
                correction.total(one.parts) / one.held_bytes - 1,
                line["estimated_step_seconds"] / line["step_seconds"] - 1,
                expected / line["step_seconds"] - 1,
            )
        )
    return found


def leave_one_out(runs: Sequence[MeasuredRun]) -> tuple[list[float], list[float]]:
    """|expected / measured - 1| of the memory of each run: by arithmetic, and as all the others correct it."""
    alone, corrected = [], []
    for number, one in enumerate(runs):
        by_arithmetic, by_others = held_out_errors([*runs[:number], *runs[number + 1 :]], [one])
        alone += by_arithmetic
        corrected += by_others
    return alone, corrected


def _expected_times(learned: Sequence[dict[str, Any]], lines: Sequence[dict[str, Any]]) -> Iterator[float]:
    """Seconds of a step as the studio's correction of durations expects them."""
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "studio.settings")
    for name in ("DATABASE_URL", "REDIS_URL"):
        os.environ.setdefault(name, "postgres://nobody:nothing@127.0.0.1:1/none" if "DATA" in name else "redis://none")
    os.environ.setdefault("STUDIO_SECRET_KEY", uuid.uuid4().hex * 2)
    import django

    django.setup()
    from jobs.durations import learn
    from jobs.finished import Features, Finished

    def features(line: dict[str, Any]) -> Features:
        return Features(
            line["estimated_step_seconds"], line["step_tokens"], line["method"], line["shape"], line["device"]
        )

    now = datetime.now(UTC)
    finished = [
        Finished(uuid.uuid4(), features(line), line["step_seconds"], now - timedelta(minutes=number), 1)
        for number, line in enumerate(learned)
    ]
    prediction = learn(finished, finished)
    return (prediction.expected(features(line)) for line in lines)


def merge(rows: Path) -> list[Errors]:
    """Print the table."""
    lines = read_lines(rows)
    if not any("failed" not in line and line["learns"] for line in lines):
        raise SystemExit(f"{rows} has no measured recipes to learn from yet.")
    found = errors_of(lines)
    print(f"{found[0].line['device']}, {len(found)} of {len(CASES)} recipes; expected / measured - 1")
    print("| recipe | | peak GiB | memory, arithmetic | corrected | ms a step | time, arithmetic | corrected |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for one in sorted(found, key=lambda one: not one.line["learns"]):
        line = one.line
        print(
            f"| {line['label']} | {'learned from' if line['learns'] else 'checked'} "
            f"| {line['peak_bytes'] / 2**30:.2f} | {one.memory:+.1%} | {one.memory_corrected:+.1%} "
            f"| {1000 * line['step_seconds']:.0f} | {one.time:+.0%} | {one.time_corrected:+.0%} |"
        )
    for line in lines:
        if "failed" in line:
            print(f"| {line['label']} | failed | {line['failed']} | | | | | |")
    alone, corrected = leave_one_out([run_of(one.line) for one in found])
    print(
        f"\nmemory of each recipe as all the others correct it: mean |error| {mean(alone):.1%} by arithmetic, "
        f"{mean(corrected):.1%} corrected; median {median(alone):.1%} and {median(corrected):.1%}"
    )
    checked = [one for one in found if not one.line["learns"]]
    if checked:
        print(
            f"median |error| of the {len(checked)} that were not learned from: memory "
            f"{median(abs(one.memory) for one in checked):.1%} by arithmetic, "
            f"{median(abs(one.memory_corrected) for one in checked):.1%} corrected; time of a step "
            f"{median(abs(one.time) for one in checked):.0%} by arithmetic, "
            f"{median(abs(one.time_corrected) for one in checked):.0%} corrected"
        )
    return found


def main() -> None:
    """Run or merge."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.estimate_error", description=__doc__.split("\n\n")[0])
    kinds = parser.add_subparsers(dest="kind", required=True)
    running = kinds.add_parser("run", help="measure the recipes that are missing")
    running.add_argument("rows", type=Path)
    running.add_argument("--folder", type=Path, help="where bases and runs go (26 GB); by default a temporary folder")
    running.add_argument("--small", action="store_true", help="small shapes and short rows, for a CPU")
    running.add_argument("--seconds", type=float, default=460, help="after which no further recipe is begun")
    kinds.add_parser("merge", help="print the table").add_argument("rows", type=Path)
    asked = parser.parse_args()
    if asked.kind == "merge":
        merge(asked.rows)
        return
    asked.rows.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="peft-studio-estimates-") as temporary:
        folder = (asked.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        run(asked.rows, folder, is_small=asked.small, seconds=asked.seconds)


if __name__ == "__main__":
    main()

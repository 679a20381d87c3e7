"""How far estimates of memory and time are off on a real device, before and after ten runs have corrected them.

    python -m tests.bench.estimate_error run ROWS.jsonl [--seconds 380]     (a GPU; 135M to 8B shapes)
    python -m tests.bench.estimate_error run ROWS.jsonl --small             (a CPU; small shapes)
    python -m tests.bench.estimate_error merge ROWS.jsonl
    python -m tests.bench.estimate_error fit ROWS.jsonl

`run` trains recipes (methods x precisions x lengths x shapes) for some steps each with the product's own loop, on
random weights that are made on the device, and appends a line per recipe with what was measured: twenty, and on a GPU
ten more that were chosen before anyone had seen figures of them. Every step takes the same rows. A recipe that is there
is not run again, and none is begun after --seconds; so it can be called until all are there; what failed is tried
again. A recipe for a smaller card runs in a process of its own, beside a tensor that takes the rest of this one.

`merge` estimates each recipe by the arithmetic as it is now, corrects that by the ten recipes that are for learning,
as a studio does, and prints for all the error of peak memory and of the time of a step by arithmetic alone and
corrected; what counts is those that are not learned from. `fit` prints the constants of the arithmetic's GPU with which
the ten come out best.

Peak memory is what a trainer reports with its last step: tensors on a GPU, the process on a CPU.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import NormalDist, mean, median
from typing import Any

from tests.bench.start import _tensors
from tests.bench.workload import ALL_SHAPES
from workers.facts import DatasetFacts, DeviceFacts
from workers.hand_written_time import PACE, Pace
from workers.measured_memory import MeasuredRun, MemoryParts, held_out_errors, learn_memory, shape_key
from workers.memory import GIB, estimate
from workers.recipe import Recipe
from workers.shapes import LinearShape, ModelShape
from workers.splitting import Parts

WARM_STEPS = 4
"""Steps before the clock runs: kernels are compiled and memory is taken in the first ones."""
MIN_STEPS, MIN_SECONDS = 6, 2.5
"""What is measured of each recipe at least, in steps and in seconds."""
MAX_STEPS = 100
"""Epochs of a recipe are not more."""
ANY_MEMORY = 2**50
"""On a CPU everything fits: what is trained is said by the recipe, not chosen by its room."""


@dataclass(frozen=True)
class Case:
    """A recipe of the twenty; `learns` are corrected from, the others are checked.

    `length` is that of the longest rows; with `even` of all, else rows are log-normal up to it. `card` is the memory of
    a smaller card in GiB, None for the device's own.
    """

    shape: str
    method: str
    precision: str
    length: int
    batch: int
    learns: bool
    even: bool = False
    checkpointing: bool = False
    card: int | None = None

    @property
    def label(self) -> str:
        rows = f"{self.batch} rows {'of' if self.even else 'up to'} {self.length}"
        how = ", lean" if self.checkpointing else ""
        where = f", {self.card} GiB" if self.card else ""
        return f"{self.shape} {self.method} {self.precision}, {rows}{how}{where}"


# By base and precision, so that a base is made once; what is checked has another length, method or shape than what is
# learned from, or several of these.
CASES = (
    Case("135m", "lora", "bfloat16", 2048, 16, True),
    Case("135m", "lora", "bfloat16", 1024, 48, False),
    Case("1b", "lora", "bfloat16", 2048, 16, True),
    Case("1b", "prefix_tuning", "bfloat16", 2048, 32, False),
    Case("1b", "bottleneck", "bfloat16", 1024, 32, True),
    Case("1b", "dora", "bfloat16", 1024, 8, True),
    Case("1b", "qlora", "nf4", 2048, 16, False),
    Case("1b", "qlora", "nf4", 512, 32, True),
    Case("3b", "lora", "bfloat16", 2048, 32, False),
    Case("3b", "lora", "bfloat16", 2048, 32, True, card=16),
    Case("3b", "bottleneck", "bfloat16", 2048, 16, False, checkpointing=True),
    Case("3b", "dora", "bfloat16", 512, 16, False),
    Case("3b", "prompt_tuning", "bfloat16", 1024, 32, True),
    Case("8b", "lora", "bfloat16", 2048, 16, True),
    Case("8b", "rslora", "bfloat16", 2048, 16, False, card=32),
    Case("8b", "lora", "bfloat16", 4096, 4, False, even=True, checkpointing=True),
    Case("8b", "prefix_tuning", "bfloat16", 2048, 16, True),
    Case("8b", "qlora", "nf4", 2048, 1, False, even=True, checkpointing=True),
    Case("8b", "qlora", "nf4", 2048, 16, False),
    Case("8b", "qlora", "nf4", 2048, 16, True, card=16),
)
ANEW = (
    Case("135m", "bottleneck", "bfloat16", 1024, 24, False),
    Case("135m", "prefix_tuning", "bfloat16", 2048, 8, False),
    Case("1b", "rslora", "bfloat16", 4096, 8, False),
    Case("1b", "lora", "bfloat16", 2048, 32, False, checkpointing=True),
    Case("1b", "ia3", "bfloat16", 1024, 16, False),
    Case("3b", "qlora", "nf4", 2048, 16, False),
    Case("3b", "lora_plus", "bfloat16", 1024, 64, False, card=24),
    Case("8b", "bottleneck", "bfloat16", 2048, 16, False),
    Case("8b", "prompt_tuning", "bfloat16", 512, 32, False),
    Case("8b", "qlora", "nf4", 4096, 4, False, even=True, card=24),
)
"""Recipes that were chosen before anyone had seen figures of them."""
SMALL_SHAPES = {
    "135m": {
        "vocab_size": 8192, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64,
    },
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
"""Stand-ins of the sizes for a machine without a GPU, on rows an eighth as long, in float32 for bfloat16."""


def small(case: Case) -> Case:
    """The case on a machine without a GPU."""
    precision = "float32" if case.precision == "bfloat16" else case.precision
    # Of a smaller card there is no stand-in: such a recipe is one of fewer rows.
    batch = case.batch // 2 if case.card else case.batch
    return Case(case.shape, case.method, precision, case.length // 8, batch, case.learns, case.even, case.checkpointing)


def recipe_of(case: Case) -> Recipe:
    """The method's defaults; all rows of a step at once, as far as memory allows; each epoch is one step."""
    return Recipe.from_dict(
        {
            "name": case.label,
            "base_model": {"name": case.shape},
            "dataset": {"name": f"rows of {case.length}", "format": "alpaca"},
            "method": case.method,
            "precision": case.precision,
            "training": {
                "max_length": case.length, "micro_batch_size": case.batch, "batch_size": case.batch,
                "gradient_checkpointing": case.checkpointing, "packing": True, "learning_rate": 1e-4,
                "epochs": MAX_STEPS, "validate_every_steps": 0, "checkpoint_every_steps": 10 * MAX_STEPS,
            },
            "evaluation": {"metrics": ["loss"], "num_generated": 0, "num_samples_shown": 0, "general": False},
        }
    )  # fmt: skip


def lengths_of(case: Case) -> list[int]:
    """Tokens of the rows of every step: all of one length, or log-normal as instruction datasets are (median 220 of up
    to 2,048 tokens), in equal steps of probability."""
    if case.even:
        return [case.length] * case.batch
    normal = NormalDist(math.log(220 / 2048 * case.length), 0.8)
    drawn = (math.exp(normal.inv_cdf((place + 0.5) / case.batch)) for place in range(case.batch))
    return [round(min(case.length, max(16, one))) for one in drawn]


def facts_of(lengths: Sequence[int]) -> DatasetFacts:
    """The rows as a dataset's inspection counts them."""
    bins: dict[int, int] = {}
    for one in lengths:
        bound = 2 ** math.ceil(math.log2(max(one, 16)))
        bins[bound] = bins.get(bound, 0) + 1
    return DatasetFacts(len(lengths), sum(lengths), max(lengths), bins, Parts(len(lengths), 0, 0))


def shape_of(sizes: dict[str, int]) -> ModelShape:
    """The sizes as the studio reads them from a Llama's folder."""
    tensors = _tensors(sizes, range(sizes["num_hidden_layers"]), has_embeddings=True)
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    linears = []
    for name in names:
        size = next(size for key, size in tensors.items() if key.endswith(f"layers.0.{_half(name)}.{name}.weight"))
        linears.append(LinearShape(name=name, in_features=size[1], out_features=size[0]))
    return ModelShape(
        family="llama", num_layers=sizes["num_hidden_layers"], hidden_size=sizes["hidden_size"],
        intermediate_size=sizes["intermediate_size"], num_heads=sizes["num_attention_heads"],
        num_key_value_heads=sizes["num_key_value_heads"], head_size=sizes["head_dim"],
        vocabulary_size=sizes["vocab_size"], context_length=8192, tied_embeddings=False,
        num_parameters=sum(math.prod(size) for size in tensors.values()), linears=tuple(linears),
    )  # fmt: skip


def _half(name: str) -> str:
    return "self_attn" if name in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"


# --- measuring -------------------------------------------------------------------------------------------------------


class _MeasuredError(Exception):
    """Raised out of the loop once enough steps were timed."""


@dataclass
class _Clock:
    """Times the steps that a run reports, and ends it when there are enough."""

    moments: list[tuple[int, float, int]]
    """Step, moment in seconds, and tokens of all steps so far, behind the warm ones."""
    said: list[str]
    peak_bytes: int = 0

    def report(self, event: Any) -> None:
        from workers.events import MessageEvent, StepEvent

        if isinstance(event, MessageEvent):
            self.said.append(event.text)
        if isinstance(event, StepEvent):
            self.peak_bytes = max(self.peak_bytes, event.peak_memory_bytes)
            if event.step >= WARM_STEPS:
                self.moments.append((event.step, time.monotonic(), event.num_tokens))

    def should_stop(self) -> None:
        if len(self.moments) > 1:
            (first, began, _), (last, now, _) = self.moments[0], self.moments[-1]
            if last - first >= MIN_STEPS and now - began >= MIN_SECONDS:
                raise _MeasuredError

    @property
    def seconds_per_step(self) -> float:
        (first, began, _), (last, ended, _) = self.moments[0], self.moments[-1]
        return (ended - began) / (last - first)


def measure(case: Case, base: Any, sizes: dict[str, int], folder: Path) -> dict[str, Any]:
    """One line: the case and what was measured of it, on a model of its own on the weights of `base`."""
    import torch

    from tests.bench.training import make_run
    from workers import devices, training
    from workers.bases import free, share
    from workers.errors import first_line
    from workers.methods import get_method

    device = devices.choose_device()
    recipe, lengths = recipe_of(case), lengths_of(case)
    line: dict[str, Any] = {
        "label": case.label, **asdict(case), "model_shape": shape_of(sizes).model_dump(mode="json"),
        "lengths": lengths, "recipe": recipe.to_dict(), "kind": device.type, "device": devices.device_name(device),
        "memory_bytes": devices.memory_bytes(device), "num_threads": torch.get_num_threads(),
        "measured_on": datetime.now(UTC).date().isoformat(),
    }  # fmt: skip
    began = time.monotonic()
    clock = _Clock([], [])
    free(device)
    _forget_peak_memory()
    ballast = _ballast(case, line["memory_bytes"], device)
    with tempfile.TemporaryDirectory(dir=folder) as own:
        run = make_run(recipe, lengths, sizes, Path(own), device, clock.report, clock.should_stop)
        model = share(base)
        model.name_or_path = model.config._name_or_path = own
        method = get_method(case.method)
        devices.seed_everything(17)
        try:
            model = method.attach(model, method.read_settings(recipe.settings)).train()
            if case.checkpointing:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            with training.computed_by_hand(run, model):
                line["blocks"] = "the model's own" if run.engine is None else "by hand"
                try:
                    training.optimise(run, model)
                except _MeasuredError:
                    pass
                finally:
                    engine = run.engine
                    line["kept"] = [] if engine is None else list(engine.keeping)
                    line["budget"] = None if run.budget is None else run.budget.tokens
                    line["recorded"] = 0 if run.recorder is None else run.recorder.num_recorded
        except RuntimeError as error:
            return line | {"failed": first_line(error), "said": clock.said}
    return line | {
        "peak_bytes": clock.peak_bytes - ballast[1],
        "said": clock.said,
        "step_seconds": clock.seconds_per_step,
        "num_steps": clock.moments[-1][0] - clock.moments[0][0],
        "versions": training.versions(),
        "job_seconds": round(time.monotonic() - began, 1),
    }


def _ballast(case: Case, memory_bytes: int, device: Any) -> tuple[Any, int]:
    """Memory that a smaller card would not have, taken; and its bytes."""
    import torch

    if case.card is None or device.type != "cuda":
        return None, 0
    taken = torch.empty(memory_bytes - case.card * GIB, dtype=torch.uint8, device=device)
    return taken, taken.numel()


def _forget_peak_memory() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def run(rows: Path, folder: Path, *, is_small: bool, seconds: float, only: str | None = None) -> None:
    """Measure the cases that are missing, as long as there is time."""
    began = time.monotonic()
    done = {one["label"] for one in read_lines(rows) if "failed" not in one}
    cases = [small(case) for case in CASES] if is_small else _in_order((*CASES, *ANEW))
    missing = [case for case in cases if case.label not in done and only in (None, case.label)]
    sizes = SMALL_SHAPES if is_small else ALL_SHAPES
    key: tuple[str, str] | None = None
    base: Any = None
    for number, case in enumerate(missing):
        if time.monotonic() - began > seconds:
            print(f"{len(missing) - number} recipes are left; call it again to run them.")
            return
        if only is None and (is_small or case.card):
            # On a CPU the peak is the process's own; on a GPU earlier recipes leave the memory in pieces, of which a
            # smaller card would have fewer.
            command = [sys.executable, "-m", "tests.bench.estimate_error", "run", str(rows), "--folder", str(folder)]
            command += ["--only", case.label, *(["--small"] if is_small else [])]
            code = subprocess.run(command, check=False).returncode
            if code:
                _append(rows, {"label": case.label, "learns": case.learns, "failed": f"its process ended with {code}"})
                print(f"{case.label}: its process ended with {code}", flush=True)
            continue
        if key != (case.shape, case.precision):
            base, key = None, (case.shape, case.precision)
            base = make_base(sizes[case.shape], case.precision)
        line = measure(case, base, sizes[case.shape], folder)
        _append(rows, line)
        said = line.get("failed") or (
            f"peak {line['peak_bytes'] / GIB:.2f} GiB, {1000 * line['step_seconds']:.0f} ms a step, {line['blocks']}"
        )
        print(f"{case.label}: {said} ({time.monotonic() - began:.0f} s so far)", flush=True)


def _append(rows: Path, line: dict[str, Any]) -> None:
    with rows.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _in_order(cases: Sequence[Case]) -> list[Case]:
    """Those with a process of their own first, while this one has not taken to the GPU; then by their bases."""
    return sorted(cases, key=lambda case: (case.card is None, case.precision, [*ALL_SHAPES].index(case.shape)))


def make_base(sizes: dict[str, int], precision: str) -> Any:
    """A frozen model with random weights, as a trainer holds it."""
    from tests.bench.training import random_model
    from workers import devices
    from workers.base_models import prepare_process
    from workers.bases import free
    from workers.blocks.families import make_room

    device = devices.choose_device()
    free(device)
    prepare_process()
    model = random_model(sizes, precision, device)
    if device.type == "cuda" and precision == "bfloat16":
        make_room(model)
    free(device)
    return model


def read_lines(rows: Path) -> list[dict[str, Any]]:
    """The lines that are there, of each recipe the last."""
    lines = [json.loads(line) for line in rows.read_text("utf-8").splitlines()] if rows.exists() else []
    return list({line["label"]: line for line in lines}.values())


# --- comparing -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A measured line beside what the arithmetic says of it."""

    line: dict[str, Any]
    run: MeasuredRun
    step_seconds: float


def compared(line: dict[str, Any], pace: Pace = PACE) -> Row:
    """The line with the arithmetic's parts of its memory and its seconds of a step."""
    shape, facts = ModelShape.model_validate(line["model_shape"]), facts_of(line["lengths"])
    recipe = Recipe.from_dict(line["recipe"])
    memory = ANY_MEMORY if line["kind"] == "cpu" else line["card"] * GIB if line["card"] else line["memory_bytes"]
    device = DeviceFacts(line["kind"], line["device"], memory, line["num_threads"], pace=pace)
    needed = estimate(recipe, shape, facts, device)
    fixed = needed.weights_bytes + needed.adapter_bytes + needed.optimizer_bytes
    found = MeasuredRun(
        shape=shape_key(shape), method=line["method"], precision=line["precision"], kind=line["kind"],
        device=line["device"], parts=MemoryParts(fixed, needed.activations_bytes, needed.runtime_bytes),
        peak_bytes=line["peak_bytes"],
    )  # fmt: skip
    return Row(line, found, seconds_of_step(recipe, shape, facts, device))


def seconds_of_step(recipe: Recipe, shape: ModelShape, facts: DatasetFacts, device: DeviceFacts) -> float:
    """What the estimate says of one more step, in the middle of its range."""

    def middle(num_steps: int) -> float:
        training = recipe.training.model_copy(update={"max_steps": num_steps, "epochs": MAX_STEPS})
        found = estimate(recipe.model_copy(update={"training": training}), shape, facts, device)
        return (found.seconds_low + found.seconds_high) / 2

    return (middle(80) - middle(40)) / 40


@dataclass(frozen=True)
class Errors:
    """expected / measured - 1 of a line, by arithmetic alone and corrected."""

    row: Row
    memory: float
    memory_corrected: float
    time: float
    time_corrected: float

    @property
    def line(self) -> dict[str, Any]:
        return self.row.line


def errors_of(lines: Sequence[dict[str, Any]]) -> list[Errors]:
    """The errors of every line that was measured, corrected by those that are for learning."""
    measured = [compared(line) for line in lines if "failed" not in line]
    devices = {row.run.device for row in measured}
    if len(devices) != 1:
        raise SystemExit(f"The rows are of {len(devices)} devices and cannot be merged: {', '.join(sorted(devices))}.")
    learned = [row for row in measured if row.line["learns"]]
    memory = learn_memory([row.run for row in learned], devices.pop())
    found = []
    for row, expected in zip(measured, _expected_times(learned, measured), strict=True):
        one = row.run
        correction = memory.correction(one.shape, one.method, one.precision)
        found.append(
            Errors(
                row,
                one.parts.total / one.held_bytes - 1,
                correction.total(one.parts) / one.held_bytes - 1,
                row.step_seconds / row.line["step_seconds"] - 1,
                expected / row.line["step_seconds"] - 1,
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


def _expected_times(learned: Sequence[Row], rows: Sequence[Row]) -> Iterator[float]:
    """Seconds of a step as the studio's correction of durations expects them."""
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "studio.settings")
    for name in ("DATABASE_URL", "REDIS_URL"):
        os.environ.setdefault(name, "postgres://nobody:nothing@127.0.0.1:1/none" if "DATA" in name else "redis://none")
    os.environ.setdefault("STUDIO_SECRET_KEY", uuid.uuid4().hex * 2)
    import django

    django.setup()
    from jobs.durations import learn
    from jobs.finished import Features, Finished

    def features(row: Row) -> Features:
        line = row.line
        return Features(row.step_seconds, sum(line["lengths"]), line["method"], line["shape"], line["device"])

    now = datetime.now(UTC)
    finished = [
        Finished(uuid.uuid4(), features(row), row.line["step_seconds"], now - timedelta(minutes=number), 1)
        for number, row in enumerate(learned)
    ]
    prediction = learn(finished, finished)
    return (prediction.expected(features(row)) for row in rows)


ROLES = ("learned from", "checked", "checked anew")


def role_of(line: dict[str, Any]) -> str:
    """What a recipe is there for."""
    return ROLES[0] if line["learns"] else ROLES[2] if line["label"] in {case.label for case in ANEW} else ROLES[1]


def merge(rows: Path) -> list[Errors]:
    """Print the table."""
    lines = read_lines(rows)
    if not any("failed" not in line and line["learns"] for line in lines):
        raise SystemExit(f"{rows} has no measured recipes to learn from yet.")
    found = errors_of(lines)
    print(f"{found[0].line['device']}, {len(found)} recipes; expected / measured - 1")
    print(
        "| recipe | blocks | | peak GiB | memory, arithmetic | corrected | ms a step | time, arithmetic | corrected |"
    )
    print("| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for one in sorted(found, key=lambda one: ROLES.index(role_of(one.line))):
        line = one.line
        print(
            f"| {line['label']} | {line['blocks']} | {role_of(line)} "
            f"| {line['peak_bytes'] / GIB:.2f} | {one.memory:+.1%} | {one.memory_corrected:+.1%} "
            f"| {1000 * line['step_seconds']:.0f} | {one.time:+.0%} | {one.time_corrected:+.0%} |"
        )
    for line in lines:
        if "failed" in line:
            print(f"| {line['label']} | | failed | {line['failed']} | | | | | |")
    alone, corrected = leave_one_out([one.row.run for one in found])
    print(
        f"\nmemory of each recipe as all the others correct it: mean |error| {mean(alone):.1%} by arithmetic, "
        f"{mean(corrected):.1%} corrected; median {median(alone):.1%} and {median(corrected):.1%}"
    )
    for role in ROLES[1:]:
        if checked := [one for one in found if role_of(one.line) == role]:
            print(
                f"median |error| of the {len(checked)} that were {role}: memory "
                f"{median(abs(one.memory) for one in checked):.1%} by arithmetic, "
                f"{median(abs(one.memory_corrected) for one in checked):.1%} corrected; time of a step "
                f"{median(abs(one.time) for one in checked):.0%} by arithmetic, "
                f"{median(abs(one.time_corrected) for one in checked):.0%} corrected"
            )
    return found


FIT_STEPS = (2.0, 1.4, 1.15, 1.05, 1.02)
"""Factors by which a constant is changed, the coarse ones first."""
HELD_BACK = 0.002
"""What a constant costs that is e times what it was: those that the rows say nothing of stay where they are."""


def fitted(lines: Sequence[dict[str, Any]], start: Pace = PACE) -> Pace:
    """The constants with which the times of these lines come out best, one after the other changed until none helps."""

    def cost(pace: Pace) -> float:
        off = [math.log(compared(line, pace).step_seconds / line["step_seconds"]) for line in lines]
        moved = [math.log(value / getattr(start, name)) for name, value in asdict(pace).items()]
        return mean(one * one for one in off) + HELD_BACK * sum(one * one for one in moved)

    best, found = cost(start), start
    for step in FIT_STEPS:
        improves = True
        while improves:
            improves = False
            for name in asdict(found):
                for factor in (step, 1 / step):
                    tried = replace(found, **{name: getattr(found, name) * factor})
                    if (price := cost(tried)) < best - 1e-7:
                        best, found, improves = price, tried, True
    return found


def fit(rows: Path) -> Pace:
    """Print the constants that fit the recipes for learning, and how far these are off before and after."""
    lines = [
        line
        for line in read_lines(rows)
        if "failed" not in line and line["learns"] and line["kind"] == "cuda" and line["blocks"] == "by hand"
    ]
    if not lines:
        raise SystemExit(f"{rows} has no recipes of a GPU with hand-written blocks to learn from.")
    found = fitted(lines)
    for name, value in asdict(found).items():
        print(f"{name} = {value:.3g}  (was {getattr(PACE, name):.3g})")
    for label, pace in (("before", PACE), ("fitted", found)):
        off = [abs(compared(line, pace).step_seconds / line["step_seconds"] - 1) for line in lines]
        print(f"{label}: |error| of the {len(lines)} learned from: median {median(off):.0%}, largest {max(off):.0%}")
    return found


def main() -> None:
    """Run, merge or fit."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.estimate_error", description=__doc__.split("\n\n")[0])
    kinds = parser.add_subparsers(dest="kind", required=True)
    running = kinds.add_parser("run", help="measure the recipes that are missing")
    running.add_argument("rows", type=Path)
    running.add_argument("--folder", type=Path, help="where runs go; by default a temporary folder")
    running.add_argument("--small", action="store_true", help="small shapes and short rows, for a CPU")
    running.add_argument("--seconds", type=float, default=380, help="after which no further recipe is begun")
    running.add_argument("--only", help="the label of the one recipe to measure")
    kinds.add_parser("merge", help="print the table").add_argument("rows", type=Path)
    kinds.add_parser("fit", help="print the constants that fit best").add_argument("rows", type=Path)
    asked = parser.parse_args()
    if asked.kind == "merge":
        merge(asked.rows)
        return
    if asked.kind == "fit":
        fit(asked.rows)
        return
    asked.rows.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="peft-studio-estimates-") as temporary:
        folder = (asked.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        run(asked.rows, folder, is_small=asked.small, seconds=asked.seconds, only=asked.only)


if __name__ == "__main__":
    main()

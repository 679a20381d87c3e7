"""Every method on the same rows and token budget: one resumable command a row, and one that merges them.

    python -m tests.bench.methods row lora 1 --base DIR --data ROWS.jsonl --out DIR
    python -m tests.bench.methods all        --base DIR --data ROWS.jsonl --out DIR [--seeds 1 2 3] [--at-once 4]
    python -m tests.bench.methods speed      --base DIR --data ROWS.jsonl --out DIR
    python -m tests.bench.methods merge DIR [--write]

ROWS.jsonl has a question and an answer per line (GSM8K's form), of which the first `--rows` are taken. A row trains one
method with its default settings by `python -m workers`, and keeps its scores, row by row, in DIR/<method>-<seed>.json;
a row that is there is not trained again. `speed` trains a short run of each method with nothing beside it, since rows
that run at once slow each other down. `merge` prints the table; with --write it becomes the one on the page
"Which method?" (workers/measured_methods.json).
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from workers.evaluations import RowValue, ScoredRow, get_evaluation
from workers.measured import FILE, Figure, MeasuredMethod, MeasuredTable
from workers.methods import get_method, methods
from workers.results import Result, SampleRecord
from workers.statistics import compare

LOSS, NUMBER = "loss", "numeric_answer"
SPEED_STEPS = 60
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")


@dataclass(frozen=True)
class Options:
    base: Path
    data: Path
    out: Path
    num_rows: int
    num_held_out: int
    num_generated: int
    max_new_tokens: int


def recipe_of(name: str, seed: int, options: Options, **training: Any) -> dict[str, Any]:
    """The method's own defaults on one epoch of the rows."""
    return {
        "name": f"{name}-{seed}",
        "base_model": {"name": options.base.name, "path": str(options.base.resolve())},
        "dataset": {"name": options.data.stem, "format": "prompt_completion", "path": str(rows_file(options))},
        "method": name,
        "training": {"seed": seed, "max_length": 512, "epochs": 1.0, "batch_size": 8} | training,
        "split": {"held_out_share": min(0.5, options.num_held_out / options.num_rows),
                  "max_held_out": options.num_held_out},
        "evaluation": {"metrics": [LOSS, NUMBER], "num_generated": options.num_generated,
                       "max_new_tokens": options.max_new_tokens},
    }  # fmt: skip


def rows_file(options: Options) -> Path:
    """The first rows as prompts and completions, written once."""
    file = options.out.resolve() / f"rows-{options.num_rows}.jsonl"
    if not file.exists():
        lines = options.data.read_text("utf-8").splitlines()[: options.num_rows]
        found = [json.loads(line) for line in lines]
        aside = file.with_suffix(".new")
        aside.write_text(
            "".join(json.dumps({"prompt": row["question"], "completion": row["answer"]}) + "\n" for row in found)
        )
        aside.replace(file)
    return file


def train(name: str, label: str, recipe: dict[str, Any], out: Path) -> Path:
    """Runs a recipe by the command line that people use; gives the product's folder."""
    folder = out / "runs" / label
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.json").write_text(json.dumps(recipe, indent=2))
    with (folder / "log").open("wb") as log:
        subprocess.run(
            [sys.executable, "-m", "workers", str(folder / "recipe.json"), "--out", str(folder)],
            stdout=log, stderr=log, check=False,
        )  # fmt: skip
    product = next(iter(sorted((folder / "attempts").glob("*/adapter"))), None)
    if product is None:
        raise SystemExit(f"{label}: no product.\n{(folder / 'log').read_text()[-2000:]}")
    return product


def row(name: str, seed: int, options: Options) -> Path:
    """One row of the table, kept as a file; nothing is done when it is there."""
    file = options.out / f"{name}-{seed}.json"
    if file.exists():
        return file
    product = train(name, f"{name}-{seed}", recipe_of(name, seed, options), options.out)
    kept = summarise(product, name, seed)
    aside = file.with_suffix(".new")
    aside.write_text(json.dumps(kept) + "\n")
    aside.replace(file)
    shutil.rmtree(options.out / "runs" / f"{name}-{seed}" / "checkpoints", ignore_errors=True)
    right = [sum(one[place] for one in kept["answered"]) / max(1, len(kept["answered"])) for place in (1, 2)]
    losses = [sum(one[place] for one in kept["held_out"]) / sum(one[1] for one in kept["held_out"]) for place in (2, 3)]
    print(f"{name} {seed}: loss {losses[0]:.4f} -> {losses[1]:.4f}, right {right[0]:.1%} -> {right[1]:.1%}", flush=True)
    return file


def summarise(product: Path, name: str, seed: int) -> dict[str, Any]:
    """What the table needs of a finished run. `held_out` has [line, tokens, summed loss of the base, of the adapter];
    `answered` has [line, whether the base's number is right, the adapter's]."""
    result = Result.from_folder(product)
    made = result.provenance
    recipe = json.loads((product / "studio.json").read_text())["recipe"]
    held_out = [json.loads(line) for line in (product / "eval" / "held_out.jsonl").read_text().splitlines()]
    assert held_out, "a run without held-out rows says nothing"
    evaluation = get_evaluation(NUMBER)

    def is_right(sample: SampleRecord, answer: str) -> int:
        return int(evaluation.row_value(ScoredRow(sample.line, "", sample.reference, answer, 0.0, 0, 0)).value)

    return {
        "method": name,
        "seed": seed,
        "device": made.device,
        "versions": {package: found for package, found in made.versions.items() if package in PACKAGES},
        "base_model": recipe["base_model"]["name"],
        "dataset": recipe["dataset"]["name"],
        "precision": recipe["precision"],
        "learning_rate": recipe["training"]["learning_rate"],
        "num_train_rows": made.num_train_rows,
        "num_tokens": made.num_tokens,
        "num_trainable": result.num_trainable,
        "adapter_bytes": made.num_adapter_bytes,
        "peak_memory_bytes": made.peak_memory_bytes,
        "tokens_per_second": round(made.tokens_per_second, 1),
        "held_out": [
            [one["line"], one["num_tokens"], round(one["base_loss_sum"], 4), round(one["adapter_loss_sum"], 4)]
            for one in held_out
        ],
        "answered": [
            [one.line, is_right(one, one.base_answer), is_right(one, one.adapter_answer)] for one in result.samples
        ],
    }


def speed(name: str, options: Options) -> None:
    """Tokens/s and peak memory of a short run with nothing beside it."""
    file = options.out / f"{name}-speed.json"
    if file.exists():
        return
    recipe = recipe_of(name, 1, options, max_steps=SPEED_STEPS)
    recipe["evaluation"] |= {"num_generated": 0}
    recipe["split"] |= {"max_held_out": 16}
    result = Result.from_folder(train(name, f"{name}-speed", recipe, options.out))
    made = result.provenance
    file.write_text(
        json.dumps({"tokens_per_second": made.tokens_per_second, "peak_memory_bytes": made.peak_memory_bytes})
    )
    print(f"{name}: {made.tokens_per_second:.0f} tokens/s, {made.peak_memory_bytes / 2**30:.2f} GiB", flush=True)


def merge(out: Path) -> MeasuredTable:
    """The table over every row that is there. The unit of the intervals is the held-out row, its value the mean over
    the seeds; the seeds' own spread stands beside it."""
    found: dict[str, list[dict[str, Any]]] = {}
    for file in sorted(out.glob("*-[0-9]*.json")):
        kept = json.loads(file.read_text())
        found.setdefault(kept["method"], []).append(kept)
    if not found:
        raise SystemExit(f"{out} has no rows yet.")
    any_row = next(iter(found.values()))[0]
    rows = []
    for name, seeds in found.items():
        first = seeds[0]
        for key in ("device", "base_model", "dataset", "num_train_rows"):
            if any(one[key] != any_row[key] for one in seeds):
                raise SystemExit(f"The rows of {name} have another {key} than the others: they cannot be compared.")
        alone = out / f"{name}-speed.json"
        speed_row = json.loads(alone.read_text()) if alone.exists() else None
        rows.append(
            MeasuredMethod(
                method=name,
                label=get_method(name).label,
                num_seeds=len(seeds),
                num_trainable=first["num_trainable"],
                adapter_bytes=first["adapter_bytes"],
                peak_memory_bytes=first["peak_memory_bytes"],
                tokens_per_second=speed_row["tokens_per_second"] if speed_row else None,
                precision=first["precision"],
                learning_rate=first["learning_rate"],
                loss=loss_figure(seeds),
                numeric_answer=number_figure(seeds),
            )
        )
    rows.sort(key=lambda one: one.loss.value)
    return MeasuredTable(
        measured_on=datetime.now(UTC).date(),
        device=any_row["device"],
        versions=any_row["versions"],
        base_model=any_row["base_model"],
        dataset=any_row["dataset"],
        num_train_rows=any_row["num_train_rows"],
        num_held_out_rows=len(any_row["held_out"]),
        num_train_tokens=any_row["num_tokens"],
        command="python -m tests.bench.methods all --base DIR --data train.jsonl --out DIR",
        rows=rows,
    )


def loss_figure(seeds: Sequence[dict[str, Any]]) -> Figure:
    """Held-out loss in nats per token, the mean over the seeds of each row."""
    per_seed = [{line: values for line, *values in one["held_out"]} for one in seeds]
    lines = sorted(set.intersection(*(set(one) for one in per_seed)))

    def values(place: int) -> list[RowValue]:
        return [
            RowValue(sum(one[line][place] for one in per_seed) / len(per_seed) / count, count)
            for line in lines
            if (count := per_seed[0][line][0])
        ]

    totals = [sum(one[line][2] for line in lines) / sum(one[line][0] for line in lines) for one in per_seed]
    return figure(values(1), values(2), totals)


def number_figure(seeds: Sequence[dict[str, Any]]) -> Figure:
    """Share of right final numbers, the mean over the seeds of each row."""
    per_seed = [{line: values for line, *values in one["answered"]} for one in seeds]
    lines = sorted(set.intersection(*(set(one) for one in per_seed)))

    def values(place: int) -> list[RowValue]:
        return [RowValue(sum(one[line][place] for one in per_seed) / len(per_seed)) for line in lines]

    return figure(values(0), values(1), [sum(one[line][1] for line in lines) / len(lines) for one in per_seed])


def figure(base: list[RowValue], adapter: list[RowValue], per_seed: list[float]) -> Figure:
    found = compare(base, adapter)
    return Figure(
        base_value=found.base.value,
        value=found.adapter.value,
        low=found.adapter.low,
        high=found.adapter.high,
        difference=found.difference.value,
        difference_low=found.difference.low,
        difference_high=found.difference.high,
        lowest_seed=min(per_seed),
        highest_seed=max(per_seed),
        num_rows=found.num_rows,
    )


def print_table(table: MeasuredTable) -> None:
    print(
        f"{table.base_model}, {table.dataset}: {table.num_train_rows} rows, {table.num_train_tokens} tokens trained, "
        f"{table.num_held_out_rows} held out; {table.device}; {table.measured_on}"
    )
    print("| method | held-out loss | right numbers | trained parameters | adapter | peak memory | tokens/s | seeds |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for one in table.rows:
        loss, number = one.loss, one.numeric_answer
        print(
            f"| {one.label} | {loss.value:.4f} [{loss.low:.4f}, {loss.high:.4f}] | {number.value:.1%} "
            f"[{number.low:.1%}, {number.high:.1%}] | {one.num_trainable:,} | {one.adapter_bytes / 1e6:.2f} MB | "
            f"{one.peak_memory_bytes / 2**30:.2f} GiB | "
            f"{f'{one.tokens_per_second:,.0f}' if one.tokens_per_second else 'not measured'} | {one.num_seeds} |"
        )
    first = table.rows[0]
    print(f"| (base) | {first.loss.base_value:.4f} | {first.numeric_answer.base_value:.1%} | | | | |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    kinds = parser.add_subparsers(dest="kind", required=True)
    for kind in ("row", "all", "speed"):
        one = kinds.add_parser(kind)
        if kind == "row":
            one.add_argument("method", choices=list(methods()))
            one.add_argument("seed", type=int)
        else:
            one.add_argument("--methods", nargs="+", choices=list(methods()), default=list(methods()))
        if kind == "all":
            one.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
            one.add_argument("--at-once", type=int, default=1)
        one.add_argument("--base", type=Path, required=True)
        one.add_argument("--data", type=Path, required=True)
        one.add_argument("--out", type=Path, required=True)
        one.add_argument("--rows", type=int, default=4000)
        one.add_argument("--held-out", type=int, default=400)
        one.add_argument("--generated", type=int, default=200)
        one.add_argument("--max-new-tokens", type=int, default=200)
    merging = kinds.add_parser("merge")
    merging.add_argument("out", type=Path)
    merging.add_argument("--write", action="store_true", help=f"write {FILE.name} for the page")
    chosen = parser.parse_args()
    if chosen.kind == "merge":
        table = merge(chosen.out)
        print_table(table)
        if chosen.write:
            FILE.write_text(table.model_dump_json(indent=2) + "\n", "utf-8")
        return
    chosen.out.mkdir(parents=True, exist_ok=True)
    options = Options(
        chosen.base, chosen.data, chosen.out, chosen.rows, chosen.held_out, chosen.generated, chosen.max_new_tokens
    )
    rows_file(options)
    if chosen.kind == "row":
        row(chosen.method, chosen.seed, options)
    elif chosen.kind == "speed":
        for name in chosen.methods:
            speed(name, options)
    else:
        with ThreadPoolExecutor(chosen.at_once) as pool:
            jobs = [pool.submit(row, name, seed, options) for seed in chosen.seeds for name in chosen.methods]
            for job in jobs:
                job.result()


if __name__ == "__main__":
    main()

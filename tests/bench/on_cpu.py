"""Tokens per second of LoRA on a CPU, ours beside TRL's SFTTrainer, in turns: the same base, rows, threads and type.

    python -m tests.bench.on_cpu --out DIR                    (SmolLM2-135M, converted by the first run)
    python -m tests.bench.on_cpu --shape tiny --out DIR

Each round trains ours, TRL with all rows of a step in one padded batch, as it does when nothing is set, and TRL with
its rows one by one, where nothing is padded; neither computes activations again. The machine may be busy: rounds
alternate, and besides the clock on the wall each process's own processor time is counted. The faster TRL is compared.
A measurement that the folder has is not made again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from tests.bench.workload import ALL_SHAPES
from tests.parity.environments import environment
from tests.parity.jobs import PINS
from workers.bundled import NAME, prepare_smollm2

ROOT = Path(__file__).parents[2]
OURS, THEIRS = "ours", ("TRL, one padded batch", "TRL, row by row")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.on_cpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", choices=sorted(ALL_SHAPES), help=f"random weights instead of {NAME}")
    parser.add_argument("--out", type=Path, required=True, help="folder of the measurements and the base")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8, help="rows of a step")
    parser.add_argument("--length", type=int, help="every row has this many tokens; by default they differ")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--warm", type=int, default=2)
    options = parser.parse_args()
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    base = ["--shape", options.shape] if options.shape else ["--model", str(prepare_smollm2(options.out / NAME))]
    commands = commands_of(options, base)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}
    for turn in range(1, options.rounds + 1):
        for name, command in commands.items():
            found[name].append(measured(name, turn, command, options))
            print(f"round {turn}, {name}: {rates(found[name][-1])}", flush=True)
    print(summary(found))


def commands_of(options: argparse.Namespace, base: list[str]) -> dict[str, list[str]]:
    """What is run for each contender."""
    shared = [
        *base, "--batch", str(options.batch), "--steps", str(options.steps), "--warm", str(options.warm),
        *(["--length", str(options.length)] if options.length else []),
    ]  # fmt: skip
    peer = [str(environment("trl", PINS)), "-m", "tests.bench.peers", "trl", *shared, "--padded",
            "--checkpointing", "off"]  # fmt: skip
    return {
        OURS: [sys.executable, "-m", "tests.bench.training", "ours", *shared, "--precision", "float32"],
        THEIRS[0]: peer,
        THEIRS[1]: [*peer, "--micro", "1"],
    }


def measured(name: str, turn: int, command: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """The JSON line of one run, from the folder or made."""
    file = options.out / f"{name.replace(', ', '-').replace(' ', '_')}-{turn}.json"
    if not file.exists():
        threads = {"OMP_NUM_THREADS": str(options.threads), "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, cwd=ROOT, env=os.environ | threads, capture_output=True, text=True, check=False)
        lines = [line for line in done.stdout.splitlines() if line.startswith('{"name"')]
        if done.returncode or not lines:
            raise SystemExit(f"{name}, round {turn}, failed:\n{done.stderr[-3000:]}")
        file.write_text(lines[-1] + "\n", "utf-8")
    found: dict[str, Any] = json.loads(file.read_text("utf-8"))
    return found


def per_processor_second(row: dict[str, Any]) -> float:
    return float(row["tokens_per_second"] * row["seconds"] / row["processor_seconds"])


def rates(row: dict[str, Any]) -> str:
    return f"{row['tokens_per_second']:.1f} tokens/s, {per_processor_second(row):.1f} a second of the processor"


def summary(found: dict[str, list[dict[str, Any]]]) -> str:
    """Medians over the rounds as a Markdown table, and how many times the faster TRL ours is."""
    wall = {name: median(one["tokens_per_second"] for one in rows) for name, rows in found.items()}
    processor = {name: median(map(per_processor_second, rows)) for name, rows in found.items()}
    lines = ["| contender | tokens/s | tokens a second of the processor |", "| --- | --- | --- |"]
    lines += [f"| {name} | {wall[name]:.1f} | {processor[name]:.1f} |" for name in found]
    ratios = [figures[OURS] / max(figures[name] for name in THEIRS) for figures in (wall, processor)]
    row = found[OURS][0]
    versions = {name: rows[0]["versions"] for name, rows in found.items()}
    return "\n".join(
        [
            *lines,
            f"Ours is {ratios[0]:.2f} times the faster TRL by the clock, {ratios[1]:.2f} times by processor time.",
            f"{row['shape']}, {row['precision']}, {row['batch']} rows a step, {row['device']}; torch "
            f"{versions[OURS]['torch']} and {versions[THEIRS[0]]['torch']}, trl {versions[THEIRS[0]]['trl']}.",
        ]
    )


if __name__ == "__main__":
    main()

"""How fast a file of conversations is checked, beside datasets.load_dataset: `python -m tests.bench.inspection`.

Each runs in a process of its own. Ours applies every rule to every row; theirs reads the rows into Arrow.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import orjson

OURS = "from workers.inspection import main; import sys; main(sys.argv[1:])"
THEIRS = """
import sys
from datasets import load_dataset
rows = load_dataset("json", data_files=sys.argv[1], split="train", cache_dir=sys.argv[2])
print(len(rows))
"""
_MEASURE = """
import sys, time
sys.stderr.write(f"{time.process_time()} " + next(line for line in open("/proc/self/status") if "VmHWM" in line))
"""


def make_file(path: Path, num_bytes: int, *, has_beside: bool = False, seed: int = 1) -> int:
    """Conversations of one to three exchanges in words drawn as in a language (Zipf); returns their number.

    With `has_beside`, each has an id, a topic and a score, and every tenth a text beyond ASCII.
    """
    dice = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(dice.choices(letters, k=dice.randint(2, 9))) for _ in range(20_000)]
    weights = [1 / (index + 3) for index in range(len(words))]
    num_rows = written = 0
    with path.open("wb") as file:
        while written < num_bytes:
            drawn = dice.choices(words, weights, k=200_000)
            at = 0
            while at < len(drawn) - 2000:
                turns = []
                for _ in range(dice.choice([1, 1, 2, 3])):
                    asked, said = dice.randint(8, 60), dice.randint(20, 140)
                    turns.append({"role": "user", "content": " ".join(drawn[at : at + asked]) + "?"})
                    at += asked
                    answer = " ".join(drawn[at : at + said])
                    turns.append({"role": "assistant", "content": answer[:100] + ".\n" + answer[100:] + "."})
                    at += said
                row: dict[str, Any] = {"messages": turns}
                if has_beside:
                    row = {"id": num_rows, "topic": f"topic {num_rows % 7}", "score": num_rows % 1000 / 1000, **row}
                    if num_rows % 10 == 0:
                        turns[-1]["content"] += " “Straße”, 注文番号."
                written += file.write(orjson.dumps(row) + b"\n")
                num_rows += 1
    return num_rows


def run(program: str, *arguments: str) -> tuple[float, float, float, bytes]:
    """(seconds on the clock, seconds of processor, peak MiB, output) of a program in a process with one thread."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    }
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", program + _MEASURE, *arguments], capture_output=True, check=True, env=environment
    )
    seconds = time.perf_counter() - started
    processor, _, peak, _ = done.stderr.decode().splitlines()[-1].split()
    return seconds, float(processor), int(peak) / 1024, done.stdout


def main() -> None:
    """Prints megabytes (10^6 bytes) per second and per core, and peak memory, of both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=300)
    parser.add_argument("--beside", action="store_true", help="rows with other fields, and with texts beyond ASCII")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        num_rows = make_file(path, chosen.megabytes * 10**6, has_beside=chosen.beside)
        size = path.stat().st_size / 1e6
        print(f"{num_rows:,} conversations, {size:,.0f} MB")
        seconds, processor, peak, output = run(OURS, "rows", str(path))
        done = orjson.loads(output.splitlines()[-1])
        assert done["num_rows"] == done["num_usable"] == num_rows, done
        print(
            f"inspection:   {seconds:6.1f} s, {size / seconds:5.0f} MB/s, {size / processor:5.0f} MB/s per core, "
            f"peak {peak:,.0f} MiB; every rule, {sum(done['problem_counts'].values())} problems"
        )
        seconds, processor, peak, output = run(THEIRS, str(path), f"{folder}/cache")
        assert int(output.split()[-1]) == num_rows
        print(
            f"load_dataset: {seconds:6.1f} s, {size / seconds:5.0f} MB/s, {size / processor:5.0f} MB/s per core, "
            f"peak {peak:,.0f} MiB; reads the rows only"
        )


if __name__ == "__main__":
    main()

"""How fast a large file is divided, and in how much memory: `python -m tests.bench.splits [--rows 1000000]`.

In a process of its own with the memory limit of the studio. Rows are chats of 32 words, with one of seven topics and in
groups of five; without near duplicates, with groups and strata, and with near duplicates.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path

import orjson

from tests.bench.inspection import run

OURS = "from workers.splits.making import main; import sys; main(sys.argv[1:])"
ASKED = {
    "equal rows together": {"keep_together": "equal"},
    "in groups, stratified": {"keep_together": "equal", "group_column": "group", "stratify_column": "topic"},
    "near duplicates too": {"keep_together": "near"},
}


def make_file(path: Path, num_rows: int, *, seed: int = 1) -> None:
    """Chats of 12 and 20 words out of 20,000."""
    dice = random.Random(seed)
    words = [f"w{number}" for number in range(20_000)]
    with path.open("wb") as file:
        for number in range(num_rows):
            asked, told = (" ".join(dice.choices(words, k=num)) for num in (12, 20))
            turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": told}]
            row = {"messages": turns, "topic": f"t{number % 7}", "group": f"g{number // 5}"}
            file.write(orjson.dumps(row) + b"\n")


def main() -> None:
    """Prints seconds on the clock and peak memory of each way to divide."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        make_file(path, chosen.rows)
        print(f"{chosen.rows:,} rows, {path.stat().st_size / 1e6:,.0f} MB")
        for label, asked in ASKED.items():
            seconds, processor, peak, output = run(
                OURS, str(path), "--format", "messages", "--asked", orjson.dumps(asked).decode(),
                "--out", str(Path(folder) / "split.jsonl"),
            )  # fmt: skip
            done = orjson.loads(output.splitlines()[-1])
            assert done["kind"] == "done", done
            sizes = ", ".join(f"{num:,} {part}" for part, num in done["num_rows"].items())
            print(
                f"{label:22} {seconds:5.0f} s, {processor:5.0f} s of processor, peak {peak:5,.0f} MiB: {sizes}",
                flush=True,
            )


if __name__ == "__main__":
    main()

"""How fast each scan goes over a large file, and in how much memory: `python -m tests.bench.scans [--rows 1000000]`.

Each runs in a process of its own with the memory limit of the studio. One row in a hundred is a copy of an earlier one,
and every other copy says a word more, so that the duplicates have something to find.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path

import orjson

from tests.bench.inspection import run
from workers.scans import scans

OURS = "from workers.scanning import main; import sys; main(sys.argv[1:])"


def make_file(path: Path, num_rows: int, *, seed: int = 1) -> None:
    """Questions and answers in words drawn as in a language (Zipf): 10 to 40 and 30 to 110 of them."""
    dice = random.Random(seed)
    words = ["".join(dice.choices("abcdefghijklmnopqrstuvwxyz", k=dice.randint(2, 9))) for _ in range(20_000)]
    weights = [1 / (index + 3) for index in range(len(words))]
    drawn: list[str] = []
    at = 0
    kept: list[bytes] = []
    with path.open("wb") as file:
        for _ in range(num_rows):
            if kept and dice.random() < 0.01:
                copy = dice.choice(kept)
                file.write(copy if dice.random() < 0.5 else copy.replace(b'."}', f' {dice.choice(words)}."}}'.encode()))
                continue
            if len(drawn) - at < 200:
                drawn, at = dice.choices(words, weights, k=1_000_000), 0
            asked, told = dice.randint(10, 40), dice.randint(30, 110)
            said = drawn[at + asked : at + asked + told]
            row = {"prompt": " ".join(drawn[at : at + asked]) + "?", "completion": f"{' '.join(said).capitalize()}."}
            at += asked + told
            line = orjson.dumps(row) + b"\n"
            if len(kept) < 1000:
                kept.append(line)
            file.write(line)


def main() -> None:
    """Prints rows per second on the clock and per second of processor, and peak memory, of each scan."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--scan", choices=list(scans()), action="append", help="only this one; may be given again")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        make_file(path, chosen.rows)
        print(f"{chosen.rows:,} rows, {path.stat().st_size / 1e6:,.0f} MB")
        for name in chosen.scan or scans():
            seconds, processor, peak, output = run(OURS, name, str(path), "--format", "prompt_completion")
            done = orjson.loads(output.splitlines()[-1])
            assert done["kind"] == "done", done
            print(
                f"{name:18} {seconds:6.0f} s, {chosen.rows / seconds:8,.0f} rows/s, "
                f"{chosen.rows / processor:8,.0f} rows/s of processor, peak {peak:5,.0f} MiB, "
                f"{done['num_findings']:,} findings",
                flush=True,
            )


if __name__ == "__main__":
    main()

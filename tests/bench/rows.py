"""How fast a dataset's rows are looked through: `python -m tests.bench.rows --rows 1000000`.

Makes a file of conversations (`--out` keeps it, to be uploaded), writes its rows at rest in the process that a worker
starts, and asks the process that serves the pages. Each question is asked anew: nothing is remembered of those before.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import orjson
import psutil

TOPICS = ("billing", "shipping", "returns", "account", "security", "hardware")
NEEDLE = "zyxneedle"
NEEDLE_EVERY, STREET_EVERY, BROKEN_EVERY = 100_003, 997, 10_007
QUESTIONS: tuple[tuple[str, dict[str, Any], dict[str, Any]], ...] = (
    ("first page", {}, {}),
    ("page behind row 777,777", {}, {"after": [777_777, 777_777]}),
    ("text in 10 of 1,000,000", {"text": NEEDLE}, {}),
    ("text in one of 997", {"text": "straSSe"}, {}),
    ("two letters, in half", {"text": "qu"}, {}),
    ("one letter, in all", {"text": "e"}, {}),
    ("text in none", {"text": "qqzzxxjj"}, {}),
    ("column = value", {"column": "topic", "value": "billing"}, {}),
    ("column and text", {"column": "topic", "value": "billing", "text": "qu"}, {}),
    ("length range, by length", {"min_characters": 300, "max_characters": 400}, {"order": "longest"}),
    ("longest first", {}, {"order": "longest"}),
    ("set aside", {"state": "set_aside"}, {}),
    ("turns and system prompt", {"min_turns": 4, "system": "with"}, {}),
    ("one row", {}, {"line": 777_777}),
)


def make_chats(path: Path, num_rows: int, *, seed: int = 1) -> None:
    """Conversations of one to three exchanges in words drawn as in a language (Zipf), three in ten with a system turn.

    Each has an id, a topic and a score; some texts come seldom, and some rows are broken.
    """
    dice = random.Random(seed)
    words = ["".join(dice.choices("abcdefghijklmnopqrstuvwxyz", k=dice.randint(2, 9))) for _ in range(20_000)]
    weights = list(itertools.accumulate(1 / (index + 3) for index in range(len(words))))
    drawn: list[str] = []
    at = 0
    with path.open("wb") as file:
        for n in range(num_rows):
            if at > len(drawn) - 1000:
                drawn, at = dice.choices(words, cum_weights=weights, k=400_000), 0
            topic = TOPICS[n % len(TOPICS)]
            turns = [{"role": "system", "content": f"You answer questions about {topic}."}] if n % 10 < 3 else []
            for _ in range(dice.choice((1, 1, 1, 2, 3))):
                middle, end = at + dice.randint(5, 30), at + dice.randint(45, 100)
                turns.append({"role": "user", "content": " ".join(drawn[at:middle]).capitalize() + "?"})
                turns.append({"role": "assistant", "content": " ".join(drawn[middle:end]).capitalize() + "."})
                at = end
            if n % STREET_EVERY == 0:
                turns[-1]["content"] += " Straße İstanbul 注文番号"
            if n % NEEDLE_EVERY == 77:
                turns[-1]["content"] += f" {NEEDLE}"
            row = orjson.dumps({"id": n, "topic": topic, "score": n * 7919 % 1000 / 1000, "messages": turns})
            file.write((row[:-1] if n % BROKEN_EVERY == 500 else row) + b"\n")


class Server:
    """The process that answers, and how long it takes."""

    def __init__(self, table: Path, columns: list[str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "workers.row_search", "--seconds", "60"], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        )  # fmt: skip
        self._request = {
            "path": str(table), "names": columns, "format": "messages", "columns": {}, "order": "line", "limit": 50,
        }  # fmt: skip
        self.watched = psutil.Process(self._process.pid)
        self.num_asked = 0

    def ask(self, filters: dict[str, Any], more: dict[str, Any]) -> tuple[float, float, dict[str, Any]]:
        """(milliseconds on the clock, of processor, answer)."""
        self.num_asked += 1
        if filters:  # another question each time, that fits the same rows
            filters = {"max_turns": 10**6 + self.num_asked, **filters}
        before, started = sum(self.watched.cpu_times()[:2]), time.perf_counter()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(orjson.dumps({**self._request, "filters": filters, **more}) + b"\n")
        self._process.stdin.flush()
        found = orjson.loads(self._process.stdout.readline())
        seconds = time.perf_counter() - started
        assert found["kind"] == "done", found
        assert found["is_whole"]
        return 1000 * seconds, 1000 * (sum(self.watched.cpu_times()[:2]) - before), found

    def mebibytes(self) -> float:
        """Resident memory."""
        return float(self.watched.memory_info().rss / 1024**2)

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


def write_table(path: Path, table: Path) -> list[str]:
    """Writes the rows at rest and prints what it took; returns the columns that one may filter by."""
    started = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, "-m", "workers.row_table", str(path), "--format", "messages", "--out", str(table)],
        stdout=subprocess.PIPE, env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )  # fmt: skip
    assert child.stdout is not None
    last = child.stdout.read().splitlines()[-1]
    _pid, _status, used = os.wait4(child.pid, 0)
    seconds, size, source = time.perf_counter() - started, table.stat().st_size / 1e6, path.stat().st_size / 1e6
    print(
        f"written in {seconds:.1f} s ({used.ru_utime + used.ru_stime:.1f} s of processor), peak "
        f"{used.ru_maxrss / 1024:,.0f} MiB; at rest {size:,.0f} MB, the file {source:,.0f} MB ({size / source:.2f})"
    )
    return [one["name"] for one in orjson.loads(last)["columns"]]


def main() -> None:
    """Prints size at rest, milliseconds per question (median and 95 %), and the memory of the process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=20, help="how often each question is asked")
    parser.add_argument("--out", type=Path, help="keep the file of conversations here, and measure nothing")
    chosen = parser.parse_args()
    if chosen.out:
        make_chats(chosen.out, chosen.rows)
        print(f"{chosen.rows:,} rows, {chosen.out.stat().st_size / 1e6:,.0f} MB: {chosen.out}")
        return
    with tempfile.TemporaryDirectory() as folder:
        path, table = Path(folder) / "rows.jsonl", Path(folder) / "rows.parquet"
        make_chats(path, chosen.rows)
        print(f"{chosen.rows:,} conversations; load of the machine {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
        server = Server(table, write_table(path, table))
        try:
            server.ask({}, {})
            print(f"memory of the process that serves: {server.mebibytes():,.0f} MiB at first")
            print(f"{'':28}{'median':>9}{'95 %':>9}{'processor':>11}   rows that fit")
            for name, filters, more in QUESTIONS:
                taken = [server.ask(filters, more) for _ in range(chosen.rounds)]
                clock = sorted(one[0] for one in taken)
                median, late = clock[len(clock) // 2], clock[min(len(clock) - 1, round(0.95 * len(clock)))]
                processor = sorted(one[1] for one in taken)[len(taken) // 2]
                fit = taken[-1][2].get("num_matches", "")
                print(f"{name:28}{median:6.0f} ms{late:6.0f} ms{processor:8.0f} ms   {fit:,}" if fit != "" else
                      f"{name:28}{median:6.0f} ms{late:6.0f} ms{processor:8.0f} ms")  # fmt: skip
            print(f"memory of the process that serves: {server.mebibytes():,.0f} MiB at last")
        finally:
            server.close()


if __name__ == "__main__":
    main()

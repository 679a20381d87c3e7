"""Processes that look at what people bring along: limited in memory and time, and answering all the same."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import workers

KEPT = """
import sys
from workers.errors import DatasetError
from workers.limited import answer_lines, limit_memory
limit_memory(400 * 1024**2)
def answer(request):
    if request["do"] == "refuse":
        raise DatasetError("No.", next_step="Ask for less.")
    if request["do"] == "hold":
        try:
            bytearray(request["bytes"])
        except MemoryError:
            return {"held": False}
        return {"held": True}
    while request["do"] == "loop":
        pass
    return {"said": request["do"]}
answer_lines(answer, seconds=2.0)
"""
READER = """
import argparse, sys
from workers.errors import DatasetError
from workers.limited import add_file, emit, limited, refusals_emitted
parser = argparse.ArgumentParser()
add_file(parser)
chosen = limited(parser, sys.argv[1:])
with refusals_emitted():
    emit("read", columns=chosen.columns, text="a\\0b\\ud800", memory=chosen.memory_bytes)
    bytearray(300 * 1024**2)
    raise DatasetError("No.", next_step="Mend it.", line=3, field="dataset")
"""


def ask(*requests: dict[str, object]) -> tuple[list[dict[str, object]], int]:
    """The answers, and how the process has ended."""
    lines = b"".join(json.dumps(one).encode() + b"\n" for one in requests)
    done = subprocess.run([sys.executable, "-c", KEPT], input=lines, stdout=subprocess.PIPE, timeout=60, check=False)
    return [json.loads(line) for line in done.stdout.splitlines()], done.returncode


def test_each_line_is_answered_with_one_within_the_limits() -> None:
    found, status = ask(
        {"do": "a"},
        {"do": "refuse"},
        {"do": "hold", "bytes": 600 * 1024**2},
        {"do": "hold", "bytes": 1024},
        {"do": "b"},
    )
    assert found == [
        {"kind": "done", "said": "a"}, {"kind": "refused", "message": "No.", "next_step": "Ask for less."},
        {"kind": "done", "held": False}, {"kind": "done", "held": True}, {"kind": "done", "said": "b"},
    ]  # fmt: skip
    assert status == 0
    assert ask({"do": "a"}, {"do": "loop"}, {"do": "b"}) == ([{"kind": "done", "said": "a"}], -signal.SIGALRM)


def test_it_ends_when_nothing_is_asked_for_a_while() -> None:
    code = KEPT.replace(
        "limit_memory(400", "import workers.limited\nworkers.limited.IDLE_SECONDS = 1.0\nlimit_memory(400"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b'{"do": "a"}\n')
        process.stdin.flush()
        assert json.loads(process.stdout.readline()) == {"kind": "done", "said": "a"}
        assert process.wait(60) == 0, "although its standard input is open still"


def run_reader(*more: str) -> tuple[list[dict[str, object]], int]:
    done = subprocess.run(
        [sys.executable, "-c", READER, "rows.jsonl", "--format", "text", *more], capture_output=True, timeout=60,
        check=False,
    )  # fmt: skip
    return [json.loads(line) for line in done.stdout.splitlines()], done.returncode


def test_a_file_is_read_within_the_limit_and_what_people_can_mend_is_said() -> None:
    found, status = run_reader("--columns", '{"prompt": "q"}')
    assert (found[0]["columns"], found[0]["text"], found[0]["memory"]) == ({"prompt": "q"}, "a\u2400b?", 2 * 1024**3)
    assert found[1:] == [
        {"kind": "refused", "code": "unreadable_dataset", "message": "No.", "next_step": "Mend it.", "line": 3,
         "field": "dataset"}
    ]  # fmt: skip
    assert status == 0
    found, status = run_reader("--memory-bytes", str(200 * 1024**2))
    assert [one["kind"] for one in found] == ["read"], "and no end: that is told by its absence"
    assert (status, found[0]["columns"]) == (1, {})


@pytest.mark.parametrize("what", [r"\.setrlimit\(", r"RLIMIT_AS, \(", r"setitimer\("])
def test_nobody_else_limits_a_process(what: str) -> None:
    root = Path(workers.__file__).parent
    found = {str(path.relative_to(root)) for path in root.rglob("*.py") if re.search(what, path.read_text("utf-8"))}
    assert found == {"limited.py"}

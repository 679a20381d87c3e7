"""What those processes have in common that look at what people bring along: a limit on memory, and how they answer.

A file or a chat template may ask for all the memory and time there is, and the interpreter itself may end at it. So
each of them is looked at by `python -m workers.MODULE` in a process of its own. One kind reads a file, writes one JSON
object per line to standard output and ends with "done" or "refused"; the other answers each line of JSON with one, and
is kept for the next (studio/datasets/kept_child.py). No other memory than of such a process is ever limited.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import select
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import orjson

from workers.errors import ExplainedError

MEMORY_BYTES = 2 * 1024**3
"""Of address space, for a process that looks at one file."""
PROGRESS_SECONDS = 0.5
IDLE_SECONDS = 300.0
"""A process that is kept ends when nothing is asked for so long."""


def limit_memory(num_bytes: int = MEMORY_BYTES) -> None:
    """Let this process have no more address space than that, for good."""
    resource.setrlimit(resource.RLIMIT_AS, (num_bytes, num_bytes))


def use_system_allocator() -> None:
    """Before pyarrow is imported: its own allocators reserve far more address space than they use, and the limit counts
    it."""
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")


def add_file(parser: argparse.ArgumentParser, *, needs_format: bool = True) -> None:
    """The arguments of a process that reads a dataset's file: how it is read, and what memory that may take."""
    parser.add_argument("file", type=Path)
    how = "name of the format plug-in" if needs_format else "name of the format plug-in; recognised when empty"
    parser.add_argument("--format", required=needs_format, default="", help=how)
    parser.add_argument(
        "--columns", type=orjson.loads, default="{}", help="the format's fields mapped to columns, as JSON"
    )
    add_memory_limit(parser)


def add_memory_limit(parser: argparse.ArgumentParser) -> None:
    """The argument that `limited` obeys."""
    parser.add_argument("--memory-bytes", type=int, default=MEMORY_BYTES, help="of address space, for all it does")


def limited(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, with the process's memory limited as they say."""
    chosen = parser.parse_args(arguments)
    limit_memory(chosen.memory_bytes)
    return chosen


def emit(kind: str, **values: Any) -> None:
    """Write one event; lone surrogates cannot be written and NUL cannot be stored, so both become visible."""
    try:
        line = orjson.dumps({"kind": kind, **values})
    except (TypeError, orjson.JSONEncodeError):
        line = orjson.dumps({"kind": kind, **_storable(values)})
    if b"\\u0000" in line:
        line = orjson.dumps(_storable({"kind": kind, **values}))
    sys.stdout.buffer.write(line + b"\n")
    sys.stdout.buffer.flush()


def _storable(value: Any) -> Any:
    if isinstance(value, str):
        return value.replace("\0", "\N{SYMBOL FOR NULL}").encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {_storable(key): _storable(child) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [_storable(child) for child in value]
    return value


@contextlib.contextmanager
def refusals_emitted() -> Iterator[None]:
    """What people can mend ends as a "refused" event; everything else is a fault of ours, or a limit that struck."""
    try:
        yield
    except ExplainedError as error:
        emit(
            "refused", code=error.code, message=error.message, next_step=error.next_step, line=error.line,
            field=error.field,
        )  # fmt: skip


def answer_lines(answer: Callable[[Any], dict[str, Any]], *, seconds: float) -> None:
    """Answer each line of JSON on standard input with one, until it ends or nothing is asked for a while.

    An answer is {"kind": "done", ...} with what `answer` gives, or {"kind": "refused", "message", "next_step"} for an
    ExplainedError. After `seconds` with one request the process ends by the alarm's own way, which also stops what
    never returns to Python.
    """
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    while select.select([sys.stdin.buffer], [], [], IDLE_SECONDS)[0] and (line := sys.stdin.buffer.readline()):
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            found = {"kind": "done", **answer(orjson.loads(line))}
        except ExplainedError as error:
            found = {"kind": "refused", "message": error.message, "next_step": error.next_step}
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.stdout.buffer.write(orjson.dumps(found) + b"\n")
        sys.stdout.buffer.flush()

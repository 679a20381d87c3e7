"""Rows as a base model learns them, in a process of its own: `python -m workers.previewing`.

A chat template is a program that came with a base model, and a row is what somebody uploaded: neither runs in the web
process, whose requests it could hold up. Each line of standard input is a request in JSON (see `answer`), each line of
standard output its answer: {"kind": "done", ...} or {"kind": "refused", "message", "next_step"}. A request that takes
too long ends the process, by the system's own alarm; so does having nothing to do for a while.
"""

from __future__ import annotations

import argparse
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import orjson

from workers.errors import BaseModelError, DatasetError
from workers.examples import AnyExample, Example, Message
from workers.formats import get_format
from workers.learned import learned
from workers.limited import add_memory_limit, answer_lines, limited
from workers.reading import read_rows
from workers.rendering import LossOn, Renderer

NEAR_ROWS = 500
"""Lines before and behind the wanted one among which the neighbouring usable rows are looked for first."""


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """What a base model learns of the first usable row at a line or behind it.

    The request holds path, format, columns, line, folder (the base model's), revision, max_length, loss_on and
    max_tokens. In the place of path, `row` may hold the row itself as {line, raw}, with the lines previous and next; or
    there are, in the place of a file's row, `turns`: pairs of role and content. The answer holds line (None: no
    usable row is left), previous and next (lines of the usable rows beside it, or None), template ("own" or "plain"),
    stop_tokens and conversations (workers.learned.Conversation).

    Raises:
        ExplainedError: the file or the base model cannot be read.
    """
    renderer = _renderer(request["folder"], request["revision"]).with_limits(
        max_length=request["max_length"], loss_on=_loss_on(request["loss_on"])
    )
    before, example, after = _wanted(request)
    found = [] if example is None else learned(renderer, example, max_tokens=request["max_tokens"])
    return {
        "line": example.line if example else None,
        "previous": before,
        "next": after,
        "template": "own" if renderer.has_chat_template else "plain",
        "stop_tokens": renderer.stop_tokens(),
        "conversations": [one.to_dict() for one in found],
    }


def _wanted(request: dict[str, Any]) -> tuple[int | None, AnyExample | None, int | None]:
    if "turns" in request:
        return None, Example(1, tuple(Message(role, content) for role, content in request["turns"])), None
    if "row" in request:
        return request["previous"], _parsed(request), request["next"]
    return find_row(Path(request["path"]), request["format"], request["columns"], request["line"])


def _parsed(request: dict[str, Any]) -> AnyExample | None:
    row = request["row"]
    if row is None:
        return None
    example, _problems = get_format(request["format"]).parse(orjson.loads(row["raw"]), row["line"], request["columns"])
    return example


def _loss_on(value: str) -> LossOn:
    return "all" if value == "all" else "assistant"


@lru_cache(maxsize=2)
def _renderer(folder: str, revision: str) -> Renderer:
    # The revision is in the key: another folder's content is another tokenizer.
    del revision
    try:
        return Renderer(Path(folder), max_length=1, loss_on="assistant")
    except OSError as error:
        raise BaseModelError("The base model's folder is not there any more.") from error


def find_row(
    path: Path, format_name: str, columns: dict[str, str], line: int
) -> tuple[int | None, AnyExample | None, int | None]:
    """The first usable row at `line` or behind it, and the lines of the usable rows before and behind that."""
    start = max(1, line - NEAR_ROWS)
    found = _look_from(start, path, format_name, columns, line)
    if found[0] is None and start > 1:  # nothing usable near by: rows that were set aside in a row
        found = _look_from(1, path, format_name, columns, line)
    return found


def _look_from(
    start: int, path: Path, format_name: str, columns: dict[str, str], line: int
) -> tuple[int | None, AnyExample | None, int | None]:
    before: int | None = None
    wanted: AnyExample | None = None
    for example, _problems in read_rows(path, format_name, columns, start=start):
        if example is None:
            continue
        if wanted is not None:
            return before, wanted, example.line
        if example.line >= line:
            wanted = example
        else:
            before = example.line
    return before, wanted, None


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    try:
        return answer(request)
    except RecursionError as error:
        raise DatasetError(
            "The base model's chat template calls itself without end.",
            next_step="Choose a base model whose template renders.",
        ) from error


def main(arguments: list[str] | None = None) -> int:
    """Answers until standard input ends, or nothing is asked for a while."""
    parser = argparse.ArgumentParser(prog="python -m workers.previewing")
    parser.add_argument("--seconds", type=float, default=10.0, help="time for one request")
    add_memory_limit(parser)
    chosen = limited(parser, arguments)
    answer_lines(_answer, seconds=chosen.seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())

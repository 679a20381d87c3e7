"""A corrected copy of a dataset file: `python -m workers.repairing FILE --out OUT --format NAME`.

What has one plain remedy is remedied (CATALOGUE's `repair` says which), row by row; everything else stays as it is, so
that a row which only a person can mend is still there and still set aside. The copy is JSON Lines. Like an inspection
it runs in a process of its own with a limit on memory, and writes events: "change" for the first rows that were
changed, "progress", and "done" or "refused".
"""

from __future__ import annotations

import argparse
import ast
import difflib
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from workers.carriers import Row, jsonl_row, numbered_lines, open_rows, sniff
from workers.compression import open_unpacked
from workers.errors import ExplainedError
from workers.examples import Problem
from workers.formats import Format, get_format
from workers.formats._rules import CALL_ROLES, ROLE_ALIASES, from_text
from workers.inspection import MAX_COMPARED_ROWS
from workers.limited import PROGRESS_SECONDS, add_file, emit, limited, refusals_emitted
from workers.quality import CONTROLS, fingerprint
from workers.reading import read_row
from workers.strict_json import MAX_ROW_BYTES, excerpt_of

MAX_SHOWN = 50
MAX_SHOWN_CHARS = 2000
_ROUNDS = 8
_STEP = re.compile(r"([^.\[\]]+)|\[(\d+)\]")
_TRAILING_COMMA = re.compile(r",(\s*[}\]])")
_SHAREGPT_NAMES = {"user": "human", "assistant": "gpt", "tool": "observation"}


def repair_text(text: str) -> str | None:
    """Text that was UTF-8 and was read as Windows-1252, read rightly; None when it is not all of that kind."""
    try:
        return text.encode("cp1252").decode("utf-8")
    except (UnicodeEncodeError, UnicodeDecodeError):
        return None


def _usual_role(name: Any, key: str) -> str | None:
    if not isinstance(name, str):
        return None
    plain = name.strip().lower()
    if plain not in ROLE_ALIASES:
        near = difflib.get_close_matches(plain, [*ROLE_ALIASES, *CALL_ROLES], n=1, cutoff=0.8)
        if not near:
            return None
        plain = near[0]
    role = ROLE_ALIASES.get(plain, plain)
    return _SHAREGPT_NAMES.get(role, role) if key == "from" else role


def _number(value: Any) -> Any:
    return {"0": 0, "1": 1, "true": 1, "false": 0}.get(value.strip().lower()) if isinstance(value, str) else None


def _verdict(value: Any) -> bool | None:
    known = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}
    return known.get(str(value).strip().lower()) if isinstance(value, str | int) else None


_REMEDIES: dict[str, Callable[[Any, str], Any]] = {
    "F013": lambda value, _key: repair_text(value) if isinstance(value, str) else None,
    "F015": lambda value, _key: CONTROLS.sub("", value) if isinstance(value, str) else None,
    "F016": lambda value, _key: from_text(value) if isinstance(value, str) else None,
    "C101": _usual_role,
    "C106": lambda value, _key: _number(value),
    "C108": lambda value, _key: value.strip() if isinstance(value, str) else None,
    "C109": _usual_role,
    "K301": lambda value, _key: _verdict(value),
}
"""rule -> (value, its key) -> the value that is right, or None when there is none."""


def repair_row(row: dict[str, Any], plugin: Format, columns: dict[str, str]) -> tuple[dict[str, Any], list[str]]:
    """A row with its remedies, and the rules that they were for; the row itself when there is no remedy."""
    applied: list[str] = []
    for _ in range(_ROUNDS):
        _example, problems = read_row(Row(1, row), plugin, columns, remark=True)
        changed = orjson.loads(orjson.dumps(row))
        done = [problem.rule for problem in problems if _remedy(changed, problem)]
        if not done:
            break
        row = changed
        applied += done
    return row, applied


def _remedy(row: dict[str, Any], problem: Problem) -> bool:
    """Whether a problem could be remedied in its place."""
    remedy = _REMEDIES.get(problem.rule)
    if remedy is None or not problem.field:
        return False
    holder, key = _place(row, problem.field)
    if holder is None:
        return False
    try:
        better = remedy(holder[key], str(key))
    except (KeyError, IndexError, TypeError):
        return False
    if better is None or (better == holder[key] and type(better) is type(holder[key])):
        return False
    holder[key] = better
    return True


def _place(row: dict[str, Any], path: str) -> tuple[Any, Any]:
    """The list or object that a path's last step is in, and that step."""
    if path in row:
        return row, path
    steps = [int(index) if index else key for key, index in _STEP.findall(path)]
    holder: Any = row
    for step in steps[:-1]:
        is_key = isinstance(holder, dict) and step in holder
        is_index = isinstance(holder, list) and isinstance(step, int) and step < len(holder)
        if not is_key and not is_index:
            return None, None
        holder = holder[step]
    last = steps[-1] if steps else ""
    if isinstance(holder, dict) and last == "role" and "role" not in holder and "from" in holder:
        last = "from"
    return (holder, last) if isinstance(holder, dict | list) else (None, None)


def repair_line(raw: bytes) -> dict[str, Any] | None:
    """The object that a broken line of JSON Lines was meant to be; None when that is not plain."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        try:
            text = raw.decode("cp1252")
        except UnicodeDecodeError:
            return None
    text = text.strip().removesuffix(",").replace("\0", "").replace("\\u0000", "")
    if len(text) > MAX_ROW_BYTES // 8:
        return None
    found: Any = None
    for candidate in (text, _TRAILING_COMMA.sub(r"\1", text)):
        try:
            found = json.loads(candidate, parse_constant=lambda _name: None, object_pairs_hook=_without_repeats)
            break
        except (ValueError, RecursionError):
            continue
    if found is None:
        try:
            tree = ast.parse(text, mode="eval")
            if any(isinstance(node, ast.Dict) and _repeats_a_key(node) for node in ast.walk(tree)):
                return None
            found = ast.literal_eval(tree)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return None
    if isinstance(found, str):
        found = from_text(found)
    if isinstance(found, list) and found and isinstance(found[0], dict):
        found = {"conversations" if "from" in found[0] else "messages": found}
    if not isinstance(found, dict):
        return None
    try:  # what cannot be written and read again strictly is no remedy
        return found if isinstance(jsonl_row(1, 0, orjson.dumps(found)), Row) else None
    except (TypeError, orjson.JSONEncodeError):
        return None


def _repeats_a_key(node: ast.Dict) -> bool:
    keys = [key.value for key in node.keys if isinstance(key, ast.Constant)]
    return len(set(keys)) < len(keys)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found and found[key] != value:
            raise ValueError("two different values")
        found[key] = value
    return found


class Repairer:
    """Writes the corrected copy and counts what it does."""

    def __init__(self, out: BinaryIO, plugin: Format, columns: dict[str, str]) -> None:
        self._out = out
        self._plugin = plugin
        self._columns = columns
        self._seen: set[int] = set()
        self._shown_at = time.monotonic()
        self.num_rows = self.num_changed = self.num_repeated = self.num_left_out = 0
        self.counts: Counter[str] = Counter()

    def add(self, item: Row | Problem, raw: bytes | None) -> None:
        """One row, or what keeps it from being one; `raw` are its bytes where it is a line of its own."""
        self.num_rows += 1
        if time.monotonic() - self._shown_at > PROGRESS_SECONDS:
            self._shown_at = time.monotonic()
            emit("progress", stage="repair", num_rows=self.num_rows)
        if isinstance(item, Problem):
            self._add_broken(item, raw)
            return
        row, rules = repair_row(item.value, self._plugin, self._columns)
        example, _ = read_row(Row(item.line, row), self._plugin, self._columns, remark=False)
        if example is not None:
            mark = fingerprint(example)
            if mark in self._seen:
                self.num_repeated += 1
                self._show(item.line, ["Q501"], excerpt_of(row), "")
                return
            if len(self._seen) < MAX_COMPARED_ROWS:
                self._seen.add(mark)
        if rules:
            self._show(item.line, rules, _shown(item.value), _shown(row))
        is_same_line = raw is not None and not rules
        self._write(raw.rstrip(b"\r\n") if is_same_line and raw is not None else orjson.dumps(row))

    def _add_broken(self, problem: Problem, raw: bytes | None) -> None:
        mended = repair_line(raw) if raw is not None and len(raw) <= MAX_ROW_BYTES else None
        if mended is not None and raw is not None and problem.line is not None:
            row, rules = repair_row(mended, self._plugin, self._columns)
            self._show(problem.line, [problem.rule, *rules], excerpt_of(raw), _shown(row))
            self._write(orjson.dumps(row))
        elif raw is not None and len(raw) <= MAX_ROW_BYTES:
            self._write(raw.rstrip(b"\r\n"))
        elif problem.level == "error":
            self.num_left_out += 1

    def _show(self, line: int, rules: list[str], before: str, after: str) -> None:
        self.counts.update(rules)
        self.num_changed += 1
        if self.num_changed <= MAX_SHOWN:
            emit("change", line=line, rules=sorted(set(rules)), before=before, after=after)

    def _write(self, line: bytes) -> None:
        self._out.write(line + b"\n")


def _shown(row: dict[str, Any]) -> str:
    text = json.dumps(row, ensure_ascii=False, default=str)
    return text if len(text) <= MAX_SHOWN_CHARS else text[: MAX_SHOWN_CHARS - 1] + "…"


class NotWrittenError(ExplainedError):
    """The corrected file found no room, or its disk failed."""

    code = "not_written"


def repair_file(path: Path, out: Path, format_name: str, columns: dict[str, str]) -> None:
    """Write the corrected copy of a file. Raises DatasetError when the file cannot be read, OSError for a full disk."""
    plugin = get_format(format_name)
    with out.open("wb") as file:
        repairer = Repairer(file, plugin, columns)
        if sniff(path).partition(".")[0] == "jsonl":
            _repair_lines(path, repairer)
        else:
            for item in open_rows(path):
                repairer.add(item, None)
    emit(
        "done",
        num_rows=repairer.num_rows,
        num_changed=repairer.num_changed,
        num_repeated=repairer.num_repeated,
        num_left_out=repairer.num_left_out,
        counts=dict(repairer.counts),
    )


def _repair_lines(path: Path, repairer: Repairer) -> None:
    with open_unpacked(path) as file:
        for number, offset, raw in numbered_lines(file):
            item = jsonl_row(number, offset, raw)
            if item is not None:
                repairer.add(item, raw)


def main(arguments: list[str] | None = None) -> int:
    """0 after "done" or "refused"; anything else is a fault of ours, or a limit that struck."""
    parser = argparse.ArgumentParser(prog="python -m workers.repairing")
    add_file(parser)
    parser.add_argument("--out", type=Path, required=True)
    chosen = limited(parser, arguments)
    with refusals_emitted():
        try:
            repair_file(chosen.file, chosen.out, chosen.format, chosen.columns)
        except OSError as error:
            raise NotWrittenError(
                f"The corrected file could not be written: {error.strerror}.",
                next_step="Free disk space, and try again.",
            ) from error
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Columns chosen by a person, or guessed: any column as the prompt, any as the answer.

A column may lie inside a row's lists and objects: `instances[0].output`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import orjson

from workers.examples import AnyExample, Example, Message, Problem
from workers.formats import Format
from workers.formats._beside import media_beside
from workers.formats._rules import check_text, missing_fields
from workers.row_paths import MISSING, leaves_of, value_at
from workers.strict_json import excerpt_of

_PAIRS = (
    ("question", "answer"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("input", "target"),
    ("input", "output"),
    ("prompt", "response"),
    ("prompt", "completion"),
    ("question", "response"),
    ("query", "response"),
    ("query", "answer"),
    ("question", "ground_truth"),
    ("source", "target"),
    ("text", "summary"),
    ("document", "summary"),
    ("article", "summary"),
    ("problem", "solution"),
    ("context", "response"),
    ("inputs", "targets"),
    ("user", "assistant"),
    ("human", "assistant"),
    ("q", "a"),
)
_ASKED = ("prompt", "completion")
_SYSTEMS = ("system", "system_prompt", "system_message")
_CONTEXTS = ("context", "input", "passage", "background")
_PROMPT_WORDS = ("prompt", "question", "instruction", "input", "query", "user", "source", "problem", "text", "request")
_ANSWER_WORDS = (
    "answer",
    "completion",
    "response",
    "output",
    "target",
    "truth",
    "reply",
    "assistant",
    "solution",
    "summary",
)


class Mapped(Format):
    name = "mapped"
    label = "Columns"
    help = "Any table or list of objects: choose the column that asks and the column that answers."
    fields = {
        "prompt": "Prompt (what is asked)",
        "context": "Added to the prompt",
        "more_context": "Added to the prompt, too",
        "completion": "Answer (what is learned)",
        "system": "System message",
    }
    required_fields = ("prompt", "completion")

    def recognise(self, head: Sequence[dict[str, Any]]) -> tuple[float, dict[str, str]]:
        """0.9 for a pair of column names that the field uses, 0.45 for one inside a row's lists and objects, 0.4 for a
        guess by words, 0.2 by position."""
        filled: dict[str, int] = {}
        for row in head:
            for path, value in leaves_of(row):
                if isinstance(value, str):
                    filled[path] = filled.get(path, 0) + bool(value.strip())
        counts = {path: num for path, num in filled.items() if num}
        top = {_plain(path): path for path in reversed(counts) if not _is_inside(path)}
        leaves = {_plain(path.rpartition(".")[2]): path for path in reversed(counts) if _is_inside(path)}
        system = next((top[name] for name in _SYSTEMS if name in top), None)
        extra = {"system": system} if system else {}
        for names, confidence in ((top, 0.9), ({**leaves, **top}, 0.45)):
            for prompt, answer in _PAIRS:
                if prompt in names and answer in names:
                    columns = {"prompt": names[prompt], "completion": names[answer], **extra}
                    context = next((names[one] for one in _CONTEXTS if one in names and one != prompt), None)
                    columns |= {"context": context} if context else {}
                    has_both = [all(value_at(row, columns[one]) is not MISSING for one in _ASKED) for row in head]
                    return confidence * sum(has_both) / len(head), columns
        return _guess([name for name in counts if name != system], extra)

    def parse(self, row: dict[str, Any], line: int, columns: dict[str, str]) -> tuple[AnyExample | None, list[Problem]]:
        """The chosen columns as system, user and assistant turns. Numbers become text as JSON writes them.

        What is added to the prompt follows it after a blank line each, where a row has it.
        """
        chosen = {field: value_at(row, columns.get(field, "")) for field in _ASKED}
        if all(value is MISSING for value in chosen.values()):
            return None, [missing_fields(row, [columns.get(field, field) for field in chosen], line, "these columns")]
        problems: list[Problem] = media_beside(row, line)
        texts: dict[str, str] = {}
        for field in ("context", "more_context", "system"):
            if columns.get(field) and (value := value_at(row, columns[field])) is not MISSING and value is not None:
                chosen[field] = value
        for field, value in chosen.items():
            column = columns.get(field, field)
            cell = {} if value is MISSING else {column: _as_text(value)}
            texts[field], problem = check_text(cell, column, line, may_be_empty=field not in _ASKED)
            if problem:
                excerpt = excerpt_of(row) if value is MISSING or not value else problem.excerpt
                problems.append(
                    Problem(problem.rule, problem.message, problem.fix, line=line, field=column[:120], excerpt=excerpt)
                )
        if problems:
            return None, problems
        before = (Message("system", texts["system"]),) if texts.get("system", "").strip() else ()
        added = [texts[field] for field in ("context", "more_context") if texts.get(field, "").strip()]
        prompt = "\n\n".join([texts["prompt"], *added])
        return Example(line, (*before, Message("user", prompt), Message("assistant", texts["completion"]))), []


def _is_inside(path: str) -> bool:
    return "." in path or "[" in path


def _plain(name: str) -> str:
    return re.sub(r"[\s\-]+", "_", name.strip().lower())


def _guess(names: list[str], extra: dict[str, str]) -> tuple[float, dict[str, str]]:
    if len(names) < 2:
        return 0.0, {}
    answer = next((name for word in _ANSWER_WORDS for name in names if word in name.lower()), None)
    prompt = next((name for word in _PROMPT_WORDS for name in names if word in name.lower() and name != answer), None)
    if prompt and answer:
        return 0.4, {"prompt": prompt, "completion": answer, **extra}
    answer = answer or next(name for name in reversed(names) if name != prompt)
    prompt = prompt or next(name for name in names if name != answer)
    return 0.2, {"prompt": prompt, "completion": answer, **extra}


def _as_text(value: Any) -> Any:
    """Numbers as JSON writes them; everything else as it is."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return orjson.dumps(value).decode()
    return value


PLUGIN = Mapped()

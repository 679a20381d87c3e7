"""Alpaca: an instruction, an input that may be empty, and an output.

The prompt is the instruction, then a blank line and the input when there is one. No "Below is an
instruction" frame is put around it: the base model's own chat template frames it. `history` gives earlier
turns as [user, assistant] pairs and `system` a system message (LLaMA-Factory's extensions).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from workers.examples import AnyExample, Example, Message, Problem
from workers.formats import Format
from workers.formats._beside import read_beside
from workers.formats._rules import check_text, is_plain, row_of_other, share
from workers.strict_json import excerpt_of, type_name

_ANSWERS = ("output", "response", "completion", "answer")


class Alpaca(Format):
    name = "alpaca"
    label = "Alpaca (instruction, input, output)"
    help = (
        'Rows like {"instruction": "...", "input": "...", "output": "..."}; input may be empty or called context, '
        "output may be called response. The prompt is the instruction, a blank line and the input."
    )

    def recognise(self, head: Sequence[dict[str, Any]]) -> tuple[float, dict[str, str]]:
        """Sure when rows have an instruction and an answer column; the mapping names the answer column."""
        plain = [row for row in head if is_plain(row)]
        if not plain:
            return 0.0, {}
        answer = max(_ANSWERS, key=lambda name: share(plain, "instruction", name))
        return 0.97 * share(plain, "instruction", answer) * len(plain) / len(head), {"output": answer}

    def parse(self, row: dict[str, Any], line: int, columns: dict[str, str]) -> tuple[AnyExample | None, list[Problem]]:
        """instruction, input, output, system and history as turns."""
        answer_column = columns.get("output", "output")
        if answer_column not in row:
            answer_column = next((name for name in _ANSWERS if name in row), answer_column)
        if "instruction" not in row and answer_column not in row:
            return None, [row_of_other(row, ("instruction", answer_column), line, self.name, self.label)]
        system, tools, problems = read_beside(row, line)
        instruction, problem = check_text(row, "instruction", line)
        problems += [problem] if problem else []
        answer, problem = check_text(row, answer_column, line)
        problems += [problem] if problem else []
        context = ""
        # Dolly's rows call it context.
        context_column = "input" if "input" in row else "context"
        if row.get(context_column) is not None:
            context, problem = check_text(row, context_column, line, may_be_empty=True)
            problems += [problem] if problem else []
        history = row.get("history")
        messages = [Message("system", system)] if system.strip() else []
        if history:
            earlier, found = read_history(history, line)
            messages += earlier
            problems += found
        if problems:
            return None, problems
        prompt = f"{instruction}\n\n{context}" if context.strip() else instruction
        messages += [Message("user", prompt), Message("assistant", answer)]
        return Example(line, tuple(messages), tools), []


def read_history(history: Any, line: int) -> tuple[list[Message], list[Problem]]:
    """Earlier turns, given as [user text, assistant text] pairs."""
    messages: list[Message] = []
    if not isinstance(history, list):
        return [], [_not_a_pair(history, line, "history")]
    for index, pair in enumerate(history):
        is_pair = isinstance(pair, list) and len(pair) == 2 and all(isinstance(t, str) and t.strip() for t in pair)
        if not is_pair:
            return [], [_not_a_pair(pair, line, f"history[{index}]")]
        messages += [Message("user", pair[0]), Message("assistant", pair[1])]
    return messages, []


def _not_a_pair(value: Any, line: int, field: str) -> Problem:
    return Problem(
        "C102",
        f'Line {line}: "{field}" is {type_name(value)}, where [user text, assistant text] pairs belong.',
        'Write history as [["question", "answer"], ...].',
        line=line,
        field=field,
        excerpt=excerpt_of(value),
    )


PLUGIN = Alpaca()

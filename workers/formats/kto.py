"""Unpaired answers with a verdict (KTO): is this answer wanted, or not?

TRL and Axolotl: prompt (or question, or instruction), completion, label. LLaMA-Factory: Alpaca's or ShareGPT's fields
with kto_tag, of which the last answer is judged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from workers.examples import AnyExample, Example, ExampleType, Message, Problem, UnpairedExample
from workers.formats import Format
from workers.formats._beside import read_beside
from workers.formats._conversations import check_conversation, context_only
from workers.formats._rules import has_verdict, row_of_other
from workers.formats._sides import read_side
from workers.formats.alpaca import PLUGIN as ALPACA
from workers.strict_json import excerpt_of

_PROMPTS = ("prompt", "question", "instruction")
_TURNS = ("messages", "conversations", "conversation")


class Kto(Format):
    name = "kto"
    label = "Answers with a verdict (KTO)"
    help = (
        'Rows like {"prompt": "...", "completion": "...", "label": true}, or Alpaca and ShareGPT rows with "kto_tag".'
    )
    example_type: ExampleType = "unpaired"

    def recognise(self, head: Sequence[dict[str, Any]]) -> tuple[float, dict[str, str]]:
        """Sure when rows have an answer and a verdict."""
        return sum(has_verdict(row) for row in head) / len(head), {}

    def parse(self, row: dict[str, Any], line: int, columns: dict[str, str]) -> tuple[AnyExample | None, list[Problem]]:
        """The prompt, the answer and the verdict."""
        key = "kto_tag" if "kto_tag" in row else "label"
        prompt_field = next((name for name in _PROMPTS if name in row), None)
        turns_field = next((name for name in _TURNS if name in row), None)
        if key not in row and "completion" not in row:
            return None, [row_of_other(row, ("completion", "label"), line, self.name, self.label)]
        label, problems = _read_label(row, key, line)
        messages, tools, found = _read_messages(row, prompt_field, turns_field, line)
        problems += found
        if any(problem.level == "error" for problem in problems):
            return None, problems
        problems += check_conversation(messages, line, turns_field or "completion", tools=tools)
        if any(problem.level == "error" for problem in problems):
            return None, problems
        last = max(index for index, message in enumerate(messages) if message.role == "assistant")
        return UnpairedExample(line, context_only(messages[:last]), messages[last : last + 1], label, tools), problems


def _read_messages(
    row: dict[str, Any], prompt_field: str | None, turns_field: str | None, line: int
) -> tuple[tuple[Message, ...], str, list[Problem]]:
    if turns_field is None and "completion" not in row:
        example, problems = ALPACA.parse(row, line, {})
        if not isinstance(example, Example):
            return (), "", problems
        return example.messages, example.tools, problems
    system, tools, problems = read_beside(row, line)
    before = (Message("system", system),) if system.strip() else ()
    if turns_field is not None and "completion" not in row:
        turns, found = read_side(row, turns_field, "user", line)
        return (*before, *turns), tools, [*problems, *found]
    prompt, found = read_side(row, prompt_field or "prompt", "user", line)
    completion, more = read_side(row, "completion", "assistant", line)
    return (*before, *context_only(prompt), *completion), tools, [*problems, *found, *more]


def _read_label(row: dict[str, Any], key: str, line: int) -> tuple[bool, list[Problem]]:
    value = row.get(key)
    if isinstance(value, bool):
        return value, []
    what = f"is {excerpt_of(value)}, where true or false belongs" if key in row else "is missing"
    return False, [
        Problem(
            "K301",
            f'Line {line}: the verdict "{key}" {what}.',
            "Write true for an answer that is wanted and false for one that is not.",
            line=line,
            field=key,
            excerpt=excerpt_of(row),
        )
    ]


PLUGIN = Kto()

"""Prompt and completion: one turn each, as text or (TRL's dialect) as lists of chat messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from workers.examples import AnyExample, Example, Message, Problem
from workers.formats import Format
from workers.formats._beside import read_beside
from workers.formats._conversations import check_conversation, context_only
from workers.formats._rules import is_plain, row_of_other
from workers.formats._sides import read_side


class PromptCompletion(Format):
    name = "prompt_completion"
    label = "Prompt and completion"
    help = 'Rows like {"prompt": "...", "completion": "..."}, each a text or a list of chat messages.'

    def recognise(self, head: Sequence[dict[str, Any]]) -> tuple[float, dict[str, str]]:
        """Sure when rows have a prompt and a completion, and no verdict on it."""
        return sum("prompt" in row and "completion" in row and is_plain(row) for row in head) / len(head), {}

    def parse(self, row: dict[str, Any], line: int, columns: dict[str, str]) -> tuple[AnyExample | None, list[Problem]]:
        """The prompt as the user's turn and the completion as the assistant's; `system` and `tools` are optional."""
        if "prompt" not in row and "completion" not in row:
            return None, [row_of_other(row, ("prompt", "completion"), line, self.name, self.label)]
        system, tools, problems = read_beside(row, line)
        prompt, found = read_side(row, "prompt", "user", line)
        problems += found
        completion, found = read_side(row, "completion", "assistant", line)
        problems += found
        if any(problem.level == "error" for problem in problems):
            return None, problems
        before = (Message("system", system),) if system.strip() else ()
        # Of lists of messages, only the completion's turns are learned.
        messages = (*before, *context_only(prompt), *completion)
        paths = [*["system"] * len(before), *(f"prompt[{i}]" for i in range(len(prompt))),
                 *(f"completion[{i}]" for i in range(len(completion)))]  # fmt: skip
        problems += check_conversation(messages, line, "completion", paths=paths, tools=tools)
        is_broken = any(problem.level == "error" for problem in problems)
        return (None if is_broken else Example(line, messages, tools)), problems


PLUGIN = PromptCompletion()

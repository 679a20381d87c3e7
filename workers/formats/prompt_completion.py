"""Prompt and completion: one turn each, as text or (TRL's dialect) as lists of chat messages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from workers.examples import Example, Message, Problem
from workers.formats import Format
from workers.formats._conversations import read_turns
from workers.formats._rules import check_text, missing_fields, share


class PromptCompletion(Format):
    name = "prompt_completion"
    label = "Prompt and completion"
    help = 'Rows like {"prompt": "...", "completion": "..."}, each a text or a list of chat messages.'

    def recognise(self, head: Sequence[dict[str, Any]]) -> tuple[float, dict[str, str]]:
        """Sure when rows have a prompt and a completion."""
        return share(head, "prompt", "completion"), {}

    def parse(self, row: dict[str, Any], line: int, columns: dict[str, str]) -> tuple[Example | None, list[Problem]]:
        """The prompt as the user's turn and the completion as the assistant's; `system` is optional."""
        if "prompt" not in row and "completion" not in row:
            return None, [missing_fields(row, ("prompt", "completion"), line, self.label)]
        if isinstance(row.get("prompt"), list) and isinstance(row.get("completion"), list):
            return _read_messages(row, line)
        prompt, no_prompt = check_text(row, "prompt", line)
        completion, no_completion = check_text(row, "completion", line)
        system, no_system = "", None
        if row.get("system") is not None:
            system, no_system = check_text(row, "system", line, may_be_empty=True)
        problems = [problem for problem in (no_prompt, no_completion, no_system) if problem]
        if problems:
            return None, problems
        before = (Message("system", system),) if system.strip() else ()
        return Example(line, (*before, Message("user", prompt), Message("assistant", completion))), []


def _read_messages(row: dict[str, Any], line: int) -> tuple[Example | None, list[Problem]]:
    """Lists of messages: only the completion's turns are learned."""
    turns = [*row["prompt"], *row["completion"]]
    split = len(row["prompt"])
    paths = [f"prompt[{i}]" if i < split else f"completion[{i - split}]" for i in range(len(turns))]
    example, problems = read_turns(turns, line, field="completion", paths=paths)
    if example is None:
        return None, problems
    messages = tuple(
        replace(message, train=False) if index < split and message.role == "assistant" else message
        for index, message in enumerate(example.messages)
    )
    return Example(line, messages), problems


PLUGIN = PromptCompletion()

"""Preference pairs: a prompt with a chosen and a rejected answer, in the dialects of the tools that learn from them.

| who | fields |
| --- | --- |
| TRL | prompt, chosen, rejected: texts or lists of turns; without a prompt, what both sides begin with is the prompt |
| OpenAI, Together | input {messages, tools}, preferred_output, non_preferred_output (older: ..._completion) |
| LLaMA-Factory | instruction, input, chosen, rejected; or conversations, chosen, rejected with {from, value} |
| Axolotl, Argilla | messages or question or input, chosen, rejected; instruction, chosen_response, rejected_response |
| torchtune | chosen_conversations, rejected_conversations |
| AutoTrain | prompt, text, rejected_text |
| Nectar | prompt, answers [{answer, rank}]: the best and the worst rank |
| Anthropic's HH | chosen, rejected as "\\n\\nHuman: ...\\n\\nAssistant: ..." |
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from workers.examples import AnyExample, ExampleType, Message, PreferenceExample, Problem
from workers.formats import Format
from workers.formats._beside import read_beside
from workers.formats._conversations import check_calls, check_conversation, context_only
from workers.formats._rules import row_of_other
from workers.formats._sides import read_side
from workers.formats._tools import read_tools
from workers.formats.alpaca import read_history
from workers.strict_json import excerpt_of

_SIDES = (
    ("chosen", "rejected"),
    ("preferred_output", "non_preferred_output"),
    ("preferred_completion", "non_preferred_completion"),
    ("chosen_response", "rejected_response"),
    ("chosen_conversations", "rejected_conversations"),
    ("text", "rejected_text"),
)
_PROMPTS = ("prompt", "messages", "conversations", "instruction", "question", "query", "input")
_SPOKEN = re.compile(r"\n\n(Human|Assistant):")


class Preference(Format):
    name = "preference"
    label = "Preference pairs (chosen, rejected)"
    help = (
        'Rows like {"prompt": "...", "chosen": "...", "rejected": "..."}, each a text or a list of turns, and the '
        "dialects of TRL, OpenAI, LLaMA-Factory, Axolotl, Argilla and torchtune."
    )
    example_type: ExampleType = "preference"

    def recognise(self, head: Sequence[dict[str, Any]]) -> tuple[float, dict[str, str]]:
        """Sure when rows have both sides of a pair, or ranked answers."""
        return sum(_sides(row) is not None or _is_ranked(row) for row in head) / len(head), {}

    def parse(self, row: dict[str, Any], line: int, columns: dict[str, str]) -> tuple[AnyExample | None, list[Problem]]:
        """The prompt and both answers."""
        if _is_ranked(row):
            row, ranks = _best_and_worst(row, line)
            if ranks:
                return None, [ranks]
        sides = _sides(row) or next(((a, b) for a, b in _SIDES if b in row or (a in row and a != "text")), None)
        if sides is None:
            return None, [row_of_other(row, ("chosen", "rejected"), line, self.name, self.label)]
        system, tools, problems = read_beside(row, line)
        prompt, tools, found = _read_prompt(row, system, tools, line)
        problems += found
        answers: list[tuple[Message, ...]] = []
        for field in sides:
            if row.get(field) in (None, "", [], {}):
                problems.append(_missing(row, field, line))
                continue
            answer, found = _read_answer(row, field, line)
            problems += found
            answers.append(answer)
        if any(problem.level == "error" for problem in problems):
            return None, problems
        chosen, rejected = answers
        return _pair(prompt, chosen, rejected, sides, tools, line, problems)


def _sides(row: dict[str, Any]) -> tuple[str, str] | None:
    return next((pair for pair in _SIDES if pair[0] in row and pair[1] in row), None)


def _missing(row: dict[str, Any], field: str, line: int) -> Problem:
    return Problem(
        "P201",
        f'Line {line} has no "{field}", so there is nothing to compare.',
        "Give both answers, or remove the row.",
        line=line,
        field=field,
        excerpt=excerpt_of(row),
    )


def _is_ranked(row: dict[str, Any]) -> bool:
    answers = row.get("answers")
    return isinstance(answers, list) and bool(answers) and isinstance(answers[0], dict) and "rank" in answers[0]


def _best_and_worst(row: dict[str, Any], line: int) -> tuple[dict[str, Any], Problem | None]:
    """The row with the answers of the best (lowest) and the worst rank as its sides."""
    ranked = [
        (one["rank"], one.get("answer"))
        for one in row["answers"]
        if isinstance(one, dict) and isinstance(one.get("rank"), int | float) and not isinstance(one["rank"], bool)
    ]
    ranked.sort(key=lambda one: one[0])
    if len(ranked) < len(row["answers"]) or ranked[0][0] == ranked[-1][0]:
        return row, Problem(
            "P205",
            f'Line {line}: the ranks of "answers" do not say which answer is better.',
            "Give each answer a number as its rank, 1 for the best, and at least two different ones.",
            line=line,
            field="answers",
            excerpt=excerpt_of(row["answers"]),
        )
    return {**row, "chosen": ranked[0][1], "rejected": ranked[-1][1]}, None


def _read_prompt(
    row: dict[str, Any], system: str, tools: str, line: int
) -> tuple[tuple[Message, ...], str, list[Problem]]:
    """The turns before the answer, of whichever field holds them; none is no problem yet."""
    before = (Message("system", system),) if system.strip() else ()
    problems: list[Problem] = []
    given = row.get("input")
    if isinstance(given, dict) and "messages" in given:
        if "tools" in given or "functions" in given:
            tools, problems = read_tools(given, line)
        turns, found = read_side(given, "messages", "user", line, path="input.messages")
        return (*before, *context_only(turns)), tools, [*problems, *found]
    field = next((name for name in _PROMPTS if row.get(name) not in (None, "", [])), None)
    if field is None:
        return before, tools, []
    if row.get("history"):
        earlier, problems = read_history(row["history"], line)
        before = (*before, *context_only(earlier))
    turns, found = read_side(row, field, "user", line)
    if field == "instruction" and isinstance(given, str) and given.strip() and turns:
        turns = (Message("user", f"{turns[0].content}\n\n{given}"),)
    return (*before, *context_only(turns)), tools, [*problems, *found]


def _read_answer(row: dict[str, Any], field: str, line: int) -> tuple[tuple[Message, ...], list[Problem]]:
    value = row[field]
    if isinstance(value, str) and value.startswith("\n\nHuman:"):
        return _spoken(value), []
    return read_side(row, field, "assistant", line)


def _spoken(text: str) -> tuple[Message, ...]:
    """Turns of "\\n\\nHuman: ...\\n\\nAssistant: ..."."""
    pieces = _SPOKEN.split(text)[1:]
    pairs = zip(pieces[::2], pieces[1::2], strict=True)
    return tuple(Message("user" if who == "Human" else "assistant", said.strip()) for who, said in pairs)


def _pair(
    prompt: tuple[Message, ...], chosen: tuple[Message, ...], rejected: tuple[Message, ...], sides: tuple[str, str],
    tools: str, line: int, problems: list[Problem],
) -> tuple[AnyExample | None, list[Problem]]:  # fmt: skip
    """The example, once what both sides begin with is moved into the prompt."""

    def error(rule: str, message: str, fix: str, field: str) -> None:
        where = chosen if field == sides[0] else rejected
        problems.append(
            Problem(rule, message, fix, line=line, field=field, excerpt=excerpt_of(where[-1].content if where else ""))
        )

    if chosen == rejected:
        error(
            "P202", f'Line {line}: "{sides[0]}" and "{sides[1]}" are equal.', "Remove the row: it says nothing.",
            sides[1],
        )  # fmt: skip
        return None, problems
    if chosen[0].role != "assistant" or rejected[0].role != "assistant":
        shared = _shared(chosen, rejected)
        if not shared or (any(one.role == "user" for one in prompt) and not _ends_alike(prompt, shared)):
            error(
                "P203", f'Line {line}: "{sides[0]}" and "{sides[1]}" do not answer the same prompt.',
                "Give both sides the same turns before their answer, and the same as the prompt's.", sides[1],
            )  # fmt: skip
            return None, problems
        lead = tuple(one for one in prompt if one.role == "system") if shared[0].role != "system" else ()
        prompt = (*lead, *context_only(shared))
        chosen, rejected = chosen[len(shared) :], rejected[len(shared) :]
    elif not any(one.role == "user" for one in prompt):
        texts = _common_start(chosen[0].content, rejected[0].content)
        cut = max(texts.rfind(" "), texts.rfind("\n")) + 1
        if not texts[:cut].strip() or len(chosen) > 1 or len(rejected) > 1:
            error(
                "P203", f"Line {line} has no prompt, and its sides begin differently.",
                'Add the "prompt" that both sides answer.', sides[1],
            )  # fmt: skip
            return None, problems
        prompt = (*prompt, Message("user", texts[:cut].rstrip()))
        chosen = (Message("assistant", chosen[0].content[cut:]),)
        rejected = (Message("assistant", rejected[0].content[cut:]),)
    for field, answer in zip(sides, (chosen, rejected), strict=True):
        if not answer or answer[0].role != "assistant" or answer[-1].role != "assistant" or not _says_something(answer):
            error(
                "P206", f'Line {line}: "{field}" holds no answer of the assistant.',
                "End each side with the assistant's turn.", field,
            )  # fmt: skip
    if any(problem.level == "error" for problem in problems):
        return None, problems
    problems += check_conversation((*prompt, *chosen), line, sides[0], tools=tools)
    if any(one.tool_calls for one in rejected):
        turns = (*prompt, *rejected)
        problems += check_calls(turns, line, [sides[1]] * len(turns), tools)
    if any(problem.level == "error" for problem in problems):
        return None, problems
    return PreferenceExample(line, prompt, chosen, rejected, tools), problems


def _common_start(one: str, other: str) -> str:
    num = 0
    for num, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return one[:num]
    return one[: num + 1] if one and other else ""


def _says_something(answer: tuple[Message, ...]) -> bool:
    return any(one.tool_calls or one.content.strip() for one in answer)


def _shared(chosen: tuple[Message, ...], rejected: tuple[Message, ...]) -> tuple[Message, ...]:
    """The turns that both sides begin with, up to the last that is not the assistant's."""
    num = 0
    for one, other in zip(chosen, rejected, strict=False):
        if one != other:
            break
        num += 1
    while num and chosen[num - 1].role == "assistant":
        num -= 1
    return chosen[:num]


def _ends_alike(prompt: tuple[Message, ...], shared: tuple[Message, ...]) -> bool:
    return any(one.content.strip() == prompt[-1].content.strip() for one in shared)


PLUGIN = Preference()

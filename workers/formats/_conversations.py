"""Lists of turns, whatever their keys are called, as an Example: the rules of conversations live here."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from workers.examples import Example, Message, Problem
from workers.formats._rules import ROLE_ALIASES, check_text, unknown_role
from workers.strict_json import excerpt_of, type_name

MIN_WEIGHT, MAX_WEIGHT = 0.001, 1000
"""Least and largest weight of a turn that is learned; outside, one turn or all others would vanish in float32."""


def read_turns(
    turns: Any,
    line: int,
    *,
    field: str,
    role_key: str = "role",
    content_key: str = "content",
    paths: Sequence[str] | None = None,
    system: str = "",
) -> tuple[Example | None, list[Problem]]:
    """The conversation in a list of turns, or everything that is wrong with it.

    Args:
        turns: what the row holds where its turns should be.
        line: the row's line.
        field: name of the row's field that holds the turns.
        role_key: key of a turn's role.
        content_key: key of a turn's text.
        paths: what to call each turn in sentences; `field[i]` when not given.
        system: a system message that stands beside the turns.
    """
    if not isinstance(turns, list) or not turns:
        what = "an empty list" if turns == [] else type_name(turns)
        return None, [
            Problem(
                "C102",
                f'Line {line}: "{field}" is {what}, where a list of turns belongs.',
                f'Write "{field}": [{{"{role_key}": "user", "{content_key}": "..."}}, ...].',
                line=line,
                field=field,
                excerpt=excerpt_of(turns),
            )
        ]
    problems: list[Problem] = []
    messages: list[Message] = [Message("system", system)] if system.strip() else []
    for index, turn in enumerate(turns):
        message, found = _read_turn(turn, line, paths[index] if paths else f"{field}[{index}]", role_key, content_key)
        problems += found
        if message:
            messages.append(message)
    if problems:
        return None, problems
    return _check_conversation(tuple(messages), line, field)


def _read_turn(
    turn: Any, line: int, path: str, role_key: str, content_key: str
) -> tuple[Message | None, list[Problem]]:
    if not isinstance(turn, dict):
        problem = Problem(
            "C102",
            f'Line {line}: "{path}" is {type_name(turn)}, where an object with "{role_key}" and '
            f'"{content_key}" belongs.',
            f'Write it as {{"{role_key}": "user", "{content_key}": "..."}}.',
            line=line,
            field=path,
            excerpt=excerpt_of(turn),
        )
        return None, [problem]
    problems: list[Problem] = []
    name = turn.get(role_key)
    role = ROLE_ALIASES.get(name) or ROLE_ALIASES.get(name.strip().lower()) if isinstance(name, str) else None
    if role_key not in turn:
        problems.append(
            Problem(
                "C101",
                f'Line {line}: "{path}" has no "{role_key}".',
                "Say who speaks: system, user, assistant or tool.",
                line=line,
                field=f"{path}.{role_key}",
                excerpt=excerpt_of(turn),
            )
        )
    elif role is None and name != "function_call":
        problems.append(unknown_role(name, line, path))
    if turn.get("tool_calls") or turn.get("function_call") or name == "function_call":
        problems.append(
            Problem(
                "C107",
                f'Line {line}: "{path}" calls a tool, and tool calls are not yet learned.',
                "Remove the row, or write the call as the turn's text.",
                line=line,
                field=f"{path}.tool_calls",
                excerpt=excerpt_of(turn),
            )
        )
        return None, problems
    content, bad_content = check_text(turn, content_key, line, path=f"{path}.{content_key}")
    train, weight, bad_weight = _read_weight(turn, line, path)
    problems += [problem for problem in (bad_content, bad_weight) if problem]
    if problems or role is None:
        return None, problems
    if role != "assistant":
        train, weight = None, 1.0
    return Message(role, content, train, weight), []  # type: ignore[arg-type]


def _read_weight(turn: dict[str, Any], line: int, path: str) -> tuple[bool | None, float, Problem | None]:
    """Whether a turn says itself that it is learned, and how much it counts.

    OpenAI's `weight` is 0 or 1; we take any number from 0 to MAX_WEIGHT. Axolotl's `train` is true or false.
    """
    key = "weight" if "weight" in turn else "train"
    value = turn.get(key)
    if value is None:
        return None, 1.0, None
    if isinstance(value, bool) or value in (0, 1):
        return bool(value), 1.0, None
    # A comparison that NaN fails, and that a number too large for a float does not break.
    if key == "weight" and isinstance(value, int | float) and MIN_WEIGHT <= value <= MAX_WEIGHT:
        return True, float(value), None
    allowed = f"0 (not learned) or from {MIN_WEIGHT} to {MAX_WEIGHT}" if key == "weight" else "true or false"
    return (
        None,
        1.0,
        Problem(
            "C106",
            f'Line {line}: "{path}.{key}" is {excerpt_of(value)}; it can be {allowed}.',
            "Write 0 or 1, another number for a turn that counts less or more, or leave it out.",
            line=line,
            field=f"{path}.{key}",
            excerpt=excerpt_of(turn),
        ),
    )


def _check_conversation(messages: tuple[Message, ...], line: int, field: str) -> tuple[Example | None, list[Problem]]:
    roles: list[str] = [message.role for message in messages]

    def error(rule: str, message: str, fix: str) -> tuple[None, list[Problem]]:
        excerpt = excerpt_of(messages[-1].content)
        return None, [Problem(rule, message, fix, line=line, field=field, excerpt=excerpt)]

    if "assistant" not in roles and roles[-1] == "user":
        return error(
            "C103",
            f'Line {line}: "{field}" ends with a user turn, so there is nothing to learn.',
            "Add a reply or remove the line.",
        )
    if "assistant" not in roles:
        return error(
            "C103", f'Line {line}: "{field}" has no assistant turn, so there is nothing to learn.', "Add a reply."
        )
    if "user" not in roles[: _last(roles, "assistant")]:
        return error(
            "C103",
            f'Line {line}: "{field}" has no user turn before its assistant turn, so there is nothing to reply to.',
            "Add the question that is answered.",
        )
    if all(message.train is False for message in messages if message.role == "assistant"):
        return error(
            "C106",
            f'Line {line}: every assistant turn of "{field}" has weight 0, so there is nothing to learn.',
            "Give at least one of them weight 1, or remove the line.",
        )
    return Example(line, messages), _unusual_order(roles, line, field)


def _unusual_order(roles: list[str], line: int, field: str) -> list[Problem]:
    def warning(rule: str, message: str, fix: str) -> Problem:
        return Problem(rule, f"Line {line}: {message}", fix, line=line, field=field, level="warning")

    found: list[Problem] = []
    if roles[-1] == "user":
        found.append(
            warning("C104", f'"{field}" ends with a user turn, from which nothing is learned.', "Add a reply to it.")
        )
    spoken = [role for role in roles if role != "system"]
    repeats = next((role for role, after in pairwise(spoken) if role == after and role != "tool"), None)
    if repeats:
        found.append(
            warning(
                "C104",
                f'"{field}" has two {repeats} turns in a row, which some chat templates refuse.',
                "Join them into one turn.",
            )
        )
    if spoken and spoken[0] == "assistant":
        found.append(
            warning(
                "C104", f'"{field}" starts with an assistant turn.', "Start with the user's turn, where there is one."
            )
        )
    if "system" in roles[1:]:
        found.append(
            warning(
                "C105",
                f'"{field}" has a system message that is not the first turn, which some chat templates refuse.',
                "Put it first, once.",
            )
        )
    return found


def _last(roles: list[str], role: str) -> int:
    return len(roles) - 1 - roles[::-1].index(role)

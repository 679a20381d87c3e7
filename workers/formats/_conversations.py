"""Lists of turns, whatever their keys are called, as messages: the rules of conversations live here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from workers.examples import Example, Message, Problem, ToolCall
from workers.formats._beside import MEDIA, read_beside
from workers.formats._rules import CALL_ROLES, ROLE_ALIASES, check_text, from_text, unknown_role
from workers.formats._tools import read_arguments, tool_names
from workers.strict_json import excerpt_of, type_name

MIN_WEIGHT, MAX_WEIGHT = 0.001, 1000
"""Least and largest weight of a turn that is learned; outside, one turn or all others would vanish in float32."""

_REASONING = ("reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True)
class Dialect:
    """What the keys of a turn are called, and which names of roles are usual there; the others are remarked on."""

    role_keys: tuple[str, ...]
    content_keys: tuple[str, ...]
    roles: frozenset[str]


CHAT = Dialect(
    ("role", "from"),
    ("content", "value", "text"),
    frozenset({"system", "developer", "user", "assistant", "tool", "function"}),
)
SHAREGPT = Dialect(
    ("from", "role"), ("value", "content", "text"), frozenset({*ROLE_ALIASES, *CALL_ROLES} - {"prompter", "chatbot"})
)


def read_turns(
    turns: Any,
    line: int,
    *,
    field: str,
    dialect: Dialect = CHAT,
    paths: Sequence[str] | None = None,
    system: str = "",
    tools: str = "",
) -> tuple[Example | None, list[Problem]]:
    """The conversation in a list of turns, or everything that is wrong with it.

    Args:
        turns: what the row holds where its turns should be.
        line: the row's line.
        field: name of the row's field that holds the turns.
        dialect: what the turns' keys are called.
        paths: what to call each turn in sentences; `field[i]` when not given.
        system: a system message that stands beside the turns.
        tools: definitions of tools as `read_tools` gives them.
    """
    messages, problems = read_messages(turns, line, field=field, dialect=dialect, paths=paths)
    if messages is None:
        return None, problems
    before = (Message("system", system),) if system.strip() else ()
    at = [paths[i] if paths else f"{field}[{i}]" for i in range(len(messages))]
    found = check_conversation((*before, *messages), line, field, paths=[*([field] * len(before)), *at], tools=tools)
    problems = [*problems, *found]
    if any(problem.level == "error" for problem in problems):
        return None, problems
    return Example(line, (*before, *messages), tools), problems


def read_row(
    row: dict[str, Any], field: str, line: int, dialect: Dialect = CHAT
) -> tuple[Example | None, list[Problem]]:
    """The conversation in a field of a row, with what stands beside it: a system message, tools, pictures."""
    system, tools, problems = read_beside(row, line)
    example, found = read_turns(row[field], line, field=field, dialect=dialect, system=system, tools=tools)
    problems += found
    return (None if any(problem.level == "error" for problem in problems) else example), problems


def read_messages(
    turns: Any, line: int, *, field: str, dialect: Dialect = CHAT, paths: Sequence[str] | None = None
) -> tuple[tuple[Message, ...] | None, list[Problem]]:
    """The turns of a list one by one, without a look at their order; None when one of them has an error."""
    role_key, content_key = dialect.role_keys[0], dialect.content_keys[0]
    if isinstance(turns, str) and isinstance(from_text(turns), list):
        return None, [written_as_text(turns, line, field)]
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
    messages: list[Message] = []
    for index, turn in enumerate(turns):
        message, found = _read_turn(turn, line, paths[index] if paths else f"{field}[{index}]", dialect)
        problems += found
        if message:
            messages.append(message)
    if any(problem.level == "error" for problem in problems):
        return None, problems
    return tuple(messages), problems


def written_as_text(value: str, line: int, field: str) -> Problem:
    """A list or an object that somebody wrote as text."""
    return Problem(
        "F016",
        f'Line {line}: "{field}" is text that holds a structure, where the structure itself belongs.',
        "Write it as JSON, without quotes around it.",
        line=line,
        field=field,
        excerpt=excerpt_of(value),
    )


def _read_turn(turn: Any, line: int, path: str, dialect: Dialect) -> tuple[Message | None, list[Problem]]:
    if not isinstance(turn, dict):
        problem = Problem(
            "C102",
            f'Line {line}: "{path}" is {type_name(turn)}, where an object with "{dialect.role_keys[0]}" and '
            f'"{dialect.content_keys[0]}" belongs.',
            f'Write it as {{"{dialect.role_keys[0]}": "user", "{dialect.content_keys[0]}": "..."}}.',
            line=line,
            field=path,
            excerpt=excerpt_of(turn),
        )
        return None, [problem]
    problems: list[Problem] = []
    role_key = next((key for key in dialect.role_keys if key in turn), dialect.role_keys[0])
    content_key = next((key for key in dialect.content_keys if key in turn), dialect.content_keys[0])
    name = turn.get(role_key)
    plain = name.strip().lower() if isinstance(name, str) else None
    is_call = plain in CALL_ROLES
    role = "assistant" if is_call else ROLE_ALIASES.get(plain) if plain is not None else None
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
    elif role is None:
        problems.append(unknown_role(name, line, path))
    elif name not in dialect.roles and not is_call:
        problems.append(
            Problem(
                "C109",
                f'Line {line}: "{path}" has the unusual role "{excerpt_of(name)}", which is read as {role}.',
                f'Write "{role}".',
                line=line,
                field=f"{path}.{role_key}",
                excerpt=excerpt_of(name),
                level="warning",
            )
        )
    problems += _media(turn, line, path)
    calls, bad_calls = _read_calls(turn, line, path, content_key if is_call else None)
    problems += bad_calls
    content = ""
    if not is_call and not ((calls or bad_calls) and turn.get(content_key) in (None, "")):
        content, found = _read_content(turn, content_key, line, path)
        problems += found
    train, weight, bad_weight = _read_weight(turn, line, path)
    problems += [bad_weight] if bad_weight else []
    if role is None or any(problem.level == "error" for problem in problems):
        return None, problems
    if role != "assistant":
        train, weight = None, 1.0
        if calls:
            problems.append(_bad_call(turn, line, path, f"is a {role} turn that calls a tool"))
            return None, problems
    message = Message(
        role,  # type: ignore[arg-type]
        content,
        train,
        weight,
        tool_calls=calls,
        tool_call_id=_text_of(turn, "tool_call_id") if role == "tool" else "",
        name=_text_of(turn, "name") if role == "tool" else "",
        reasoning=next((turn[key] for key in _REASONING if isinstance(turn.get(key), str) and turn[key].strip()), "")
        if role == "assistant"
        else "",
    )
    return message, problems


def _text_of(turn: dict[str, Any], key: str) -> str:
    value = turn.get(key)
    return value if isinstance(value, str) else ""


def _media(holder: dict[str, Any], line: int, path: str) -> list[Problem]:
    found = next((key for key in MEDIA if isinstance(holder.get(key), (list, dict, str)) and holder[key]), None)
    if found is None:
        return []
    return [
        Problem(
            "C116",
            f'Line {line}: "{path}.{found}" holds what is no text.',
            "Remove the row: only text is learned, and an answer about a picture means nothing without it.",
            line=line,
            field=f"{path}.{found}",
            excerpt=excerpt_of(holder[found]),
        )
    ]


def _read_content(turn: dict[str, Any], key: str, line: int, path: str) -> tuple[str, list[Problem]]:
    """A turn's text: a text, or a list of parts of text."""
    value = turn.get(key)
    if not isinstance(value, list) or not value or not all(isinstance(part, dict) for part in value):
        content, problem = check_text(turn, key, line, path=f"{path}.{key}")
        return content, [problem] if problem else []
    pieces: list[str] = []
    problems: list[Problem] = []
    for index, part in enumerate(value):
        where = f"{path}.{key}[{index}]"
        if part.get("type", "text") != "text":
            kind = part["type"] if isinstance(part["type"], str) else type_name(part["type"])
            problems.append(
                Problem(
                    "C115",
                    f'Line {line}: "{where}" is of the type "{excerpt_of(kind)}".',
                    "Remove the row, or the part: only text is learned.",
                    line=line,
                    field=where,
                    excerpt=excerpt_of(part),
                )
            )
            continue
        text, problem = check_text(part, "text", line, path=f"{where}.text")
        if problem is None and ("weight" in part or "train" in part):
            problem = Problem(
                "C106",
                f'Line {line}: "{where}" has a weight of its own, and only whole turns are weighed.',
                "Put the weight on the turn, or leave it out.",
                line=line,
                field=where,
                excerpt=excerpt_of(part),
            )
        problems += [problem] if problem else []
        pieces.append(text)
    return "".join(pieces), problems


def _bad_call(turn: Any, line: int, path: str, what: str) -> Problem:
    return Problem(
        "C107",
        f'Line {line}: "{path}" {what}.',
        'Write calls as "tool_calls": [{"type": "function", "function": {"name": "...", "arguments": "{}"}}] '
        "in the assistant's turn.",
        line=line,
        field=f"{path}.tool_calls",
        excerpt=excerpt_of(turn),
    )


def _read_calls(
    turn: dict[str, Any], line: int, path: str, content_key: str | None
) -> tuple[tuple[ToolCall, ...], list[Problem]]:
    """The calls of a turn, in any dialect: `tool_calls`, the older `function_call`, or a turn that is a call."""
    if content_key is not None:
        value = turn.get(content_key)
        value = from_text(value) if isinstance(value, str) else value
        listed, where = (value if isinstance(value, list) else [value]), f"{path}.{content_key}"
    elif turn.get("tool_calls"):
        listed, where = turn["tool_calls"], f"{path}.tool_calls"
    elif turn.get("function_call"):
        listed, where = [turn["function_call"]], f"{path}.function_call"
    else:
        return (), []
    if not isinstance(listed, list):
        return (), [_bad_call(turn, line, path, f"has {type_name(listed)} as its tool calls, where a list belongs")]
    calls: list[ToolCall] = []
    problems: list[Problem] = []
    for index, call in enumerate(listed):
        function = call.get("function", call) if isinstance(call, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(function, dict) or not isinstance(name, str) or not name:
            problems.append(_bad_call(call, line, path, "calls a tool without saying which"))
            continue
        arguments = read_arguments(function.get("arguments", function.get("parameters")))
        if arguments is None:
            problems.append(
                Problem(
                    "C112",
                    f'Line {line}: "{where}[{index}]" calls "{excerpt_of(name)}" with arguments that are no JSON '
                    "object.",
                    'Write them as an object, or as text that holds one: "{\\"city\\": \\"Bern\\"}".',
                    line=line,
                    field=f"{where}[{index}].arguments",
                    excerpt=excerpt_of(function.get("arguments")),
                )
            )
            continue
        calls.append(ToolCall(name, arguments, _text_of(call, "id")))
    return tuple(calls), problems


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


def check_conversation(
    messages: tuple[Message, ...], line: int, field: str, *, paths: Sequence[str] = (), tools: str = ""
) -> list[Problem]:
    """Everything that is wrong or unusual in the order of a conversation's turns and in its tool calls."""
    roles: list[str] = [message.role for message in messages]
    problems: list[Problem] = []

    def error(rule: str, message: str, fix: str) -> None:
        excerpt = excerpt_of(messages[-1].content)
        problems.append(Problem(rule, message, fix, line=line, field=field, excerpt=excerpt))

    if "assistant" not in roles and roles[-1] == "user":
        error(
            "C103",
            f'Line {line}: "{field}" ends with a user turn, so there is nothing to learn.',
            "Add a reply or remove the line.",
        )
    elif "assistant" not in roles:
        error("C103", f'Line {line}: "{field}" has no assistant turn, so there is nothing to learn.', "Add a reply.")
    else:
        if "user" not in roles[: _last(roles, "assistant")]:
            error(
                "C103",
                f'Line {line}: "{field}" has no user turn before its assistant turn, so there is nothing to reply to.',
                "Add the question that is answered.",
            )
        if all(message.train is False for message in messages if message.role == "assistant"):
            error(
                "C106",
                f'Line {line}: every assistant turn of "{field}" has weight 0, so there is nothing to learn.',
                "Give at least one of them weight 1, or remove the line.",
            )
    if "tool" in roles or tools or any(message.tool_calls for message in messages):
        problems += check_calls(messages, line, paths or [field] * len(messages), tools)
    if problems and any(problem.level == "error" for problem in problems):
        return problems
    return [*problems, *_unusual_order(roles, line, field)]


def check_calls(messages: Sequence[Message], line: int, paths: Sequence[str], tools: str) -> list[Problem]:
    """Calls of tools that are not defined, replies that answer no call, and calls that nobody answers."""
    problems: list[Problem] = []
    defined = tool_names(tools) if tools else None
    is_called = any(message.tool_calls for message in messages)
    waiting: list[str] = []
    asked_at = ""
    for message, path in zip(messages, paths, strict=True):
        if message.role == "tool":
            # Without one call in the row, the calls are written as text, and so is what answers them.
            if message.tool_call_id in waiting:
                waiting.remove(message.tool_call_id)
            elif waiting and ("" in waiting or not message.tool_call_id):
                waiting.pop(0)
            elif is_called or message.tool_call_id:
                which = f' with the id "{excerpt_of(message.tool_call_id)}"' if message.tool_call_id else ""
                problems.append(
                    Problem(
                        "C110",
                        f'Line {line}: "{path}" answers a call{which} that was not made before it.',
                        "Give the reply the id of its call, and put it behind the call.",
                        line=line,
                        field=path,
                        excerpt=excerpt_of(message.content),
                    )
                )
            continue
        if waiting:
            problems.append(_unanswered(line, asked_at))
        waiting, asked_at = [call.id for call in message.tool_calls], path
        if defined is not None:
            problems += [
                _undefined(line, path, call, defined) for call in message.tool_calls if call.name not in defined
            ]
    return problems


def _undefined(line: int, path: str, call: ToolCall, defined: frozenset[str]) -> Problem:
    return Problem(
        "C111",
        f'Line {line}: "{path}" calls "{excerpt_of(call.name)}", which its tools do not define.',
        f"Define it in tools, or call one of: {', '.join(sorted(defined)[:10])}.",
        line=line,
        field=f"{path}.tool_calls",
        excerpt=excerpt_of(call.name),
    )


def _unanswered(line: int, path: str) -> Problem:
    return Problem(
        "C114",
        f'Line {line}: "{path}" calls a tool, and a turn follows before its reply.',
        "Add the tool's reply behind the call.",
        line=line,
        field=f"{path}.tool_calls",
        level="warning",
    )


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


def context_only(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Turns of which nothing is learned."""
    return tuple(replace(one, train=False) if one.role == "assistant" else one for one in messages)


def _last(roles: list[str], role: str) -> int:
    return len(roles) - 1 - roles[::-1].index(role)

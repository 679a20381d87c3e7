"""Remarks on the texts of a usable row: damage, secrets, control tokens. Warnings only: the row stays usable.

Each look is a search for a few fixed pieces first; only a text that holds one is looked at closely.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from workers.examples import AnyExample, Example, Message, Problem, TextExample
from workers.strict_json import excerpt_of

# What UTF-8 looks like that was decoded as Windows-1252: a lead byte's letter and a continuation byte's one.
_MOJIBAKE = re.compile(
    "[\u00c2\u00c3][\u0080-\u00bf\u0152\u0153\u0160\u0161\u0178\u017d\u017e\u0192\u02c6\u02dc\u2013-\u203a\u20ac\u2122]"
    "|\u00e2[\u0080\u20ac][\u0080-\u00bf\u0152\u0153\u0161\u017e\u0178\u02dc\u02c6\u2013-\u203a\u20ac\u2122]"
)
CONTROLS = re.compile("[\x01-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_TOKENS = re.compile(r"<\|[a-z_]{2,30}\|>|\[/?INST\]|</?s>|<(?:start|end)_of_turn>|<<SYS>>")
_TOKEN_PIECES = ("<|", "INST]", "<s>", "</s>", "_of_turn>", "<<SYS>>")
SECRETS = re.compile(
    r"(?P<private_key>-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----)"
    r"|(?P<AWS_key>\b(?:AKIA|ASIA)[0-9A-Z]{16}\b)"
    r"|(?P<GitHub_token>\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{40,}))"
    r"|(?P<Hugging_Face_token>\bhf_[A-Za-z0-9]{30,})"
    r"|(?P<Google_key>\bAIza[0-9A-Za-z_\-]{35})"
    r"|(?P<Slack_token>\bxox[baprs]-[0-9A-Za-z\-]{20,})"
    r"|(?P<API_key>\bsk-(?:[a-z]+-)?[A-Za-z0-9_\-]{24,})"
)
SECRET_PIECES = ("PRIVATE KEY", "AKIA", "ASIA", "gh", "hf_", "AIza", "xox", "sk-")
EMAIL = re.compile(r"\b[A-Za-z0-9._%+\-]{1,64}@(?:[A-Za-z0-9\-]{1,63}\.){1,4}[A-Za-z]{2,24}\b")

PrintOf = Callable[[list[str]], int]


def remarks(example: AnyExample, row: dict[str, Any]) -> list[Problem]:
    """What is to be said about the texts of a usable row.

    Args:
        example: what the format made of the row.
        row: the row, in which the place of a text is looked up once there is something to say.
    """
    problems: list[Problem] = []
    texts = [example.text] if isinstance(example, TextExample) else [one.content for one in example.messages]
    for number, text in enumerate(texts):
        is_system = not isinstance(example, TextExample) and example.messages[number].role == "system"
        for rule, what, fix, found in look_at(text):
            where = _place(row, text) or ""
            problems.append(
                Problem(
                    rule,
                    f'Line {example.line}: "{where}" {what}.' if where else f"Line {example.line}: a text {what}.",
                    fix,
                    line=example.line,
                    field=where or None,
                    excerpt=excerpt_of(found),
                    level="warning",
                )
            )
        if text != text.strip() and not is_system:
            where = _place(row, text) or ""
            problems.append(
                Problem(
                    "C108",
                    f'Line {example.line}: "{where}" begins or ends with white space, which is learned with it.',
                    "Remove it, unless it is meant.",
                    line=example.line,
                    field=where or None,
                    excerpt=excerpt_of(repr(text[:20] if text[:1].isspace() else text[-20:])),
                    level="warning",
                )
            )
    if isinstance(example, Example) and repeats_question(example.messages):
        problems.append(
            Problem(
                "Q506",
                f"Line {example.line}: the answer is word for word what was asked.",
                "Check how the columns were exported.",
                line=example.line,
                excerpt=excerpt_of(example.messages[-1].content),
                level="warning",
            )
        )
    return problems


def repeats_question(messages: tuple[Message, ...]) -> bool:
    """Whether the last answer is the turn before it."""
    return (
        len(messages) > 1
        and messages[-1].role == "assistant"
        and messages[-1].content == messages[-2].content
        and messages[-2].role == "user"
    )


def look_at(text: str) -> Iterator[tuple[str, str, str, str]]:
    """(rule, what is found, what helps, the finding) of each kind of finding in a text, each kind once."""
    if not text.isascii():
        if found := _MOJIBAKE.search(text):
            yield (
                "F013", f"holds {found[0]!r}, which is UTF-8 that was read in another encoding",
                "Write the file as UTF-8 once, or make a corrected version.", _around(text, found),
            )  # fmt: skip
        if "\ufffd" in text:
            yield (
                "F014", "holds the mark of a character that was lost (U+FFFD)",
                "Export the text again from where it is whole.", text[max(0, text.index("\ufffd") - 40) :],
            )  # fmt: skip
    if found := CONTROLS.search(text):
        yield (
            "F015", f"holds the control character U+{ord(found[0]):04X}", "Remove it, or make a corrected version.",
            _around(text, found),
        )  # fmt: skip
    if any(piece in text for piece in _TOKEN_PIECES) and (found := _TOKENS.search(text)):
        yield (
            "T405", f"holds {found[0]}, which chat templates write themselves; here it is read as ordinary text",
            "Remove it when it is left over from another template.", _around(text, found),
        )  # fmt: skip
    if any(piece in text for piece in SECRET_PIECES) and (found := SECRETS.search(text)):
        kind = (found.lastgroup or "secret").replace("_", " ")
        yield (
            "Q503", f"holds what looks like a secret ({kind})", "Remove it, and revoke it where it is valid.",
            f"{found[0][:6]}… ({len(found[0])} characters)",
        )  # fmt: skip
    if "@" in text and (found := EMAIL.search(text)):
        name, _, domain = found[0].partition("@")
        yield (
            "Q504", "holds an e-mail address", "Remove or replace it where it is a person's.", f"{name[:1]}…@{domain}",
        )  # fmt: skip


def _around(text: str, found: re.Match[str]) -> str:
    return text[max(0, found.start() - 40) : found.end() + 40]


def _place(row: dict[str, Any], text: str) -> str | None:
    """Path of the text of a row that is a given text, or is the longest part of it."""
    found = [(value == text, len(value), path) for path, value in _texts(row) if value and value in text]
    if not found:
        return None
    best = max(found, key=lambda one: one[:2])
    return best[2]


def _texts(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield path, value
        return
    children = (
        ((f"{path}.{key}" if path else str(key), child) for key, child in value.items())
        if isinstance(value, dict)
        else ((f"{path}[{index}]", child) for index, child in enumerate(value))
        if isinstance(value, list)
        else ()
    )
    for where, child in children:
        yield from _texts(child, where)


def fingerprint(example: AnyExample, print_of: PrintOf | None = None) -> int:
    """Equal for rows that say the same; differs between processes.

    Args:
        example: what the row says.
        print_of: the print of a conversation in the plain order (a system turn where the number of turns is odd, then a
            user's and an assistant's, repeatedly), where another than `print_of_texts` is wanted.
    """
    if isinstance(example, TextExample):
        return hash(("text", example.text))
    if isinstance(example, Example) and not example.tools:
        said = tuple(_said(message) for message in example.messages)
        num = len(said)
        order = ("system",) * (num % 2) + ("user", "assistant") * (num // 2)
        if all(len(one) == 2 for one in said) and tuple(one[0] for one in said) == order:
            return (print_of or print_of_texts)([one[1] for one in said])
        return hash(said)
    values = (example.messages, example.tools, getattr(example, "label", None), example.type)
    return hash(values)


def print_of_texts(texts: list[str]) -> int:
    """The print of the texts of a conversation in the plain order."""
    return hash(("texts", *texts))


def _said(message: Message) -> Any:
    if message.tool_calls or message.reasoning:
        return (message.role, message.content, message.tool_calls, message.reasoning)
    return (message.role, message.content)

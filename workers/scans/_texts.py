"""The texts of rows that scans look at."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

from workers.examples import AnyExample, Message, PreferenceExample, TextExample, UnpairedExample
from workers.overlap import plain_words
from workers.strict_json import excerpt_of

MAX_WORDS = 4000
"""Words of a row that are looked at."""


def texts(example: AnyExample) -> Iterator[tuple[str, str]]:
    """(where, text) of everything that a row says."""
    if isinstance(example, TextExample):
        yield "the text", example.text
        return
    for number, message in enumerate(example.messages, start=1):
        where = f"turn {number} ({message.role})"
        yield where, message.content
        if message.reasoning:
            yield where, message.reasoning
        for call in message.tool_calls:
            yield where, call.arguments
    if example.tools:
        yield "the tools", example.tools


def answers(example: AnyExample) -> Iterator[str]:
    """The answers that are to be learned: not those that a row calls worse or unwanted, nor calls of tools."""
    messages: tuple[Message, ...] = example.messages
    if isinstance(example, PreferenceExample):
        messages = example.chosen
    elif isinstance(example, UnpairedExample):
        messages = example.completion if example.label else ()
    for message in messages:
        if message.role == "assistant" and not message.tool_calls and message.train is not False:
            yield message.content


def words_of(example: AnyExample) -> list[str]:
    """A row's words without the system's, which rows share by design; case and punctuation aside."""
    if isinstance(example, TextExample):
        return plain_words(example.text)[:MAX_WORDS]
    return plain_words(" ".join(one.content for one in example.messages if one.role != "system"))[:MAX_WORDS]


def digest_of(example: AnyExample) -> int:
    """64 bits that are equal for rows that say the same word for word, spaces and case aside."""
    parts: list[str] = [example.type]
    if isinstance(example, TextExample):
        parts.append(_plain(example.text))
    else:
        for one in example.messages:
            parts += [one.role, _plain(one.content), _plain(one.reasoning)]
            parts += [f"{call.name} {call.arguments}" for call in one.tool_calls]
        parts.append(example.tools)
    if isinstance(example, UnpairedExample):
        parts.append(str(example.label))
    return digest_of_text("\0".join(parts))


def digest_of_turns(roles: Sequence[str], contents: Sequence[str]) -> int:
    """`digest_of` a conversation of turns that say nothing but their contents."""
    parts = ["chat"]
    for role, content in zip(roles, contents, strict=True):
        parts += [role, _plain(content), ""]
    parts.append("")
    return digest_of_text("\0".join(parts))


def digest_of_text(text: str) -> int:
    """64 bits of a text."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def beginning(example: AnyExample) -> str:
    """What a row says first, for people."""
    if isinstance(example, TextExample):
        return excerpt_of(example.text.strip())
    told = [one for one in example.messages if one.role != "system"] or list(example.messages)
    return excerpt_of(" → ".join(one.content.strip() for one in told if one.content.strip()))


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def masked(secret: str) -> str:
    """A secret as it may be shown and stored: at most four of its characters, and never more than a quarter."""
    return f"{secret[: min(4, len(secret) // 4)]}… ({len(secret)} characters)"

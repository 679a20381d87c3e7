"""What a dataset row becomes: one type per kind of row, which every format of that kind converts into."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

ExampleType = Literal["chat", "preference", "unpaired", "text"]
EXAMPLE_TYPE_LABELS: dict[ExampleType, str] = {
    "chat": "conversations",
    "preference": "preference pairs",
    "unpaired": "answers with a verdict",
    "text": "plain text",
}
Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True)
class ToolCall:
    """A call that an assistant's turn makes; `arguments` is a JSON object as text."""

    name: str
    arguments: str
    id: str = ""


@dataclass(frozen=True)
class Message:
    """One turn. `train` overrides whether an assistant's turn carries loss; None leaves it to the recipe.

    `weight`, above 0, is what each of its tokens counts in the training loss; a turn of weight 0 has train False.
    `content` may be empty only in a turn with tool calls. `reasoning` is what the assistant thought before it.
    """

    role: Role
    content: str
    train: bool | None = None
    weight: float = 1.0
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    name: str = ""
    reasoning: str = ""


@dataclass(frozen=True)
class Example:
    """One usable row: a conversation with at least one assistant turn, and the line it came from (from 1).

    `tools` is the JSON list of the functions that may be called, as the chat template takes it; empty without tools.
    """

    line: int
    messages: tuple[Message, ...]
    tools: str = ""
    type: ExampleType = field(default="chat", init=False)

    def conversations(self) -> tuple[Example, ...]:
        """What a model reads of the row."""
        return (self,)


@dataclass(frozen=True)
class PreferenceExample:
    """Two answers to one prompt, of which `chosen` is the better one. `prompt` ends before the assistant's turn."""

    line: int
    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    tools: str = ""
    type: ExampleType = field(default="preference", init=False)

    @property
    def messages(self) -> tuple[Message, ...]:
        return (*self.prompt, *self.chosen, *self.rejected)

    def conversations(self) -> tuple[Example, ...]:
        """What a model reads of the row: the prompt with each of its answers."""
        return tuple(Example(self.line, (*self.prompt, *answer), self.tools) for answer in (self.chosen, self.rejected))


@dataclass(frozen=True)
class UnpairedExample:
    """One answer to a prompt and whether it is wanted (KTO)."""

    line: int
    prompt: tuple[Message, ...]
    completion: tuple[Message, ...]
    label: bool
    tools: str = ""
    type: ExampleType = field(default="unpaired", init=False)

    @property
    def messages(self) -> tuple[Message, ...]:
        return (*self.prompt, *self.completion)

    def conversations(self) -> tuple[Example, ...]:
        """What a model reads of the row."""
        return (Example(self.line, self.messages, self.tools),)


@dataclass(frozen=True)
class TextExample:
    """A passage without turns, for continued pre-training."""

    line: int
    text: str
    type: ExampleType = field(default="text", init=False)
    messages: tuple[Message, ...] = field(default=(), init=False)

    def conversations(self) -> tuple[Example, ...]:
        """None: no chat template frames it."""
        return ()


AnyExample = Example | PreferenceExample | UnpairedExample | TextExample

_TURN = re.compile(r"\[(\d+)\]")


@dataclass(frozen=True)
class Problem:
    """Why a row, or a whole file, cannot be used, and what to do about it.

    `line` counts from 1 and is None for a problem of the whole file; `field` is a path into the row
    ("messages[2].content"); `excerpt` is the beginning of the offending value, cut for display.
    """

    rule: str
    message: str
    fix: str
    line: int | None = None
    field: str | None = None
    excerpt: str = ""
    level: Literal["error", "warning"] = "error"

    @property
    def turn(self) -> int | None:
        """Which turn it is in, counted from 1; None when it is in none."""
        return turn_of(self.field)


def turn_of(field: str | None) -> int | None:
    """The turn that a path into a row leads to, counted from 1; None when it leads to none."""
    found = _TURN.search(field or "")
    return int(found[1]) + 1 if found else None


@dataclass(frozen=True)
class Recognition:
    """Which format a file has, how sure that is (0 to 1), and the columns it was matched with.

    `columns` maps the format's own field names to the file's column names where the format needs a
    mapping ({"prompt": "question", "completion": "answer"}), and is empty where it does not.
    """

    format: str
    confidence: float
    columns: dict[str, str] = field(default_factory=dict)

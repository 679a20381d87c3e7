"""What a dataset row becomes: one schema that every format converts into."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

ExampleType = Literal["chat"]
Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True)
class Message:
    """One turn. `train` overrides whether an assistant's turn carries loss; None leaves it to the recipe.

    `weight`, above 0, is what each of its tokens counts in the training loss; a turn of weight 0 has train False.
    """

    role: Role
    content: str
    train: bool | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class Example:
    """One usable row: a conversation with at least one assistant turn, and the line it came from (from 1)."""

    line: int
    messages: tuple[Message, ...]
    type: ExampleType = "chat"


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


@dataclass(frozen=True)
class Recognition:
    """Which format a file has, how sure that is (0 to 1), and the columns it was matched with.

    `columns` maps the format's own field names to the file's column names where the format needs a
    mapping ({"prompt": "question", "completion": "answer"}), and is empty where it does not.
    """

    format: str
    confidence: float
    columns: dict[str, str] = field(default_factory=dict)

"""What a base model learns of a row, asked of a child process that is kept for the next question.

A chat template comes with a base model and may do anything within its sandbox, for as long as it likes. So it runs in
`python -m workers.previewing`, with limits on time and memory, and never in the web process itself.
"""

from __future__ import annotations

import atexit
import contextlib
from collections.abc import Sequence
from typing import Any

from studio.datasets.kept_child import KeptChild, Sentences
from studio.datasets.models import DatasetVersion, RowTable, RowTableState
from studio.datasets.row_searching import RowSearchError, usable_row
from studio.storage import StorageError
from workers.errors import ExplainedError

SECONDS = 10.0
MEMORY_BYTES = 2 * 1024**3
MAX_TOKENS = 4096
"""Tokens of a conversation that a page lists."""


class PreviewError(ExplainedError):
    """A row cannot be shown as a base model learns it."""

    code = "not_renderable"


class PreviewBusyError(PreviewError):
    """Others' rows are being rendered, for longer than somebody waits."""

    code = "busy"


def learn_row(
    version: DatasetVersion, base_model: Any, *, max_length: int, loss_on: str, line: int, max_tokens: int = MAX_TOKENS
) -> dict[str, Any]:
    """The first usable row of a ready version at `line` or behind it; see `workers.previewing.answer`.

    Raises:
        PreviewError: the base model or the row takes too long or too much memory, or cannot be read.
    """
    return _child.ask(
        {
            **_row_at(version, line), "format": version.format, "columns": version.columns, "line": line,
            "folder": base_model.folder, "revision": base_model.revision, "max_length": max_length,
            "loss_on": loss_on, "max_tokens": max_tokens,
        }
    )  # fmt: skip


def _row_at(version: DatasetVersion, line: int) -> dict[str, Any]:
    """The row as it lies prepared, which is found in a moment; or the file, which is read up to its line."""
    table = RowTable.objects.filter(version=version, state=RowTableState.DONE).first()
    if table is not None:
        table.version = version
        # Else it is found in the file all the same.
        with contextlib.suppress(RowSearchError, StorageError):
            found = usable_row(table, line)
            row = found.row and {"line": found.row["line"], "raw": found.row["raw"]}
            return {"row": row, "previous": found.previous, "next": found.next}
    return {"path": str(version.path())}


def learn_turns(folder: str, revision: str, turns: Sequence[tuple[str, str]], *, max_length: int) -> dict[str, Any]:
    """The same of a conversation, given as pairs of role and content, whose assistant's turns carry the loss."""
    return _child.ask(
        {
            "turns": turns, "folder": folder, "revision": revision, "max_length": max_length, "loss_on": "assistant",
            "max_tokens": max_length,
        }
    )  # fmt: skip


class PreviewChild(KeptChild):
    """One process that renders rows, one at a time."""

    def __init__(self, seconds: float = SECONDS, memory_bytes: int = MEMORY_BYTES) -> None:
        sentences = Sentences(
            busy=("Other rows are being rendered just now.", "Try again in a moment."),
            late=(
                f"The row was not rendered within {seconds:g} seconds.",
                "Choose an earlier line, a shorter row, or a base model with a simpler chat template.",
            ),
            failed=(
                "The row could not be rendered: the base model's tokenizer or chat template failed, or took more "
                "memory than a page may use.",
                "Choose another row, or check the base model's chat template.",
            ),
        )
        super().__init__(
            "previewing", sentences, seconds=seconds, memory_bytes=memory_bytes, error=PreviewError,
            busy=PreviewBusyError,
        )  # fmt: skip


_child = PreviewChild()
atexit.register(_child.close)

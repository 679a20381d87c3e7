"""What a base model learns of a row, asked of a child process that is kept for the next question.

A chat template comes with a base model and may do anything within its sandbox, for as long as it likes. So it runs in
`python -m workers.previewing`, with limits on time and memory, and never in the web process itself.
"""

from __future__ import annotations

import atexit
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import orjson
from django.conf import settings

from studio.datasets.models import DatasetVersion
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
            "path": str(version.path()), "format": version.format, "columns": version.columns, "line": line,
            "folder": base_model.folder, "revision": base_model.revision, "max_length": max_length,
            "loss_on": loss_on, "max_tokens": max_tokens,
        }
    )  # fmt: skip


def learn_turns(folder: str, revision: str, turns: Sequence[tuple[str, str]], *, max_length: int) -> dict[str, Any]:
    """The same of a conversation, given as pairs of role and content, whose assistant's turns carry the loss."""
    return _child.ask(
        {
            "turns": turns, "folder": folder, "revision": revision, "max_length": max_length, "loss_on": "assistant",
            "max_tokens": max_length,
        }
    )  # fmt: skip


class PreviewChild:
    """One process that renders rows, one at a time; started when first asked, and again after it ended."""

    def __init__(self, seconds: float = SECONDS, memory_bytes: int = MEMORY_BYTES) -> None:
        self._seconds, self._memory_bytes = seconds, memory_bytes
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request; raises PreviewError."""
        if not self._lock.acquire(timeout=self._seconds):
            raise PreviewBusyError("Other rows are being rendered just now.", next_step="Try again in a moment.")
        try:
            found = self._exchange(orjson.dumps(request) + b"\n")
        finally:
            self._lock.release()
        if found["kind"] == "refused":
            raise PreviewError(found["message"], next_step=found["next_step"])
        return found

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _exchange(self, request: bytes) -> dict[str, Any]:
        process, is_new = self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(request)
            process.stdin.flush()
            line = _read_line(process.stdout.fileno(), time.monotonic() + 2 * self._seconds)
        except OSError:
            line = b""
        if line.endswith(b"\n"):
            found: dict[str, Any] = orjson.loads(line)
            return found
        try:
            status = process.wait(timeout=0.5)
        except subprocess.TimeoutExpired:
            status = -signal.SIGALRM
        self.close()
        if status == -signal.SIGALRM:
            raise PreviewError(
                f"The row was not rendered within {self._seconds:g} seconds.",
                next_step="Choose an earlier line, a shorter row, or a base model with a simpler chat template.",
            )
        if not is_new:  # it ended for want of questions, or its memory was full of other base models
            return self._exchange(request)
        raise PreviewError(
            "The row could not be rendered: the base model's tokenizer or chat template failed, or took more memory "
            "than a page may use.",
            next_step="Choose another row, or check the base model's chat template.",
        )

    def _running(self) -> tuple[subprocess.Popen[bytes], bool]:
        """The process, and whether it was started just now."""
        if self._process is not None and self._process.poll() is not None:
            self.close()
        is_new = self._process is None
        if self._process is None:
            command = [sys.executable, "-m", "workers.previewing", "--seconds", str(self._seconds),
                       "--memory-bytes", str(self._memory_bytes)]  # fmt: skip
            environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                cwd=settings.ROOT, env=environment,
            )  # fmt: skip
        return self._process, is_new


def _read_line(descriptor: int, end: float) -> bytes:
    """A line, or what there is of it when the process ends or the time is over."""
    pieces: list[bytes] = []
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while not pieces or not pieces[-1].endswith(b"\n"):
            patience = end - time.monotonic()
            if patience <= 0 or not selector.select(patience) or not (chunk := os.read(descriptor, 1 << 20)):
                break
            pieces.append(chunk)
    return b"".join(pieces)


_child = PreviewChild()
atexit.register(_child.close)

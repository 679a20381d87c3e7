"""A child process that answers questions, one at a time, and is kept for the next one.

What a row or a base model brings along may take all the time and memory there is. So it is looked at in a process with
limits on both, and never in the web process itself.
"""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any

import orjson
from django.conf import settings

from workers.errors import ExplainedError

START_SECONDS = 20.0
"""What a process may take to start, on a machine that has other work."""


@dataclass(frozen=True)
class Sentences:
    """What is said when there is no answer: each a pair of what happened and what to do."""

    busy: tuple[str, str]
    late: tuple[str, str]
    failed: tuple[str, str]


class KeptChild:
    """One process of `python -m workers.MODULE`; started when first asked, and again after it ended.

    Args:
        module: it takes --seconds and --memory-bytes, and answers each line of JSON with one.
        seconds: for one question; what takes twice as long is given up, but for the start of the process.
        memory_bytes: of address space.
        error: raised when there is no answer; of `busy` when others' questions take too long.
    """

    def __init__(
        self, module: str, sentences: Sentences, *, seconds: float, memory_bytes: int, error: type[ExplainedError],
        busy: type[ExplainedError],
    ) -> None:  # fmt: skip
        self._module, self._sentences = module, sentences
        self._seconds, self._memory_bytes = seconds, memory_bytes
        self._error, self._busy = error, busy
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request; raises the error of the constructor."""
        if not self._lock.acquire(timeout=self._seconds):
            raise self._busy(self._sentences.busy[0], next_step=self._sentences.busy[1])
        try:
            found = self._exchange(orjson.dumps(request) + b"\n")
        finally:
            self._lock.release()
        if found["kind"] == "refused":
            raise self._error(found["message"], next_step=found["next_step"])
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
            patience = 2 * self._seconds + (START_SECONDS if is_new else 0.0)
            line = _read_line(process.stdout.fileno(), time.monotonic() + patience)
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
            raise self._error(self._sentences.late[0], next_step=self._sentences.late[1])
        if not is_new:  # it ended for want of questions, or its memory was full of those before
            return self._exchange(request)
        raise self._error(self._sentences.failed[0], next_step=self._sentences.failed[1])

    def _running(self) -> tuple[subprocess.Popen[bytes], bool]:
        """The process, and whether it was started just now."""
        if self._process is not None and self._process.poll() is not None:
            self.close()
        is_new = self._process is None
        if self._process is None:
            command = [sys.executable, "-m", f"workers.{self._module}", "--seconds", str(self._seconds),
                       "--memory-bytes", str(self._memory_bytes)]  # fmt: skip
            environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1",
                           "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}  # fmt: skip
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

"""A few kept children for the questions of all teams, so that one team's slow ones keep no other waiting."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from studio.datasets.kept_child import KeptChild
from workers.errors import ExplainedError


class ChildPool:
    """Kept children, each with one question at a time.

    An asker has one child at most, however much it asks, so that as many askers as there are children are answered
    beside each other. Where one is free it is the one that answered the asker last, which remembers that, or the one
    that has been idle for longest. Else who came first is answered first.

    Args:
        children: their number bounds the processes, and with the memory of each the memory of all.
        seconds: that a question waits for its turn.
        busy: what is raised when that is over.
    """

    def __init__(
        self, children: Sequence[KeptChild], *, seconds: float, busy: Callable[[], ExplainedError]
    ) -> None:  # fmt: skip
        self._children = tuple(children)
        self._seconds, self._busy = seconds, busy
        self._turn = threading.Condition()
        self._free = [("", child) for child in children]
        """With who was answered last; the child that has been idle for longest comes first."""
        self._asking: set[str] = set()
        """Askers with a question under way."""
        self._waiting: list[tuple[object, str]] = []

    def ask(self, asker: str, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to an asker's request; raises what `busy` gives, and what the child raises."""
        child = self._take(asker)
        try:
            return child.ask(request)
        finally:
            with self._turn:
                self._asking.remove(asker)
                self._free.append((asker, child))
                self._turn.notify_all()

    @property
    def num_waiting(self) -> int:
        """Questions that no child has begun with."""
        return len(self._waiting)

    def close(self) -> None:
        """End every process."""
        for child in self._children:
            child.close()

    def _take(self, asker: str) -> KeptChild:
        ticket = object()
        with self._turn:
            self._waiting.append((ticket, asker))
            try:
                if not self._turn.wait_for(lambda: self._is_next(ticket), self._seconds):
                    raise self._busy()
                warm = next((one for one in self._free if one[0] == asker), self._free[0])
                self._free.remove(warm)
                self._asking.add(asker)
                return warm[1]
            finally:
                self._waiting.remove((ticket, asker))
                self._turn.notify_all()  # Whoever comes next may have been waiting for this one.

    def _is_next(self, ticket: object) -> bool:
        if not self._free:
            return False
        return next((one for one, asker in self._waiting if asker not in self._asking), None) is ticket

"""Tells responses that last, such as progress streams, that the web process is about to stop."""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakMethod

_listeners: list[WeakMethod[Callable[[], None]]] = []


def when_draining(listener: Callable[[], None]) -> None:
    """Have a method called, on the server's event loop, once the process takes no new requests."""
    _listeners.append(WeakMethod(listener))


def begin() -> None:
    """The process takes no new requests: call everybody who wanted to know."""
    for reference in _listeners:
        if (listener := reference()) is not None:
            listener()

"""A way between two healthy processes that can be cut, or go silent: to Postgres, or from a browser to the web."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
import time
from pathlib import Path


class Proxy:
    """Forwards every connection to a unix socket to another one, in a thread of its own."""

    NAME = ".s.PGSQL.5432"

    def __init__(self, folder: Path, target: Path) -> None:
        self.folder, self._target = folder, target
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(folder / self.NAME))
        listener.listen(64)
        self._begin(listener)

    def _begin(self, listener: socket.socket) -> None:
        self._listener = listener
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._other: dict[socket.socket, socket.socket] = {}
        self._lock = threading.Lock()
        self._is_cut = self._is_silent = self._is_stuck = self._is_over = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def cut(self) -> None:
        """Close every connection and take no new one."""
        with self._lock:
            self._is_cut = True
            self._close_all()

    def fall_silent(self) -> None:
        """Keep every connection open and carry nothing more: neither side hears of it."""
        with self._lock:
            self._is_silent = True

    def stick(self) -> None:
        """Take nothing more from either side: what is sent stays with whoever sends it."""
        with self._lock:
            self._is_stuck = True

    def mend(self) -> None:
        """Carry on; what was silent is closed, as by the system that finds it dead."""
        with self._lock:
            self._close_all()
            self._is_cut = self._is_silent = self._is_stuck = False

    def close(self) -> None:
        self._is_over = True
        self._thread.join()
        self._close_all()
        self._listener.close()

    def _run(self) -> None:
        while not self._is_over:
            for key, _ in self._selector.select(0.1):
                with self._lock:
                    if key.fileobj is self._listener:
                        self._accept()
                    elif key.fileobj in self._other and not self._is_stuck:
                        self._carry(key.fileobj)  # type: ignore[arg-type]
            if self._is_stuck:
                time.sleep(0.05)  # what waits there is ready all the time

    def _accept(self) -> None:
        near, _ = self._listener.accept()
        if self._is_cut:
            near.close()
            return
        far = self._connect()
        for one, other in ((near, far), (far, near)):
            # A side that takes nothing for so long must not hold up the others, or the end of the test.
            one.settimeout(30)
            self._other[one] = other
            self._selector.register(one, selectors.EVENT_READ)

    def _connect(self) -> socket.socket:
        far = socket.socket(socket.AF_UNIX)
        far.connect(str(self._target / self.NAME))
        return far

    def _carry(self, one: socket.socket) -> None:
        try:
            data = one.recv(1 << 16)
            if data and not self._is_silent:
                self._other[one].sendall(data)
        except OSError:
            data = b""
        if not data:
            self._drop(one)

    def _drop(self, one: socket.socket) -> None:
        for end in (one, self._other[one]):
            del self._other[end]
            self._selector.unregister(end)
            with contextlib.suppress(OSError):
                end.close()

    def _close_all(self) -> None:
        while self._other:
            self._drop(next(iter(self._other)))


class TcpProxy(Proxy):
    """The same between a browser and a web process."""

    def __init__(self, port: int) -> None:
        self._port = port
        listener = socket.create_server(("127.0.0.1", 0))
        self.root = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self._begin(listener)

    def _connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self._port))

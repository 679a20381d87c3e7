"""The database for code on an event loop: one thread with one connection, however many ask."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from django.db import Error as DatabaseError
from django.db import connections

T = TypeVar("T")


class DatabaseThread:
    """Runs functions that use the database, one after another, on a connection that is kept until `close`.

    A connection for each call would cost more than its query: the server asks for a password and forks.
    """

    def __init__(self, name: str) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=name)

    async def run(self, function: Callable[[], T]) -> T:
        """The function's value. A lost connection is made anew, once; raises what the function raises."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, _with_connection, function)

    def close(self) -> None:
        """Give thread and connection back when what was asked for is done; does not wait."""
        self._executor.submit(connections.close_all)
        self._executor.shutdown(wait=False)


def _with_connection(function: Callable[[], T]) -> T:
    try:
        return function()
    except DatabaseError:
        # Postgres was started anew since the last call, perhaps; what stays broken shows at once.
        connections.close_all()
        return function()

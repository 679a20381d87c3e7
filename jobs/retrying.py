"""What a database breaks off so that others can go on is done again."""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from django.db import OperationalError, connection
from psycopg import errors

NUM_TRIES = 3
# Longest pause before the second try, in seconds; twice as long before the third.
PAUSE_SECONDS = 0.05

P = ParamSpec("P")
R = TypeVar("R")


def tried_again(action: Callable[P, R]) -> Callable[P, R]:
    """Do an action again, three times at most, when the database ended it for a deadlock or a conflict of order.

    The action opens its own transaction: inside another one the error goes up to whoever opened that.
    """

    @functools.wraps(action)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        for number in range(1, NUM_TRIES + 1):
            try:
                return action(*args, **kwargs)
            except OperationalError as error:
                if number == NUM_TRIES or connection.in_atomic_block or not _is_conflict(error):
                    raise
            # A random pause, or the same two would meet again.
            time.sleep(random.uniform(0, PAUSE_SECONDS * number))  # noqa: S311
        raise AssertionError("the last try returns or raises")

    return wrapped


def _is_conflict(error: OperationalError) -> bool:
    return isinstance(error.__cause__, errors.DeadlockDetected | errors.SerializationFailure)

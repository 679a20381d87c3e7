"""A pytest plugin: real Postgres and Valkey servers for the whole test run.

Loaded with `-p tests.servers`, before Django reads DATABASE_URL. With DATABASE_URL and REDIS_URL set, the
tests run against those servers instead.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path


def _at_exit(action: Callable[[], None]) -> None:
    """Do something when this process ends, and not when one ends that it was forked into."""
    owner = os.getpid()
    atexit.register(lambda: action() if os.getpid() == owner else None)


def _forget_disks(database_url: str) -> None:
    """Have a database wait for no disk: it is gone after the tests, and each of them empties it."""
    import psycopg

    with psycopg.connect(database_url, autocommit=True) as connection:
        for name in ("fsync", "synchronous_commit"):
            connection.execute(f"ALTER SYSTEM SET {name} = off")
        connection.execute("SELECT pg_reload_conf()")


def _start() -> None:
    folder = Path(tempfile.mkdtemp(prefix="peft-studio-tests-"))
    # The folder must go last: exit handlers run in reverse order.
    _at_exit(partial(shutil.rmtree, folder, ignore_errors=True))
    os.environ["STUDIO_DATA_DIR"] = str(folder)
    os.environ["STUDIO_SECRET_KEY"] = "tests-only-" + "0" * 50
    # A tenth of the product's times, so that a lost worker is found within a test's patience.
    os.environ.setdefault("STUDIO_LEASE_SECONDS", "6")
    os.environ.setdefault("STUDIO_POLL_SECONDS", "1")
    if os.environ.get("DATABASE_URL") and os.environ.get("REDIS_URL"):
        return
    from studio.embedded import EmbeddedServers

    servers = EmbeddedServers(folder)
    urls = servers.start()
    _at_exit(servers.stop)
    _forget_disks(urls.database)
    os.environ["DATABASE_URL"] = urls.database
    os.environ["REDIS_URL"] = urls.redis


_start()

"""`python -m tests.faults.soak`: many short jobs on real workers while everything is killed, and what became of them.

Servers, workers, supervisors, leases and the reaper are the product's own, at a fifteenth of its times. Most trainers
are fakes that take milliseconds; some are real trainings of the tiny model. Prints a table; the exit status is 1 when a
job was lost or done twice, an invariant is broken, or not every fault was injected.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import psycopg

from studio.embedded import EmbeddedServers, ServerUrls

LEASE_SECONDS = 4.0
ROOT = Path(__file__).resolve().parents[2]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("--jobs", type=int, default=250, help="at least; more are queued while faults are left")
    parser.add_argument("--real", type=int, default=4, help="of these, real trainings of the tiny model")
    parser.add_argument("--kills", type=int, default=200, help="kill -9: 7 in 10 trainers, else workers or whole trees")
    parser.add_argument("--zombies", type=int, default=30, help="workers paused for two leases beside a replacement")
    parser.add_argument("--postgres-kills", type=int, default=20, help="immediate restarts")
    parser.add_argument("--redis-kills", type=int, default=20, help="SIGKILL and start")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--gap", type=float, default=0.4, help="mean seconds between two faults")
    parser.add_argument("--limit", type=float, default=600, help="seconds after which the rest counts as lost")
    parser.add_argument("--keep", action="store_true", help="keep logs, rows and files also when all went well")
    parser.add_argument("--seed", type=int, default=None, help="of the order and the moments of the faults")
    options = parser.parse_args(arguments)
    if options.seed is None:
        options.seed = int.from_bytes(os.urandom(3), "big")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Runs the soak and gives its exit status."""
    options = parse(arguments)
    started_at = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="peft-studio-soak-"))
    servers = EmbeddedServers(folder)
    is_clean = False
    try:
        urls = servers.start()
        keep_commit_times(urls)
        servers.stop()
        servers.start()
        set_environment(folder, urls)

        import django

        django.setup()

        from tests.faults.soaking import Soak

        verdict = Soak(options, servers, started_at).run()
        print(verdict.table(), flush=True)
        is_clean = not verdict.violations
    finally:
        servers.stop()
        if is_clean and not options.keep:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            print(f"Logs, rows and files are kept in {folder}.", file=sys.stderr)
    return 0 if is_clean else 1


def keep_commit_times(urls: ServerUrls) -> None:
    """Have Postgres remember when each transaction was committed, from its next start on: what was written too late
    shows by it."""
    with psycopg.connect(urls.database, autocommit=True) as connection:
        connection.execute("ALTER SYSTEM SET track_commit_timestamp = on")


def set_environment(folder: Path, urls: ServerUrls) -> None:
    """The settings of this process and of every worker that it starts."""
    os.environ.update(
        DATABASE_URL=urls.database,
        REDIS_URL=urls.redis,
        DJANGO_SETTINGS_MODULE="tests.faults.settings",
        OMP_NUM_THREADS="1",
        STUDIO_DATA_DIR=str(folder),
        STUDIO_SECRET_KEY="soak-only-" + "0" * 50,
        STUDIO_LEASE_SECONDS=str(LEASE_SECONDS),
        STUDIO_POLL_SECONDS="1",
        # A job may be hit more often here than a product's ever is; that it must gain steps stays the rule.
        STUDIO_MAX_ATTEMPTS="1000",
        PYTHONPATH=str(ROOT),
    )
    os.environ.pop("STUDIO_DEBUG", None)


if __name__ == "__main__":
    sys.exit(main())

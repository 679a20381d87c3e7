"""A small run of the watchers' benchmark, with its own servers and the real web process."""

from __future__ import annotations

import json
import subprocess
import sys

from django.conf import settings

COMMAND = ["-m", "tests.bench.watchers", "--json", "--watchers", "30", "--jobs", "3", "--seconds", "8"]


def test_watchers_lose_nothing_see_nothing_twice_and_leave_nothing_behind() -> None:
    done = subprocess.run(
        [sys.executable, *COMMAND, "--reconnects", "1"], cwd=settings.ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["lost"], found["doubled"], found["resets"], found["dropped"]) == (0, 0, 0, 0)
    assert found["received"] == found["expected"] == 240
    assert found["drained"] == 30
    # Each open stream has its tasks; what is more than these would be left of the 30 that were dropped.
    assert found["after"]["tasks"] < found["before"]["tasks"] + 15
    assert found["after"]["redis_connections"] <= found["before"]["redis_connections"] + 4

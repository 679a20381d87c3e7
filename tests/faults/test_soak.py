"""The soak, short in every run and at full length in the slow ones; and its fake trainer."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from django.conf import settings

from tests.faults import fake_trainer
from tests.faults.fake_trainer import expected_state, find_checkpoint, next_state, save_checkpoint
from tests.faults.soak import parse
from tests.faults.soaking import KILLS, Verdict


def soak(*arguments: str, seconds: float) -> dict[str, str]:
    """The rows of the table that the soak prints; its exit status has to be 0."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.soak", *arguments],
        cwd=settings.ROOT, capture_output=True, text=True, timeout=seconds, check=False,
    )  # fmt: skip
    print(done.stdout, done.stderr[-3000:])
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert "Every invariant holds." in done.stdout
    return dict(re.findall(r"^ *(\S.*?)  +(\S.*)$", done.stdout, re.MULTILINE))


def assert_nothing_lost(rows: dict[str, str], *, kills: int, zombies: int, postgres: int, redis: int) -> None:
    assert (rows["lost"], rows["doubled"], rows["progress rows from fenced attempts"]) == ("0", "0", "0")
    assert rows["succeeded"] == rows["jobs"].split(",")[0]
    assert (rows["kill -9 in all"], rows["zombies in all"]) == (str(kills), str(zombies))
    assert (rows["Postgres immediate restarts"], rows["Redis kills"]) == (str(postgres), str(redis))


@pytest.mark.timeout(900)
def test_twenty_jobs_survive_kills_pauses_and_restarts_of_the_servers() -> None:
    rows = soak(
        "--jobs", "20", "--real", "1", "--kills", "15", "--zombies", "3", "--postgres-kills", "2", "--redis-kills",
        "2", "--limit", "780", "--seed", "17", seconds=840,
    )  # fmt: skip
    assert_nothing_lost(rows, kills=15, zombies=3, postgres=2, redis=2)
    assert rows["adapters of real trainings byte-equal"].startswith("1 of 1, ")


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_250_jobs_survive_200_kills_30_zombies_and_40_restarts_of_the_servers() -> None:
    rows = soak("--limit", "1200", seconds=1400)
    assert_nothing_lost(rows, kills=200, zombies=30, postgres=20, redis=20)
    assert int(rows["succeeded"]) >= 250
    equal, _, of = rows["adapters of real trainings byte-equal"].split(",")[0].partition(" of ")
    assert (equal, of) == ("4", "4")


def test_the_full_numbers_are_the_default() -> None:
    options = parse([])
    assert (options.jobs, options.kills, options.zombies) == (250, 200, 30)
    assert (options.postgres_kills, options.redis_kills, options.workers, options.limit) == (20, 20, 4, 600)
    assert (KILLS.count("trainer"), KILLS.count("worker"), KILLS.count("tree"), len(KILLS)) == (14, 3, 3, 20)


def test_a_violation_stands_below_the_table() -> None:
    assert "Every invariant holds." in Verdict([("jobs", "1")], []).table()
    table = Verdict([("jobs", "1"), ("lost", "1")], ["fake 0 is failed."]).table()
    assert "fake 0 is failed." in table
    assert "Every invariant holds." not in table


def test_the_fake_trainers_state_tells_a_step_that_is_left_out_or_done_twice() -> None:
    state = expected_state(5, 2)
    assert next_state(state, 5, 3) == expected_state(5, 3)
    assert next_state(state, 5, 4) != expected_state(5, 4)
    assert next_state(expected_state(5, 3), 5, 3) != expected_state(5, 3)
    assert expected_state(6, 3) != expected_state(5, 3)


def test_the_fake_trainer_goes_on_from_its_newest_whole_checkpoint(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    assert find_checkpoint(root) == (0, bytes(32))
    for step in (10, 20, 30):
        save_checkpoint(root, step, 1, expected_state(1, step))
    assert sorted(path.name for path in root.iterdir()) == ["20-1", "30-1"]
    (root / "30-1" / "state.bin").write_bytes(b"damaged")
    assert find_checkpoint(root) == (20, expected_state(1, 20))


def test_the_fake_trainer_imports_nothing_that_takes_time() -> None:
    heavy = "{'django', 'torch', 'pydantic', 'numpy', 'psutil'} & set(sys.modules)"
    code = f"import sys, runpy; runpy.run_path({fake_trainer.__file__!r}); print(len({heavy}))"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0"

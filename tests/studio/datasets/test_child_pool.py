"""The processes that look through rows: few, bounded, and no team waits for another's slow questions."""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import signal
import termios
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from studio.datasets import row_searching
from studio.datasets.child_pool import ChildPool
from studio.datasets.kept_child import KeptChild
from studio.datasets.row_searching import MAX_CHILDREN, MEMORY_BYTES, RowSearchBusyError, search_children
from tests.processes import wait_for
from tests.studio.datasets.conftest import good_rows, jsonl
from workers.row_table import write_rows

SECONDS = 6.0
"""That a question waits for its turn; a child that is stopped keeps its own for twice as long."""


@pytest.fixture
def request_of(tmp_path: Path) -> dict[str, Any]:
    source, table = tmp_path / "rows.jsonl", tmp_path / "rows.parquet"
    source.write_bytes(jsonl(good_rows(40)))
    write_rows(source, "messages", {}, table)
    return {
        "path": str(table), "names": [], "format": "messages", "columns": {}, "filters": {}, "order": "line",
        "limit": 5,
    }  # fmt: skip


@pytest.fixture
def make_pool() -> Iterator[Callable[[int], ChildPool]]:
    row_searching._children.close()  # the studio's own, which are kept for longer than a test takes
    made: list[ChildPool] = []

    def make(most: int) -> ChildPool:
        made.append(search_children(most, seconds=SECONDS))
        return made[-1]

    yield make
    for pool in made:
        pool.close()


def searching() -> list[psutil.Process]:
    """The processes that look through rows for this one."""
    found = []
    for one in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended just now, or waits for its parent to see that
            if "workers.row_search" in one.cmdline():
                found.append(one)
    return found


def started_by(pool: ChildPool, asker: str, request: dict[str, Any]) -> psutil.Process:
    """The process that a team's first question has started."""
    known = {one.pid for one in searching()}
    assert pool.ask(asker, request)["num_rows"] == 40
    (process,) = (one for one in searching() if one.pid not in known)
    return process


def wait_until_asked(process: psutil.Process, asked: Future[Any]) -> None:
    """Until a stopped process has a question in its pipe."""
    wait_for(lambda: _num_unread(process) or asked.done(), what="the question")


def _num_unread(process: psutil.Process) -> int:
    found = array.array("i", [0])
    with Path(f"/proc/{process.pid}/fd/0").open("rb", buffering=0) as pipe:
        fcntl.ioctl(pipe, termios.FIONREAD, found)
    return found[0]


def num_reads(process: psutil.Process) -> int:
    """How often a process has read anything, a question for one."""
    return int(process.io_counters().read_count)


def test_a_slow_question_keeps_its_own_team_waiting_and_no_other(
    make_pool: Callable[[int], ChildPool], request_of: dict[str, Any]
) -> None:
    pool = make_pool(2)
    slow = started_by(pool, "slow", request_of)
    started_by(pool, "quick", request_of)
    with ThreadPoolExecutor() as threads:
        os.kill(slow.pid, signal.SIGSTOP)
        try:
            first = threads.submit(pool.ask, "slow", request_of)
            wait_until_asked(slow, first)
            second = threads.submit(pool.ask, "slow", request_of)
            for _ in range(20):
                assert pool.ask("quick", request_of)["num_rows"] == 40
            assert not first.done()
            with pytest.raises(RowSearchBusyError, match="Others are looking through rows"):
                second.result()
        finally:
            os.kill(slow.pid, signal.SIGCONT)
        assert first.result()["num_rows"] == 40


def test_there_are_never_more_processes_than_the_pool_has_and_who_came_first_is_next(
    make_pool: Callable[[int], ChildPool], request_of: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = make_pool(2)
    stopped = [started_by(pool, team, request_of) for team in ("a", "b")]
    ended: list[str] = []

    def answered(child: KeptChild, request: dict[str, Any]) -> dict[str, Any]:
        found = ask_child(child, request)
        ended.append(request["asked_by"])  # while the child is not free: so in the order of the answers
        return found

    ask_child = KeptChild.ask
    monkeypatch.setattr(KeptChild, "ask", answered)

    def ask(team: str) -> None:
        assert pool.ask(team, request_of | {"asked_by": team})["num_rows"] == 40

    with ThreadPoolExecutor() as threads:
        for process in stopped:
            os.kill(process.pid, signal.SIGSTOP)
        try:
            busy = [threads.submit(ask, team) for team in ("a", "b")]
            for process, future in zip(stopped, busy, strict=True):
                wait_until_asked(process, future)
            waiting = [threads.submit(ask, "c")]
            while not pool.num_waiting:
                time.sleep(0.01)
            waiting += [threads.submit(ask, "a"), threads.submit(ask, "d")]
            while pool.num_waiting < 3:
                time.sleep(0.01)
            os.kill(stopped[1].pid, signal.SIGCONT)
            for future in (busy[1], waiting[0], waiting[2]):
                future.result()
            assert ended == ["b", "c", "d"], "and not a, whose own question is under way"
            assert {one.pid for one in searching()} == {one.pid for one in stopped}
        finally:
            for process in stopped:
                os.kill(process.pid, signal.SIGCONT)
        waiting[1].result()
    assert ended[3:] == ["a", "a"]


def test_a_team_gets_the_process_that_knows_its_rows(
    make_pool: Callable[[int], ChildPool], request_of: dict[str, Any]
) -> None:
    pool = make_pool(2)
    first, second = (started_by(pool, team, request_of) for team in ("a", "b"))
    before = num_reads(first), num_reads(second)
    for _ in range(3):
        pool.ask("b", request_of)
    assert num_reads(first) == before[0]
    assert num_reads(second) > before[1]
    # A third one takes over that of the team whose last question is the oldest.
    assert pool.ask("c", request_of)["num_rows"] == 40
    assert num_reads(first) > before[0]
    assert len(searching()) == 2


def test_each_process_is_limited_in_memory(make_pool: Callable[[int], ChildPool], request_of: dict[str, Any]) -> None:
    pool = make_pool(MAX_CHILDREN)
    for number in range(MAX_CHILDREN + 3):
        pool.ask(f"team {number}", request_of)
    assert len(searching()) == MAX_CHILDREN
    assert {one.rlimit(psutil.RLIMIT_AS) for one in searching()} == {(MEMORY_BYTES, MEMORY_BYTES)}

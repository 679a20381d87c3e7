"""The trainer that a slot keeps warm: for whom it stays, and everything that ends it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from django.db.models import F

from jobs import running, trainers
from jobs.models import Job, JobState, Worker
from jobs.running import run_job
from jobs.slots import Slot
from jobs.supervising import Link, follow
from jobs.trainers import Seat, Trainer, Warmth
from studio import storage
from studio.accounts.models import Team, User
from studio.catalogue.models import BaseModel
from tests.factories import make_adapter_folder, make_result
from tests.jobs.making import make_job, make_running_job, make_worker
from tests.processes import has_ended, wait_for

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("data_dir")]

# Speaks the protocol of `python -m workers --resident`. What it does with a job stands in a file beside it.
RESIDENT = """
import json, os, signal, sys, time
from pathlib import Path
fd = int(sys.argv[sys.argv.index("--events") + 1])
def say(**event): os.write(fd, json.dumps(event).encode() + b"\\n")
here = Path(__file__).parent
for line in sys.stdin:
    message = json.loads(line)
    if "job" not in message:
        continue
    with open(here / "processes", "a") as file:
        file.write(f"{os.getpid()}\\n")
    exec((here / "does").read_text())
"""
ENDS_WELL = (
    "say(type='message', text='working')\n"
    "say(type='result', folder=Path(here / 'product').read_text())\n"
    "say(type='ended', exit_status=0, stays=True)\n"
)


@pytest.fixture
def does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Sets what the resident trainer does with its next job; it has a finished product at hand."""
    (tmp_path / "resident.py").write_text(RESIDENT)
    monkeypatch.setattr(running, "RESIDENT_COMMAND", (sys.executable, str(tmp_path / "resident.py")))

    def does(script: str) -> None:
        (tmp_path / "does").write_text(script)
        # Registering a product moves it, so that every job needs one.
        key = make_adapter_folder(result=make_result())
        (tmp_path / "product").write_text(str(storage.adapter_folder(key)))

    does(ENDS_WELL)
    return does


def processes(tmp_path: Path) -> list[int]:
    """The process of each job so far."""
    return [int(pid) for pid in (tmp_path / "processes").read_text().split()]


def lives(pid: int) -> bool:
    try:
        return not has_ended(psutil.Process(pid))
    except psutil.NoSuchProcess:
        return False


def run(job: Job, seat: Seat) -> Job:
    run_job(job, seat=seat)
    job.refresh_from_db()
    return job


@pytest.fixture
def seat() -> Seat:
    seat = Seat(600)
    yield seat
    seat.end()


def test_the_second_job_of_a_team_on_a_base_runs_in_the_process_of_the_first(
    does: Callable[[str], None], seat: Seat, team: Team, bob: User, tmp_path: Path
) -> None:
    first = run(make_running_job(team, bob, name="first"), seat)
    assert seat.warmth == Warmth.wanted_by(first)
    does(ENDS_WELL)
    second = run(make_running_job(team, bob, name="second"), seat)
    assert (first.state, second.state) == (JobState.SUCCEEDED, JobState.SUCCEEDED)
    pids = processes(tmp_path)
    assert len(pids) == 2
    assert pids[0] == pids[1]
    assert lives(pids[0])


@pytest.mark.parametrize("what", ["team", "precision", "base", "revision", "method"])
def test_whatever_differs_ends_the_warm_trainer_before_the_next_job_starts(
    does: Callable[[str], None], seat: Seat, team: Team, other_team: Team, bob: User, charlie: User, tmp_path: Path,
    what: str,
) -> None:  # fmt: skip
    run(make_running_job(team, bob), seat)
    (first,) = processes(tmp_path)
    job = make_running_job(other_team, charlie) if what == "team" else make_running_job(team, bob)
    if what == "precision":
        job.recipe["precision"] = "nf4"
    elif what == "method":
        job.recipe["method"] = "full"
    elif what == "base":
        job.base_model = BaseModel.objects.create(name="another", folder="/elsewhere", revision="2" * 64)
    elif what == "revision":
        job.base_model.revision = "3" * 64
    assert lives(first)
    assert seat.take(job) is None
    assert not lives(first)
    assert seat.warmth is None


@pytest.mark.parametrize(
    "script",
    [
        "say(type='failed', code='diverged', message='No.')\nsay(type='ended', exit_status=1, stays=False)",
        "say(type='failed', code='internal', message='No.')\nsay(type='ended', exit_status=1, stays=True)\nsys.exit(1)",
        "os.kill(os.getpid(), signal.SIGKILL)",
        "say(type='result', folder=(here / 'product').read_text())\nsay(type='ended', exit_status=0, stays=False)",
    ],
    ids=["a failure", "a failure that would stay", "a kill", "a doubt of its own"],
)
def test_after_anything_but_a_clean_end_no_process_is_left(
    does: Callable[[str], None], seat: Seat, team: Team, bob: User, tmp_path: Path, script: str
) -> None:
    does(script)
    run(make_running_job(team, bob), seat)
    assert seat.warmth is None
    assert not lives(processes(tmp_path)[0])


def test_a_job_that_moved_on_leaves_no_warm_trainer(
    does: Callable[[str], None], seat: Seat, team: Team, bob: User, tmp_path: Path
) -> None:
    job = make_running_job(team, bob)

    def move_on(_event: object) -> None:
        Job.objects.filter(pk=job.pk).update(attempt=F("attempt") + 1)

    does("say(type='message', text='working')\ntime.sleep(600)")
    run_job(job, seat=seat, tell=move_on)
    assert seat.warmth is None
    assert not lives(processes(tmp_path)[0])


def test_a_lease_that_is_lost_while_the_product_is_registered_ends_the_trainer(
    does: Callable[[str], None], seat: Seat, team: Team, bob: User, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(job: Job, product: Path) -> None:
        Job.objects.filter(pk=job.pk).update(attempt=F("attempt") + 1)
        raise running.FencedError

    monkeypatch.setattr(running, "register", lose)
    run(make_running_job(team, bob), seat)
    assert seat.warmth is None
    assert not lives(processes(tmp_path)[0])


def test_a_warm_trainer_that_was_killed_costs_the_next_job_nothing(
    does: Callable[[str], None], seat: Seat, team: Team, bob: User, tmp_path: Path
) -> None:
    run(make_running_job(team, bob), seat)
    (first,) = processes(tmp_path)
    psutil.Process(first).kill()
    does(ENDS_WELL)
    job = run(make_running_job(team, bob), seat)
    assert (job.state, job.attempt, job.failures_counted) == (JobState.SUCCEEDED, 1, 0)
    assert processes(tmp_path)[1] != first


def test_a_warm_trainer_that_dies_as_it_is_given_a_job_is_replaced_at_once(
    does: Callable[[str], None], seat: Seat, team: Team, bob: User, tmp_path: Path
) -> None:
    run(make_running_job(team, bob), seat)
    (first,) = processes(tmp_path)
    does(f"os.kill(os.getpid(), signal.SIGKILL) if os.getpid() == {first} else None\n{ENDS_WELL}")
    job = run(make_running_job(team, bob), seat)
    assert (job.state, job.attempt, job.failures_counted) == (JobState.SUCCEEDED, 1, 0)
    assert len(set(processes(tmp_path))) == 2
    assert not lives(first)


def test_an_idle_trainer_ends_when_its_time_is_up_or_memory_is_wanted(
    does: Callable[[str], None], team: Team, bob: User, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seat = Seat(600)
    run(make_running_job(team, bob), seat)
    seat.look_after()
    assert seat.warmth is not None
    assert 0 < seat.seconds_left() <= 600
    monkeypatch.setattr(trainers, "memory_is_scarce", lambda: True)
    seat.look_after()
    assert seat.warmth is None
    assert not lives(processes(tmp_path)[0])
    monkeypatch.setattr(trainers, "memory_is_scarce", lambda: False)
    does(ENDS_WELL)
    run(make_running_job(team, bob), seat)
    seat.seconds = 0.0
    seat.look_after()
    assert seat.warmth is None
    assert not lives(processes(tmp_path)[1])


def test_without_warm_seconds_every_job_has_a_process_of_its_own(
    team: Team, bob: User, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seat = Seat(0)
    job = make_running_job(team, bob)
    assert not seat.may_stay_after(job)
    started: list[list[str]] = []
    monkeypatch.setattr(
        running, "supervise", lambda command, **_: started.append(command) or running.Outcome(exit_status=1)
    )
    run(job, seat)
    assert started[0][:3] == [sys.executable, "-m", "workers"]
    assert "--resident" not in started[0]


def test_a_slot_shows_what_it_holds_and_ends_it_when_it_drains(
    does: Callable[[str], None], team: Team, bob: User, tmp_path: Path
) -> None:
    slot = Slot(0)
    job = make_job(team, bob)
    slot.start()
    try:
        slot.wake()
        wait_for(lambda: Worker.objects.filter(warm_team=team).exists(), what="a warm worker")
        worker = Worker.objects.get(warm_team=team)
        assert (worker.warm_base_id, worker.warm_precision) == (job.base_model_id, job.recipe["precision"])
        (pid,) = processes(tmp_path)
        assert lives(pid)
    finally:
        slot.drain()
        slot.join(timeout=60)
    assert not lives(pid)


def test_a_worker_whose_warm_team_was_deleted_goes_on(team: Team, bob: User) -> None:
    class Held(Seat):
        warmth = Warmth(team_id=10**9, base_model_id=10**9, base_folder="/x", revision="1", precision="nf4")

    slot = Slot(0)
    slot.worker = make_worker()
    slot._seat = Held(600)
    slot._show()
    slot.worker.refresh_from_db()
    assert (slot.worker.warm_team_id, slot.worker.warm_base_id, slot.worker.warm_precision) == (None, None, "")
    slot._lock.close()


def test_what_a_resident_trainer_ends_with_counts_and_not_how_its_process_ends(
    does: Callable[[str], None], team: Team, bob: User, tmp_path: Path
) -> None:
    does("say(type='failed', code='diverged', message='No.')\nsay(type='ended', exit_status=1)\nsys.exit(0)")
    job = make_running_job(team, bob)
    trainer = Trainer(running.RESIDENT_COMMAND, tmp_path / "log")
    trainer.send({"job": {}})
    with Link(job.pk, job.attempt) as link:
        outcome = follow(trainer, link=link)
    assert (outcome.exit_status, outcome.stays, outcome.failed.code) == (1, False, "diverged")
    assert not lives(processes(tmp_path)[0])


def test_a_trainer_is_told_its_job_as_on_its_command_line(
    does: Callable[[str], None], seat: Seat, team: Team, bob: User, tmp_path: Path
) -> None:
    does(f"Path({str(tmp_path / 'told')!r}).write_text(line)\n{ENDS_WELL}")
    job = run(make_running_job(team, bob), seat)
    told = json.loads((tmp_path / "told").read_text())["job"]
    folder = storage.job_folder(job.pk)
    assert told["arguments"] == running.trainer_command(job, folder)[3:]
    assert told["log"] == str(folder / "attempts" / "1" / "trainer.log")

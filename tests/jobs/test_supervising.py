"""The supervisor against real processes that speak the trainer's protocol, well or badly."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from threading import Timer

import psutil
import pytest
import redis
from django.conf import settings
from django.db import connection
from django.db.models import F
from django.db.models.functions import Now
from django.test import Client

from jobs import lifecycle, supervising
from jobs.models import Job
from jobs.progress import stream_key
from jobs.supervising import Link, Outcome, supervise
from studio.accounts.models import ApiToken, Team, User
from studio.embedded import EmbeddedServers
from tests.jobs.making import make_running_job
from tests.processes import has_ended, wait_for

pytestmark = pytest.mark.django_db(transaction=True)

PREAMBLE = """
import json, os, subprocess, sys, time
fd = int(sys.argv[sys.argv.index("--events") + 1])
def say(**event): os.write(fd, json.dumps(event).encode() + b"\\n")
def step(n): say(type="step", step=n, num_steps=9, epoch=0.1, loss=2.0 / n, learning_rate=1e-4, grad_norm=1.0,
                 num_tokens=100 * n, tokens_per_second=50.0, seconds_left=9.0, peak_memory_bytes=1000)
"""


@pytest.fixture
def running(team: Team, bob: User) -> Job:
    return make_running_job(team, bob)


@pytest.fixture
def run(running: Job, tmp_path: Path) -> Callable[..., Outcome]:
    def run(script: str, **options: object) -> Outcome:
        file = tmp_path / "trainer.py"
        file.write_text(PREAMBLE + script)
        with Link(running.pk, running.attempt) as link:
            return supervise([sys.executable, str(file)], link=link, log_file=tmp_path / "trainer.log", **options)

    return run


def test_steps_become_points_and_stream_entries(run: Callable[..., Outcome], running: Job) -> None:
    outcome = run("for n in range(1, 4): step(n)\nsay(type='result', folder='/x')")
    assert (outcome.exit_status, outcome.result.folder) == (0, "/x")
    assert list(running.points.order_by("step").values_list("step", "loss")) == [(1, 2.0), (2, 1.0), (3, 2.0 / 3)]
    entries = redis.Redis.from_url(settings.REDIS_URL).xrange(stream_key(running.pk))
    assert [json.loads(entry[b"event"])["type"] for _, entry in entries] == [
        "phase",
        "step",
        "step",
        "step",
        "result",
    ], "the first is the publisher's own: what an earlier attempt says after it is not shown"
    assert {entry[b"attempt"] for _, entry in entries} == {b"1"}


def test_a_loss_and_a_validation_loss_of_one_step_are_one_point(run: Callable[..., Outcome], running: Job) -> None:
    run("step(2); say(type='validation', step=2, loss=1.7, num_tokens=10)")
    point = running.points.get()
    assert (point.loss, point.validation_loss) == (1.0, 1.7)


def test_a_validation_loss_that_comes_much_later_keeps_the_steps_loss(
    run: Callable[..., Outcome], running: Job
) -> None:
    run("step(2); time.sleep(1.2); say(type='validation', step=2, loss=1.7, num_tokens=10)")
    point = running.points.get()
    assert (point.loss, point.validation_loss, point.num_tokens) == (1.0, 1.7, 200)


def test_it_says_which_signal_ended_the_trainer(run: Callable[..., Outcome]) -> None:
    assert run("os.kill(os.getpid(), 9)").exit_status == -9


def test_what_a_trainer_says_badly_is_noted_and_not_fatal(run: Callable[..., Outcome], running: Job) -> None:
    outcome = run("os.write(fd, b'not json\\n'); say(type='nonsense'); step(1); say(type='result', folder='/x')")
    assert outcome.result is not None
    assert running.points.count() == 1
    assert running.events.filter(level="warning", text__contains="unknown").count() == 2


PLAN = {
    "type": "plan", "device": "cpu", "num_steps": 9, "num_train_rows": 1, "num_held_out_rows": 1,
    "num_skipped_rows": 0, "num_cut_rows": 0, "num_train_tokens": 1, "num_trainable": 1, "num_parameters": 2,
}  # fmt: skip


def test_the_attempt_knows_where_it_went_on_and_how_much_memory_it_took(
    run: Callable[..., Outcome], running: Job
) -> None:
    plan = PLAN | {"resumed_from_step": 5, "micro_batch_size": 2, "accumulation": 4}
    run(f"say(**{plan!r}); step(6); say(type='result', folder='/x')")
    attempt = running.attempts.get()
    assert (attempt.from_step, attempt.peak_memory_bytes) == (5, 1000)
    assert (attempt.micro_batch_size, attempt.accumulation, attempt.micro_batch_tokens) == (2, 4, None)
    assert not running.events.filter(text__contains="micro-batches").exists()


def test_a_bound_on_the_tokens_of_a_micro_batch_is_told_and_stored(
    run: Callable[..., Outcome], running: Job, team: Team, bob: User, client: Client
) -> None:
    plan = PLAN | {"micro_batch_size": 6, "accumulation": 3, "micro_batch_tokens": 4096}
    run(f"say(**{plan!r}); step(6); say(type='result', folder='/x')")
    attempt = running.attempts.get()
    assert (attempt.micro_batch_size, attempt.accumulation, attempt.micro_batch_tokens) == (6, 3, 4096)
    text = running.events.get(text__contains="micro-batches").text
    assert "in micro-batches of at most 4,096 tokens, or of one longer row" in text
    assert "3 in the first step." in text
    _, secret = ApiToken.issue(team=team, user=bob, name="ci", scopes=["read"])
    found = client.get(f"/api/v1/jobs/{running.pk}/", headers={"Authorization": f"Bearer {secret}"}).json()["plan"]
    assert (found["micro_batch_size"], found["accumulation"], found["micro_batch_tokens"]) == (6, 3, 4096)


def test_a_wish_to_stop_reaches_the_trainer(run: Callable[..., Outcome], running: Job, bob: User) -> None:
    Timer(0.5, lambda: (lifecycle.ask_stop(running, bob, "now"), connection.close())).start()
    outcome = run(
        "mode = json.loads(sys.stdin.readline())['stop']; say(type='stopped', mode=mode, step=4); sys.exit(75)"
    )
    assert (outcome.asked, outcome.stopped.step, outcome.exit_status) == ("now", 4, 75)


def test_a_drained_worker_leaves_stop_and_keep_to_whoever_goes_on(run: Callable[..., Outcome], running: Job) -> None:
    Job.objects.filter(pk=running.pk).update(state="cancelling", stop_mode="keep")
    outcome = run(
        "asked = json.loads(sys.stdin.readline())['stop']\nsay(type='stopped', mode=asked, step=4)",
        is_draining=lambda: True,
    )
    assert (outcome.asked, outcome.stopped.mode) == ("checkpoint", "checkpoint")


def test_a_drained_worker_asks_its_trainer_for_a_checkpoint(run: Callable[..., Outcome]) -> None:
    outcome = run(
        "mode = json.loads(sys.stdin.readline())['stop']; say(type='stopped', mode=mode, step=4); sys.exit(75)",
        is_draining=lambda: True,
    )
    assert outcome.stopped.mode == "checkpoint"


def test_a_trainer_that_ignores_a_stop_is_killed(
    run: Callable[..., Outcome], running: Job, bob: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("jobs.supervising").supervising.STOP_SECONDS, "now", 0.5)
    lifecycle.ask_stop(running, bob, "now")
    outcome = run("time.sleep(600)")
    assert (outcome.asked, outcome.exit_status) == ("now", -9)


def test_a_fenced_trainer_is_killed_with_everything_it_started(
    run: Callable[..., Outcome], running: Job, tmp_path: Path
) -> None:
    started: list[psutil.Process] = []

    def fence(_event: object) -> None:
        """At its first step, when everything is there that is to be killed."""
        started.extend(psutil.Process(int(pid)) for pid in (tmp_path / "pids").read_text().split())
        Job.objects.filter(pk=running.pk).update(attempt=F("attempt") + 1)

    outcome = run(
        f"""
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open({str(tmp_path / "pids")!r}, "w").write(f"{{os.getpid()}} {{child.pid}}")
step(1)
time.sleep(600)
""",
        tell=fence,
    )
    assert outcome.is_fenced
    assert len(started) == 2
    wait_for(lambda: all(has_ended(process) for process in started), what="the end of both")


def test_no_progress_of_a_fenced_attempt_is_stored(run: Callable[..., Outcome], running: Job) -> None:
    Job.objects.filter(pk=running.pk).update(attempt=F("attempt") + 1)
    outcome = run("step(1); time.sleep(600)")
    assert outcome.is_fenced
    assert not running.points.exists()


def test_without_a_database_the_trainer_is_stopped_before_its_lease_ends(
    run: Callable[..., Outcome], running: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*args: object) -> None:
        raise lifecycle_error

    from django.db import OperationalError

    lifecycle_error = OperationalError("the server does not answer")
    monkeypatch.setattr(lifecycle, "heartbeat", unreachable)
    assert 0 < supervising.LEASE_SHARE < 1
    # Whatever the share is: a smaller one leaves a busy machine more time to kill it in.
    monkeypatch.setattr(supervising, "LEASE_SHARE", 0.2)
    started = time.monotonic()
    outcome = run("time.sleep(600)")
    assert outcome.is_fenced
    assert time.monotonic() - started < settings.LEASE_SECONDS


def test_a_trainer_that_makes_no_progress_is_stopped(run: Callable[..., Outcome], settings: object) -> None:
    settings.STALL_SECONDS = 1.0
    assert run("time.sleep(600)").is_stalled


def test_a_trainer_gets_no_credentials(run: Callable[..., Outcome], tmp_path: Path) -> None:
    run(f"json.dump(dict(os.environ), open({str(tmp_path / 'environment')!r}, 'w'))")
    seen = json.loads((tmp_path / "environment").read_text())
    assert not [name for name in seen if name in {"DATABASE_URL", "REDIS_URL", "STUDIO_SECRET_KEY"}]
    assert os.environ["DATABASE_URL"] not in seen.values()
    assert seen["HF_HUB_OFFLINE"] == "1"


def test_a_redis_that_is_gone_costs_no_progress(
    run: Callable[..., Outcome], running: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = redis.Redis.from_url("unix:///nowhere/valkey.sock")
    monkeypatch.setattr("jobs.progress._client", lambda: nowhere)
    outcome = run("for n in range(1, 6): step(n)\nsay(type='result', folder='/x')")
    assert outcome.exit_status == 0
    assert running.points.count() == 5


def test_a_redis_that_hangs_delays_nobody(
    own_redis: EmbeddedServers, run: Callable[..., Outcome], running: Job
) -> None:
    server = psutil.Process(own_redis.pids()["valkey"])
    server.suspend()
    # It ends while Redis still hangs.
    outcome = run("for n in range(1, 200): step(n)\nsay(type='result', folder='/x')")
    server.resume()
    assert outcome.exit_status == 0
    assert running.points.count() == 199


def test_a_row_that_cannot_be_stored_costs_neither_the_lease_nor_the_other_rows(
    run: Callable[..., Outcome], running: Job
) -> None:
    outcome = run(
        "say(type='message', text='a' + chr(0) + 'b')\n"
        "say(type='step', step=3_000_000_000, num_steps=9, epoch=0.1, loss=1.0, learning_rate=1e-4, grad_norm=1.0,"
        " num_tokens=1, tokens_per_second=1.0, seconds_left=1.0, peak_memory_bytes=1)\n"
        "step(1); time.sleep(1.2); step(2); time.sleep(1.2); say(type='result', folder='/x')"
    )
    assert (outcome.exit_status, outcome.is_fenced) == (0, False)
    assert sorted(running.points.values_list("step", flat=True)) == [1, 2]


def test_the_lease_is_renewed_while_the_trainer_works(run: Callable[..., Outcome], running: Job) -> None:
    Job.objects.filter(pk=running.pk).update(lease_until=Now() + timedelta(seconds=1))
    run("time.sleep(1.5); say(type='result', folder='/x')")
    running.refresh_from_db()
    assert running.lease_until > lifecycle.database_now()

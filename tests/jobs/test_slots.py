"""A slot that stops, and what the rest of the studio hears of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from django.conf import settings

from jobs import tasks, waking
from jobs.estimating import choose_device, live_devices
from jobs.slots import Slot
from tests.jobs.making import make_worker
from tests.processes import test_environment


@pytest.mark.django_db(transaction=True)
def test_a_draining_worker_says_so_and_no_estimate_counts_on_it(data_dir: Path) -> None:
    slot = Slot(0)
    slot.worker = make_worker()
    slot.drain()
    assert live_devices() == [slot.worker], "a signal handler asks no database"
    slot.drain(announce=True)
    slot.worker.refresh_from_db()
    assert slot.worker.is_draining
    assert not choose_device().is_live


@pytest.mark.django_db(transaction=True)
def test_a_slot_that_never_registered_drains_without_a_row(data_dir: Path) -> None:
    slot = Slot(0)
    slot.drain(announce=True)
    slot.start()
    slot.join(timeout=60)
    assert not slot.is_alive()


def test_a_wake_up_in_a_signal_handler_that_interrupts_a_wake_up_holds_nobody_up(data_dir: Path) -> None:
    """As when SIGTERM comes while a message wakes the slot: both in a worker's main thread."""
    script = """
import signal, sys, threading, django
django.setup()
from jobs import slots
slot = slots.Slot(7)
signal.signal(signal.SIGALRM, lambda *_: slot.wake())
signal.setitimer(signal.ITIMER_REAL, 0.0001, 0.0001)
for _ in range(200_000):
    slot.wake()
signal.setitimer(signal.ITIMER_REAL, 0)
slot._forget_wakes()
print("went on")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=settings.ROOT, env=test_environment(), capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.stdout == "went on\n", done.stderr


@pytest.mark.django_db
def test_a_busy_worker_hands_a_wake_up_on_until_every_worker_had_it(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    monkeypatch.setattr(waking.app, "send_task", lambda name, kwargs, **_: sent.append(kwargs["hops"]))
    for index in range(3):
        make_worker(index)
    hops = 0
    while True:
        tasks.look_at_queue(hops)
        if len(sent) == hops:
            break
        hops = sent[-1]
    assert sent == [1, 2], "three workers get one message between them"

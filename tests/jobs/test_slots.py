"""A slot that stops, and what the rest of the studio hears of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.estimating import choose_device, live_devices
from jobs.slots import Slot
from tests.jobs.making import make_worker


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
    slot.join(timeout=10)
    assert not slot.is_alive()

"""Devices as worker rows show them."""

from __future__ import annotations

import subprocess

import psutil
import pytest

from jobs import hardware
from jobs.hardware import find_device
from studio.devices import Device


def test_without_a_gpu_a_slot_is_the_cpu_with_the_machines_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    device = find_device(0)
    assert (device.kind, device.memory_bytes) == ("cpu", psutil.virtual_memory().total)
    assert device.name.startswith("CPU, ")


def test_a_slot_takes_the_gpu_of_its_own_number(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = [Device(slot=i, kind="cuda", name=f"GPU {i}", visible=str(i)) for i in range(2)]
    monkeypatch.setattr(hardware, "find_devices", lambda: gpus)
    monkeypatch.setattr(hardware, "_gpu_memory", lambda device: (device.slot + 1) * 10**9)
    assert (find_device(1).name, find_device(1).memory_bytes) == ("GPU 1", 2 * 10**9)


def test_a_slot_that_sees_one_gpu_takes_that_one(monkeypatch: pytest.MonkeyPatch) -> None:
    only = [Device(slot=0, kind="cuda", name="GPU of slot 3", visible="3")]
    monkeypatch.setattr(hardware, "find_devices", lambda: only)
    monkeypatch.setattr(hardware, "_gpu_memory", lambda device: 10**9)
    assert find_device(3).name == "GPU of slot 3"


def test_a_foreign_process_on_the_gpu_is_named() -> None:
    with subprocess.Popen(["sleep", "600"]) as own, subprocess.Popen(["sleep", "600"]) as foreign:
        try:
            held = {own.pid: 12 * 10**9, foreign.pid: 50 * 10**9, 2**22 + 1: None}
            found = hardware.users_of(held, {own.pid})
        finally:
            own.kill()
            foreign.kill()
    assert [(user["name"], user["num_bytes"]) for user in found] == [
        ("sleep", 50 * 10**9),
        ("a process of another container", 0),
    ]

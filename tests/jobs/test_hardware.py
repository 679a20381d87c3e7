"""Devices as worker rows show them."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

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


class _Driver:
    """A driver with one GPU of 80 GB, on which 62 GB are in use."""

    def __init__(self, processes: list[tuple[int, int | None]]) -> None:
        self.processes = processes

    def nvmlDeviceGetMemoryInfo(self, handle: object) -> SimpleNamespace:
        return SimpleNamespace(total=80 * 10**9, free=18 * 10**9)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: object) -> list[SimpleNamespace]:
        return [SimpleNamespace(pid=pid, usedGpuMemory=num_bytes) for pid, num_bytes in self.processes]

    def nvmlDeviceGetGraphicsRunningProcesses(self, handle: object) -> list[SimpleNamespace]:
        return []


def use_driver(monkeypatch: pytest.MonkeyPatch, processes: list[tuple[int, int | None]]) -> None:
    @contextmanager
    def driver(device: Device) -> Iterator[tuple[_Driver, object]]:
        yield _Driver(processes), None

    gpu = Device(slot=0, kind="cuda", name="GPU", visible="0")
    monkeypatch.setattr(hardware, "find_devices", lambda: [gpu])
    monkeypatch.setattr(hardware, "_nvml", driver)


def test_a_foreign_process_on_the_gpu_is_named_and_its_memory_is_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    with subprocess.Popen(["sleep", "600"]) as own, subprocess.Popen(["sh", "-c", "sleep 600 & echo $!; exit"],
                                                                     stdout=subprocess.PIPE) as shell:  # fmt: skip
        try:
            assert shell.stdout is not None
            foreign = int(shell.stdout.readline())
            shell.wait()
            use_driver(monkeypatch, [(own.pid, 12 * 10**9), (foreign, 50 * 10**9), (2**22 + 1, None)])
            reading = hardware.read_memory(0)
        finally:
            own.kill()
            psutil.Process(foreign).kill()
    assert (reading.free_bytes, reading.used_by_others_bytes) == (30 * 10**9, 50 * 10**9)
    assert [(user.name, user.num_bytes) for user in reading.users] == [
        ("sleep", 50 * 10**9),
        ("a process of another container", 0),
    ]


def test_on_a_cpu_the_machines_memory_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    reading = hardware.read_memory(0)
    total = psutil.virtual_memory().total
    assert 0 < reading.free_bytes <= total
    assert reading.free_bytes + reading.used_by_others_bytes == total
    assert reading.users == []

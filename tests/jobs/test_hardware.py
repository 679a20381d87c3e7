"""Devices as worker rows show them."""

from __future__ import annotations

import subprocess
from types import SimpleNamespace

import psutil
import pynvml
import pytest

from jobs import hardware
from jobs.hardware import GpuMeter, find_device
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


class FakeNvml:
    """The calls of NVML that are used, by their real names and errors, about a card of 80 GB."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.processes: list[SimpleNamespace] = []
        self.used, self.num_inits, self.num_shutdowns, self.is_lost = 0, 0, 0, False
        for name in ("nvmlInit", "nvmlShutdown", "nvmlDeviceGetHandleByIndex", "nvmlDeviceGetMemoryInfo",
                     "nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetUtilizationRates",
                     "nvmlDeviceGetTemperature"):  # fmt: skip
            assert callable(getattr(pynvml, name))
            monkeypatch.setattr(pynvml, name, getattr(self, name))

    def nvmlInit(self) -> None:
        self.num_inits += 1

    def nvmlShutdown(self) -> None:
        self.num_shutdowns += 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        if self.is_lost:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        return index

    def nvmlDeviceGetMemoryInfo(self, _handle: int, version: int) -> SimpleNamespace:
        assert version == pynvml.nvmlMemory_v2
        return SimpleNamespace(total=80 * 10**9, reserved=10**9, used=self.used)

    def nvmlDeviceGetComputeRunningProcesses(self, _handle: int) -> list[SimpleNamespace]:
        return self.processes

    def nvmlDeviceGetUtilizationRates(self, _handle: int) -> SimpleNamespace:
        return SimpleNamespace(gpu=93, memory=40)

    def nvmlDeviceGetTemperature(self, _handle: int, _sensor: int) -> int:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)


def test_a_gpus_figures_come_from_nvml_which_is_started_once(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml(monkeypatch)
    meter = GpuMeter(Device(slot=0, kind="cuda", name="GPU", visible="0"))
    nvml.used = 30 * 10**9
    nvml.processes = [SimpleNamespace(pid=7, usedGpuMemory=20 * 10**9), SimpleNamespace(pid=9, usedGpuMemory=10**10)]
    reading = meter.read({1, 7})
    assert (reading.used_by_own_bytes, reading.used_by_others_bytes) == (20 * 10**9, 10**10)
    assert reading.free_memory_bytes == 69 * 10**9, "without what the driver keeps and what others hold"
    assert (reading.utilisation_percent, reading.temperature_celsius) == (93, None)
    meter.read({1, 7})
    assert (nvml.num_inits, nvml.num_shutdowns) == (1, 0)


def test_a_gpu_that_is_lost_is_an_error_and_is_asked_for_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml(monkeypatch)
    meter = GpuMeter(Device(slot=0, kind="cuda", name="GPU", visible="0"))
    nvml.is_lost = True
    with pytest.raises(pynvml.NVMLError):
        meter.read({1})
    nvml.is_lost = False
    assert meter.read({1}).used_by_own_bytes == 0
    assert (nvml.num_inits, nvml.num_shutdowns) == (2, 1)

"""What device a slot trains on, how much memory it has, and who uses it; found without torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import psutil

from studio.devices import Device, find_devices


@dataclass(frozen=True)
class SlotDevice:
    """A device as a worker's row shows it. `memory_bytes` is the GPU's, or the machine's for a CPU."""

    kind: str
    name: str
    memory_bytes: int


def find_device(slot: int) -> SlotDevice:
    """The device of a slot. A process that CUDA_VISIBLE_DEVICES limits to one GPU sees it as its only device."""
    device = _device_of(slot)
    if device.kind == "cuda":
        return SlotDevice(kind="cuda", name=device.name, memory_bytes=_gpu_memory(device))
    return SlotDevice(kind="cpu", name=f"CPU, {device.name}", memory_bytes=psutil.virtual_memory().total)


@dataclass(frozen=True)
class MemoryUser:
    """A process that holds memory of a GPU and is not this worker's. `num_bytes` is 0 where the driver does not say."""

    name: str
    process_id: int
    num_bytes: int


@dataclass(frozen=True)
class MemoryReading:
    """What a job could have of a slot's device now. This worker's own processes, a trainer kept warm for one, count as
    free: they make room when a job comes."""

    free_bytes: int
    used_by_others_bytes: int
    users: list[MemoryUser] = field(default_factory=list)

    def values(self) -> dict[str, Any]:
        """The reading as fields of a worker's row."""
        return {
            "free_memory_bytes": self.free_bytes,
            "used_by_others_bytes": self.used_by_others_bytes,
            "memory_users": [asdict(user) for user in self.users],
        }


def read_memory(slot: int) -> MemoryReading:
    """Who uses the memory of a slot's device now: a GPU's by process, the machine's for a CPU."""
    device = _device_of(slot)
    own = _own_processes()
    if device.kind != "cuda":
        memory = psutil.virtual_memory()
        held = sum(_resident_bytes(process) for process in own.values())
        free = min(memory.total, memory.available + held)
        return MemoryReading(free_bytes=free, used_by_others_bytes=memory.total - free)
    with _nvml(device) as (nvml, handle):
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        found = [
            *nvml.nvmlDeviceGetComputeRunningProcesses(handle),
            *nvml.nvmlDeviceGetGraphicsRunningProcesses(handle),
        ]
    by_id = {int(one.pid): int(one.usedGpuMemory or 0) for one in found}
    held = sum(num_bytes for process_id, num_bytes in by_id.items() if process_id in own)
    free = min(int(memory.total), int(memory.free) + held)
    users = [
        MemoryUser(_process_name(process_id), process_id, num_bytes)
        for process_id, num_bytes in by_id.items()
        if process_id not in own
    ]
    users.sort(key=lambda user: user.num_bytes, reverse=True)
    return MemoryReading(free_bytes=free, used_by_others_bytes=int(memory.total) - free, users=users)


def _device_of(slot: int) -> Device:
    devices = find_devices()
    return devices[slot] if slot < len(devices) else devices[0]


def _own_processes() -> dict[int, psutil.Process]:
    this = psutil.Process()
    return {process.pid: process for process in (this, *this.children(recursive=True))}


def _resident_bytes(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


def _process_name(process_id: int) -> str:
    """A process's name; the driver also names processes of other containers, which cannot be looked at from here."""
    try:
        return psutil.Process(process_id).name()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return "a process of another container"


@contextmanager
def _nvml(device: Device) -> Iterator[tuple[Any, Any]]:
    """The driver's interface and its handle of a device."""
    import pynvml

    pynvml.nvmlInit()
    try:
        handle = (
            pynvml.nvmlDeviceGetHandleByIndex(int(device.visible))
            if device.visible.isdigit()
            else pynvml.nvmlDeviceGetHandleByUUID(device.visible)
        )
        yield pynvml, handle
    finally:
        pynvml.nvmlShutdown()


def _gpu_memory(device: Device) -> int:
    with _nvml(device) as (nvml, handle):
        return int(nvml.nvmlDeviceGetMemoryInfo(handle).total)

"""What device a slot trains on and how it is doing, found without torch: by NVML for a GPU, by psutil for a CPU."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from typing import Any

import psutil

from studio.devices import Device, find_devices

# What a driver and its contexts hold without any process that could be named; less than this is nobody's.
UNNOTICED_BYTES = 256 * 1024**2
CPU_SENSORS = ("coretemp", "k10temp", "zenpower", "cpu_thermal")


@dataclass(frozen=True)
class SlotDevice:
    """A device as a worker's row shows it. `memory_bytes` is the GPU's, or the machine's for a CPU."""

    kind: str
    name: str
    memory_bytes: int


@dataclass(frozen=True)
class Reading:
    """A device at one moment, in the columns of a worker's row; None for what cannot be found out here.

    `free_memory_bytes` is what a job could use: everything but what others hold. What this worker and its trainer
    hold now (`used_by_own_bytes`) is part of it, because a new job takes its place.
    """

    free_memory_bytes: int
    used_by_others_bytes: int
    used_by_own_bytes: int
    temperature_celsius: float | None
    utilisation_percent: float | None
    memory_users: list[dict[str, Any]] = field(default_factory=list)
    """Processes of others on a GPU, the largest first: name, process_id, num_bytes (0 where the driver is silent)."""


def find_device(slot: int) -> SlotDevice:
    """The device of a slot. A process that CUDA_VISIBLE_DEVICES limits to one GPU sees it as its only device."""
    device = device_of(slot)
    if device.kind == "cuda":
        return SlotDevice(kind="cuda", name=device.name, memory_bytes=_gpu_memory(device))
    return SlotDevice(kind="cpu", name=f"CPU, {device.name}", memory_bytes=psutil.virtual_memory().total)


def device_of(slot: int) -> Device:
    """The device that belongs to a slot of this process."""
    devices = find_devices()
    return devices[slot] if slot < len(devices) else devices[0]


def own_processes() -> set[int]:
    """The process ids of this process and everything that it started."""
    return {os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))}


def meter_for(slot: int) -> CpuMeter | GpuMeter:
    """What reads the device of a slot."""
    device = device_of(slot)
    return GpuMeter(device) if device.kind == "cuda" else CpuMeter()


class CpuMeter:
    """Reads the machine's memory and the load of all its cores."""

    def __init__(self) -> None:
        # The first answer is meaningless: the figure is the load since the call before.
        psutil.cpu_percent()

    def read(self, own: Set[int]) -> Reading:
        """The machine now; `own` are the process ids that belong to this worker."""
        memory = psutil.virtual_memory()
        held = min(sum(_resident_bytes(pid) for pid in own), memory.total)
        return Reading(
            free_memory_bytes=min(memory.available + held, memory.total),
            used_by_others_bytes=max(0, memory.total - memory.available - held),
            used_by_own_bytes=held,
            temperature_celsius=_cpu_temperature(),
            utilisation_percent=psutil.cpu_percent(),
        )


def _resident_bytes(pid: int) -> int:
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0  # It has ended since it was listed.


def _cpu_temperature() -> float | None:
    sensors: Callable[[], Mapping[str, Any]] = getattr(psutil, "sensors_temperatures", dict)
    found = [one.current for name, ones in sensors().items() if name in CPU_SENSORS for one in ones]
    return max(found) if found else None


class GpuMeter:
    """Reads one GPU by NVML, which stays initialised between two readings."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self._others_before = 0
        self._is_ready = False

    def read(self, own: Set[int]) -> Reading:
        """The GPU now; `own` are the process ids that belong to this worker.

        Raises:
            pynvml.NVMLError: the driver does not answer, or the GPU has fallen off the bus; the next call starts anew.
        """
        import pynvml

        try:
            if not self._is_ready:
                pynvml.nvmlInit()
                self._is_ready = True
            handle = _handle(self.device)
            total, used = _memory(handle)
            processes = _asked(lambda: pynvml.nvmlDeviceGetComputeRunningProcesses(handle)) or []
            by_id = {int(one.pid): one.usedGpuMemory for one in processes}
            held, others = attribute_memory(used, by_id, own, others_before=self._others_before)
            self._others_before = others
            load = _asked(lambda: pynvml.nvmlDeviceGetUtilizationRates(handle))
            warmth = _asked(lambda: pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU))
        except pynvml.NVMLError:
            self.close()
            raise
        return Reading(
            free_memory_bytes=max(0, total - others),
            used_by_others_bytes=others,
            used_by_own_bytes=held,
            temperature_celsius=None if warmth is None else float(warmth),
            utilisation_percent=None if load is None else float(load.gpu),
            memory_users=users_of(by_id, own),
        )

    def close(self) -> None:
        """Let go of the driver."""
        import pynvml

        if self._is_ready:
            self._is_ready = False
            with contextlib.suppress(pynvml.NVMLError):
                pynvml.nvmlShutdown()


def attribute_memory(
    used: int, processes: Mapping[int, int | None], own: Set[int], *, others_before: int
) -> tuple[int, int]:
    """(held by this worker, held by others) in bytes, of what is used on a GPU.

    Args:
        used: bytes in use, without what the driver keeps for itself.
        processes: bytes by the process ids that the driver names; None where it does not say how many.
        own: process ids of this worker and everything that it started, itself among them.
        others_before: the answer of the last call. In a container the driver names process ids of another namespace,
            or none: while a trainer of ours runs there, others are taken to hold what they held before it began.
    """
    mine = [amount for pid, amount in processes.items() if pid in own]
    if mine:
        named = sum(amount or 0 for pid, amount in processes.items() if pid not in own)
        held = sum(amount or 0 for amount in mine)
        # What a driver gives no figure for, or hides behind a namespace, is in `used` and in no process.
        others = max(named, used - held) if None not in mine else named
    else:
        others = used if len(own) <= 1 else min(used, others_before)
    if others < UNNOTICED_BYTES:
        others = 0
    return max(0, used - others), others


def users_of(processes: Mapping[int, int | None], own: Set[int]) -> list[dict[str, Any]]:
    """The processes that hold memory of a GPU and are not this worker's, the largest first."""
    found = [
        {"name": _process_name(pid), "process_id": pid, "num_bytes": int(amount or 0)}
        for pid, amount in processes.items()
        if pid not in own
    ]
    return sorted(found, key=lambda one: int(one["num_bytes"]), reverse=True)


def _process_name(pid: int) -> str:
    """A process's name; the driver also names processes of other containers, which cannot be looked at from here."""
    try:
        return psutil.Process(pid).name()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return "a process of another container"


def _memory(handle: Any) -> tuple[int, int]:
    """(total, in use) of a GPU; what the driver keeps for itself counts as neither, where it says so."""
    import pynvml

    try:
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2)
        return int(memory.total - memory.reserved), int(memory.used)
    except (pynvml.NVMLError_NotSupported, pynvml.NVMLError_FunctionNotFound):
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        return int(memory.total), int(memory.used)


def _asked(question: Callable[[], Any]) -> Any:
    """An answer of NVML; None where this GPU or this container does not give it."""
    import pynvml

    try:
        return question()
    except (pynvml.NVMLError_NotSupported, pynvml.NVMLError_NoPermission, pynvml.NVMLError_FunctionNotFound):
        return None


def _handle(device: Device) -> Any:
    import pynvml

    if device.visible.isdigit():
        return pynvml.nvmlDeviceGetHandleByIndex(int(device.visible))
    return pynvml.nvmlDeviceGetHandleByUUID(device.visible)


def _gpu_memory(device: Device) -> int:
    import pynvml

    pynvml.nvmlInit()
    try:
        return int(pynvml.nvmlDeviceGetMemoryInfo(_handle(device)).total)
    finally:
        pynvml.nvmlShutdown()

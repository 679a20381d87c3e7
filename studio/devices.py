"""Which devices this machine can train on, asked without torch: the launcher must stay small."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True)
class Device:
    """What one trainer runs on. `visible` is its value for CUDA_VISIBLE_DEVICES; empty for the CPU."""

    slot: int
    kind: str
    name: str
    visible: str

    def sentence(self) -> str:
        if self.kind == "cuda":
            return f"GPU {self.visible}: {self.name}"
        return f"No GPU found: training on the CPU ({self.name})."


def find_devices() -> list[Device]:
    """The NVIDIA GPUs that CUDA_VISIBLE_DEVICES leaves, in its order; without any the CPU. Never empty."""
    gpus = _allowed(_nvidia_gpus(), os.environ.get("CUDA_VISIBLE_DEVICES"))
    if not gpus:
        num = num_cores()
        return [Device(slot=0, kind="cpu", name=f"{num} core{'s' if num != 1 else ''}", visible="")]
    return [Device(slot=slot, kind="cuda", name=name, visible=str(index)) for slot, (index, _, name) in enumerate(gpus)]


def num_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def boot_id() -> str:
    """Names this start of the machine: another one after each boot, and the same for all of its processes."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"boot-{psutil.boot_time():.0f}"


def can_train() -> bool:
    """Whether the worker half is installed here; looked up, not imported."""
    return all(importlib.util.find_spec(name) is not None for name in ("torch", "transformers", "peft"))


def _nvidia_gpus() -> list[tuple[int, str, str]]:
    """(index, uuid, name) of every GPU that the driver reports; none without a driver."""
    if importlib.util.find_spec("pynvml") is None:
        return []
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        handles = [(index, pynvml.nvmlDeviceGetHandleByIndex(index)) for index in range(pynvml.nvmlDeviceGetCount())]
        return [(index, pynvml.nvmlDeviceGetUUID(one), pynvml.nvmlDeviceGetName(one)) for index, one in handles]
    finally:
        pynvml.nvmlShutdown()


def _allowed(gpus: list[tuple[int, str, str]], visible: str | None) -> list[tuple[int, str, str]]:
    """As CUDA reads the variable: unset is all; at the first entry that names no GPU the list ends."""
    if visible is None:
        return gpus
    chosen: list[tuple[int, str, str]] = []
    for entry in (part.strip() for part in visible.split(",")):
        match = next((gpu for gpu in gpus if entry == str(gpu[0]) or (entry and gpu[1].startswith(entry))), None)
        if match is None:
            break
        chosen.append(match)
    return chosen

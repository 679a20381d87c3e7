"""What device a slot trains on and how much memory it has, found without torch."""

from __future__ import annotations

from dataclasses import dataclass

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
    devices = find_devices()
    device = devices[slot] if slot < len(devices) else devices[0]
    if device.kind == "cuda":
        return SlotDevice(kind="cuda", name=device.name, memory_bytes=_gpu_memory(device))
    return SlotDevice(kind="cpu", name=f"CPU, {device.name}", memory_bytes=psutil.virtual_memory().total)


def _gpu_memory(device: Device) -> int:
    import pynvml

    pynvml.nvmlInit()
    try:
        handle = (
            pynvml.nvmlDeviceGetHandleByIndex(int(device.visible))
            if device.visible.isdigit()
            else pynvml.nvmlDeviceGetHandleByUUID(device.visible)
        )
        return int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)
    finally:
        pynvml.nvmlShutdown()

"""Whether a GPU failed while a job ran on it, as its driver tells it."""

from __future__ import annotations

import logging
from types import TracebackType
from typing import Any

from jobs.models import Worker
from studio.devices import Device, find_devices

logger = logging.getLogger(__name__)

# Errors that the driver reports of the card and not of the program that ran on it (NVIDIA, "Xid Errors").
HARDWARE_XIDS = {
    48: "a memory error that it could not correct",
    63: "a row of its memory that had to be replaced",
    64: "a row of its memory that could not be replaced",
    74: "an error of its NVLink",
    79: "it has fallen off the bus",
    94: "a memory error that it could contain",
    95: "a memory error that it could not contain",
    119: "its system processor does not answer",
    120: "an error of its system processor",
}


def _handle(device: Device) -> Any:
    import pynvml

    if device.visible.isdigit():
        return pynvml.nvmlDeviceGetHandleByIndex(int(device.visible))
    return pynvml.nvmlDeviceGetHandleByUUID(device.visible)


class GpuWatch:
    """What the driver says of a worker's GPU from here to `fault`; of a worker on a CPU nothing.

    A driver that does not answer costs no job: what cannot be read is left out.
    """

    def __init__(self, worker: Worker | None) -> None:
        self._worker = worker if worker is not None and worker.device_kind == "cuda" else None
        self._device: Device | None = None
        self._events: Any = None
        self._ecc_errors: int | None = None

    def __enter__(self) -> GpuWatch:
        if self._worker is None:
            return self
        import pynvml

        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            logger.warning("The driver does not answer, so the GPU's health is not watched: %s", error)
            return self
        devices = find_devices()
        self._device = devices[self._worker.slot] if self._worker.slot < len(devices) else devices[0]
        try:
            handle = _handle(self._device)
            self._ecc_errors = self._read_ecc(handle)
            events = pynvml.nvmlEventSetCreate()
            pynvml.nvmlDeviceRegisterEvents(handle, pynvml.nvmlEventTypeXidCriticalError, events)
            self._events = events
        except pynvml.NVMLError as error:
            logger.info("The driver does not report Xid errors of this GPU: %s", error)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._device is None:
            return
        import pynvml

        try:
            if self._events is not None:
                pynvml.nvmlEventSetFree(self._events)
            pynvml.nvmlShutdown()
        except pynvml.NVMLError as failure:
            logger.warning("The driver could not be left in order: %s", failure)

    def fault(self) -> str:
        """What has happened to the card since the watch began, in words; empty when it is well."""
        if self._device is None:
            return ""
        import pynvml

        try:
            handle = _handle(self._device)
            found = [f"Xid {number}, {HARDWARE_XIDS[number]}" for number in self._xids() if number in HARDWARE_XIDS]
            errors = self._read_ecc(handle)
            if errors is not None and self._ecc_errors is not None and errors > self._ecc_errors:
                found.append(f"{errors - self._ecc_errors} memory errors that it could not correct (ECC)")
        except (pynvml.NVMLError_GpuIsLost, pynvml.NVMLError_NotFound):
            return f"GPU {self._device.visible} is lost to the driver"
        except pynvml.NVMLError as error:
            logger.warning("The driver does not tell how the GPU is: %s", error)
            return ""
        return f"GPU {self._device.visible} reports {'; '.join(found)}" if found else ""

    def _xids(self) -> list[int]:
        """The numbers of the errors that were reported since the watch began."""
        import pynvml

        numbers: list[int] = []
        while self._events is not None:
            try:
                event = pynvml.nvmlEventSetWait_v2(self._events, 0)
            except pynvml.NVMLError_Timeout:
                break
            numbers.append(int(event.eventData))
        return numbers

    @staticmethod
    def _read_ecc(handle: Any) -> int | None:
        """Uncorrectable memory errors since the driver was loaded; None for a card without error correction."""
        import pynvml

        try:
            return int(
                pynvml.nvmlDeviceGetTotalEccErrors(
                    handle, pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC
                )
            )
        except pynvml.NVMLError_NotSupported:
            return None

"""`python -m tests.bench.gpu_figures`: what the page Workers shows of GPU 0, at rest and while programs hold memory.

Two programs take memory of the GPU: one that this process starts, as a worker starts its trainer, and one in a session
of its own whose parent is not this process, as somebody else's would be. Needs an NVIDIA GPU and torch.
"""

from __future__ import annotations

import subprocess
import sys
import time

from jobs.hardware import GpuMeter, Reading, meter_for, own_processes

GIB = 1024**3
HOLD = (
    "import sys, time, torch; held = torch.empty(int({gib} * 2**30), dtype=torch.uint8, device='cuda');"
    " torch.cuda.synchronize(); print('ready', flush=True); time.sleep({seconds})"
)
# Orphaned at once, so that it is no descendant of whoever started it.
STRAY = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', sys.argv[1]], start_new_session=True)"


def show(title: str, reading: Reading) -> None:
    amounts = (reading.used_by_own_bytes, reading.used_by_others_bytes, reading.free_memory_bytes)
    own, others, free = (f"{amount / GIB:.2f} GiB" for amount in amounts)
    print(f"{title}: own {own}, others {others}, a job could use {free},", end=" ")
    print(f"{reading.temperature_celsius} °C, {reading.utilisation_percent} %")


def main() -> None:
    meter = meter_for(0)
    if not isinstance(meter, GpuMeter):
        sys.exit("This machine has no NVIDIA GPU that this process may use.")
    began = time.perf_counter()
    show("at rest", meter.read(own_processes()))
    print(f"the first reading took {1000 * (time.perf_counter() - began):.0f} ms")
    began = time.perf_counter()
    meter.read(own_processes())
    print(f"the next one {1000 * (time.perf_counter() - began):.1f} ms")
    own = subprocess.Popen([sys.executable, "-c", HOLD.format(gib=8, seconds=60)], stdout=subprocess.PIPE, text=True)
    assert own.stdout is not None
    own.stdout.readline()
    show("a trainer of this worker holds 8 GiB", meter.read(own_processes()))
    subprocess.run([sys.executable, "-c", STRAY, HOLD.format(gib=16, seconds=25)], check=True)
    time.sleep(15)
    show("and somebody else's program 16 GiB", meter.read(own_processes()))
    own.kill()
    own.wait()
    time.sleep(1)
    show("the trainer has ended", meter.read(own_processes()))
    meter.close()


if __name__ == "__main__":
    main()

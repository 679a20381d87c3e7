"""The device that trains: which one, how much memory, what it can compute, and its seeds."""

from __future__ import annotations

import os
import platform
import random
import resource
import sys
from pathlib import Path

import numpy as np
import torch

THREADS_VARIABLE = "STUDIO_TRAINER_THREADS"
"""Environment variable: threads that one trainer may use on the CPU."""


def choose_device() -> torch.device:
    """The first CUDA device, or the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def device_name(device: torch.device) -> str:
    """The device in words for people."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return f"{model or platform.processor() or platform.machine()} (CPU, {torch.get_num_threads()} threads)"


def memory_bytes(device: torch.device) -> int:
    """All memory of the device; for a CPU the machine's, or the container's or this process's where that is limited."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    of_process = resource.getrlimit(resource.RLIMIT_AS)[0]
    if of_process != resource.RLIM_INFINITY:
        total = min(total, of_process)
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text("ascii").strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total


def free_memory_bytes(device: torch.device) -> int:
    """What this process can still take of a GPU's memory: what nobody has, within the share of the whole that it is
    limited to, and what its allocator holds unused in pieces that it could give back. The others are the ends of what
    is used, too small for much."""
    available, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    ends = torch.cuda.memory_stats(device).get("inactive_split_bytes.all.current", 0)
    allowed = int(total * torch.cuda.get_per_process_memory_fraction(device)) - reserved
    return min(int(available), allowed) + reserved - torch.cuda.memory_allocated(device) - int(ends)


def free_host_bytes() -> int:
    """What a process can still take of the machine's memory, or of the container's where that is limited; 0 where the
    system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
    except OSError:
        return 0
    found = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), 0)
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text("ascii").strip()
        current = int((group / "memory.current").read_text("ascii"))
        lines = (group / "memory.stat").read_text("ascii").splitlines()
    except OSError:
        return found
    # Pages of files that were read, as of a model's weights, give way.
    files = next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)
    return max(0, min(found, int(limit) - current + files)) if limit.isdigit() else found


def free_page_locked_memory() -> None:
    """Gives page-locked memory that no tensor uses back to the host; torch keeps it for the next one otherwise."""
    # The public name is younger than the oldest torch that is taken.
    empty = getattr(torch.accelerator, "empty_host_cache", None) or getattr(torch._C, "_host_emptyCache", None)
    if empty is not None and torch.cuda.is_initialized():
        empty()


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory in use so far: tensors on a GPU, the whole process on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def supports_bfloat16(device: torch.device) -> bool:
    """Whether the device computes in bfloat16 without emulating it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())


def set_threads(num_threads: int | None = None) -> int:
    """Limits the CPU threads of this process, to the argument or the environment's STUDIO_TRAINER_THREADS."""
    wanted = num_threads or int(os.environ.get(THREADS_VARIABLE) or 0)
    if wanted > 0:
        torch.set_num_threads(wanted)
    return torch.get_num_threads()


def seed_everything(seed: int) -> None:
    """Seeds every source of random numbers and asks for deterministic kernels where there are any."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Without this every fresh tensor would be filled first, which deterministic results do not need here.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]

"""What this machine's CPU can do."""

from __future__ import annotations

from functools import cache
from pathlib import Path


def cpu_has_fast_bfloat16() -> bool:
    """Whether this machine's CPU multiplies bfloat16 in hardware (AVX512-BF16, AMX or Arm's extension)."""
    return bool(cpu_words() & {"avx512_bf16", "amx_bf16", "bf16"})


@cache
def cpu_words() -> frozenset[str]:
    """What Linux says of this machine's CPU, its extensions among it; empty elsewhere."""
    try:
        return frozenset(Path("/proc/cpuinfo").read_text("utf-8", "replace").lower().split())
    except OSError:
        return frozenset()

"""How fast GPUs are by their makers' data sheets."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """`flops`: dense peak of the 16-bit tensor cores in FLOP/s. `bandwidth`: of its memory in bytes a second."""

    flops: float
    bandwidth: float


# By a part of the device's name; the first that is found counts.
_KNOWN: tuple[tuple[str, Gpu], ...] = (
    ("B200", Gpu(2250e12, 8.0e12)), ("H200", Gpu(989e12, 4.8e12)), ("H100", Gpu(989e12, 3.35e12)),
    ("A100", Gpu(312e12, 2.0e12)), ("L40S", Gpu(362e12, 0.864e12)), ("L40", Gpu(181e12, 0.864e12)),
    ("L4", Gpu(121e12, 0.3e12)), ("A10", Gpu(125e12, 0.6e12)), ("A6000", Gpu(155e12, 0.768e12)),
    ("5090", Gpu(210e12, 1.79e12)), ("4090", Gpu(165e12, 1.01e12)), ("3090", Gpu(71e12, 0.936e12)),
    ("V100", Gpu(125e12, 0.9e12)), ("T4", Gpu(65e12, 0.32e12)),
)  # fmt: skip
_UNKNOWN = Gpu(80e12, 0.5e12)


def gpu_named(name: str) -> Gpu:
    """What is known of a device; modest figures where it is unknown."""
    return next((gpu for part, gpu in _KNOWN if part in name), _UNKNOWN)

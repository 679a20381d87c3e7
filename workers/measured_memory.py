"""What finished runs held in memory corrects the arithmetic for the next ones.

The arithmetic (workers/memory.py) is a sum of parts, and each part may be off by a share of its own: with the peaks of
finished runs, peak = sum over parts of (1 + share) x part is fitted by ridge regression on what each part is of the
whole. Three fits stand on one another, each on what the one before it left unexplained: all runs on a device, those of
the same method and precision, and of these those on a base of the same shape. The penalty draws every share to 0, which
is the arithmetic as it stands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from workers.ridge import ridge
from workers.shapes import ModelShape

PENALTY = 0.2
"""Parts are shares of a whole, so that a run weighs about 0.5: one run moves the fit by seven tenths of its error,
three by nine. On our own rows (tests/bench/rows/estimates) the error on unseen recipes is lowest from 0.1 to 0.5."""
MIN_POOLED = 3
"""Runs on a device, of whomever, below which they say nothing about those of another method."""
LARGEST_CHANGE = 2.0
"""A correction never more than doubles or halves what the arithmetic says."""

Kind = Literal["cuda", "cpu"]
Basis = Literal["arithmetic", "device", "method", "like"]


@dataclass(frozen=True)
class MemoryParts:
    """Bytes by the arithmetic: weights, their gradients and moments; activations; and what the process holds anyway."""

    fixed: int
    activations: int
    runtime: int

    @property
    def total(self) -> int:
        return self.fixed + self.activations + self.runtime

    def shares(self, kind: Kind) -> dict[str, float]:
        """The parts of the whole that a peak contains: on a GPU it counts tensors, on a CPU the whole process."""
        found = {"fixed": self.fixed / self.total, "activations": self.activations / self.total}
        return found if kind == "cuda" else found | {"runtime": self.runtime / self.total}


@dataclass(frozen=True)
class MeasuredRun:
    """A finished run: what the arithmetic had said of it, and its peak in bytes (workers.devices.peak_memory_bytes)."""

    shape: str
    method: str
    precision: str
    kind: Kind
    device: str
    parts: MemoryParts
    peak_bytes: int
    is_own: bool = True
    """Whether it is the team's own; those of others count only for the whole device."""

    @property
    def held_bytes(self) -> int:
        """The peak as the arithmetic counts it, with what a GPU's driver holds beside the tensors."""
        return self.peak_bytes + (self.parts.runtime if self.kind == "cuda" else 0)


@dataclass(frozen=True)
class Correction:
    """By which share each part of the arithmetic is off, and which runs say so.

    `num_runs` are runs of the same method and precision on a base of the same shape when `basis` is "like", those of
    the same method for "method", all runs on the device for "device"; none for "arithmetic".
    """

    shares: Mapping[str, float]
    num_runs: int
    basis: Basis

    def total(self, parts: MemoryParts) -> int:
        """Bytes that a run of these parts should hold."""
        values = {"fixed": parts.fixed, "activations": parts.activations, "runtime": parts.runtime}
        changed = parts.total + sum(share * values[part] for part, share in self.shares.items())
        return round(min(max(changed, parts.total / LARGEST_CHANGE), parts.total * LARGEST_CHANGE))


NO_CORRECTION = Correction({}, 0, "arithmetic")


@dataclass(frozen=True)
class MeasuredMemory:
    """What has been measured on one kind of device: `correction(shape, method, precision)`."""

    of_device: Correction
    of_methods: Mapping[tuple[str, str], Correction]
    of_bases: Mapping[tuple[str, str, str], Correction]

    def correction(self, shape: str, method: str, precision: str) -> Correction:
        """That of the runs which are most like it."""
        return (
            self.of_bases.get((shape, method, precision)) or self.of_methods.get((method, precision)) or self.of_device
        )


def shape_key(shape: ModelShape) -> str:
    """What bases of the same sizes have in common, fine-tuned copies of each other for one."""
    return f"{shape.family}-{shape.num_layers}x{shape.hidden_size}-{shape.vocabulary_size}"


def learn_memory(runs: Sequence[MeasuredRun], device: str) -> MeasuredMemory:
    """What runs on the device say; those on other devices are left out."""
    runs = [run for run in runs if run.device == device and run.peak_bytes > 0]
    own = [run for run in runs if run.is_own]
    of_device = _fit(NO_CORRECTION, runs, "device") if len(runs) >= MIN_POOLED else NO_CORRECTION
    by_method: dict[tuple[str, str], list[MeasuredRun]] = {}
    by_base: dict[tuple[str, str, str], list[MeasuredRun]] = {}
    for run in own:
        by_method.setdefault((run.method, run.precision), []).append(run)
        by_base.setdefault((run.shape, run.method, run.precision), []).append(run)
    of_methods = {key: _fit(of_device, group, "method") for key, group in by_method.items()}
    of_bases = {key: _fit(of_methods[key[1:]], group, "like") for key, group in by_base.items()}
    return MeasuredMemory(of_device, of_methods, of_bases)


def held_out_errors(runs: Sequence[MeasuredRun], unseen: Sequence[MeasuredRun]) -> tuple[list[float], list[float]]:
    """|expected / measured - 1| of unseen runs: by the arithmetic alone, and as `runs` correct it."""
    by_arithmetic, corrected = [], []
    for run in unseen:
        correction = learn_memory(runs, run.device).correction(run.shape, run.method, run.precision)
        by_arithmetic.append(abs(run.parts.total / run.held_bytes - 1))
        corrected.append(abs(correction.total(run.parts) / run.held_bytes - 1))
    return by_arithmetic, corrected


def _fit(before: Correction, runs: Sequence[MeasuredRun], basis: Basis) -> Correction:
    """The correction `before` with what it leaves unexplained of these runs."""
    rows = [run.parts.shares(run.kind) for run in runs]
    missing = [
        run.held_bytes / run.parts.total - 1 - sum(before.shares.get(part, 0.0) * share for part, share in row.items())
        for run, row in zip(runs, rows, strict=True)
    ]
    found = ridge(rows, missing, PENALTY)
    shares = {part: before.shares.get(part, 0.0) + found.get(part, 0.0) for part in {*before.shares, *found}}
    return Correction(shares, len(runs), basis)

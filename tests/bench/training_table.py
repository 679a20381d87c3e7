"""The lines of `tests.bench.training` and `tests.bench.peers` as one table, with what each peer is held against."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

REFERENCES: dict[tuple[str, str, str, str, int, int | None], float] = {
    # (contender, shape, method, checkpointing, rows of a step, tokens of every row): tokens per second
    ("naive", "8b", "lora", "default", 16, None): 1987,
    ("naive", "8b", "qlora", "default", 16, None): 1474,
    ("trl", "8b", "lora", "default", 16, None): 6355,
    ("trl", "8b", "lora", "off", 16, None): 9187,
    ("trl", "8b", "qlora", "default", 16, None): 5917,
    ("unsloth", "8b", "lora", "default", 16, None): 10070,
    ("unsloth", "8b", "lora", "off", 16, None): 14598,
    ("unsloth", "8b", "qlora", "default", 16, None): 9236,
    ("unsloth", "8b", "qlora", "off", 16, None): 14471,
    ("naive", "8b", "qlora", "default", 1, 2048): 2445,
    ("trl", "8b", "qlora", "default", 1, 2048): 2435,
    ("unsloth", "8b", "qlora", "default", 1, 2048): 4333,
    ("trl", "1b", "lora", "off", 16, None): 34934,
    ("unsloth", "1b", "lora", "off", 16, None): 42927,
}
"""What the peers gave in a survey made before any of our engine was: NVIDIA H100 80GB, 2026-11-23, torch 2.11.0+cu130,
transformers 5.17.0, trl 1.15.0, unsloth 2026.10.9, the same settings, shapes and distribution of lengths."""
LEAST_OF_REFERENCE = 0.9
"""A peer counts only when it gives this share of its reference: else something of it is not as it should be."""


@dataclass(frozen=True)
class Measured:
    """A contender's rows of one name: the first line, and medians over all of them."""

    row: dict[str, Any]
    tokens_per_second: float
    peak_gib: float
    num_runs: int

    @property
    def is_ours(self) -> bool:
        return bool(self.row["contender"] == "ours")

    @property
    def task(self) -> tuple[str, str, int, int | None]:
        """What two contenders must have in common to be compared."""
        return self.row["shape"], self.row["method"], self.row["batch"], self.row["length"]

    @property
    def reference(self) -> float | None:
        """Tokens per second that a peer is known to give in these settings."""
        shape, method, batch, length = self.task
        return REFERENCES.get((self.row["contender"], shape, method, self.row.get("checkpointing", ""), batch, length))

    @property
    def counts(self) -> bool:
        """Whether it may stand for its contender; one that was never measured before may."""
        return self.reference is None or self.tokens_per_second >= LEAST_OF_REFERENCE * self.reference

    @property
    def label(self) -> str:
        rows = f"{self.row['length']} tokens" if self.row["length"] else "mixed"
        ways = ", ".join([str(self.row["blocks"]), *self._options])
        return f"{self.row['contender']} ({ways}) | {self.row['shape']} | {self.row['method']} | {rows}"

    @property
    def _options(self) -> list[str]:
        """What of ours is not as it is when nothing is said."""
        at_once, dropout = self.row.get("at_once", self.row["batch"]), self.row.get("dropout", 0.0)
        return [
            *([f"{at_once} rows at once"] if at_once != self.row["batch"] else []),
            *([f"dropout {dropout:g}"] if dropout else []),
            *(["all recomputed"] if self.row.get("lean") else []),
            *([f"within {within:g} GiB"] if (within := self.row.get("memory_gib")) else []),
            *(["inputs offloaded"] if "offload" in self.row.get("kept", {}) else []),
            *(["launches recorded"] if self.row.get("recorded") else []),
        ]


def read(folder: Path) -> list[Measured]:
    """What a folder has, by name."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.json")):
        for line in path.read_text("utf-8").splitlines():
            row = json.loads(line)
            found.setdefault(row["name"], []).append(row)
    return [
        Measured(
            rows[0], median(one["tokens_per_second"] for one in rows), median(one["peak_gib"] for one in rows),
            len(rows),
        )
        for rows in found.values()
    ]  # fmt: skip


def table(folder: Path) -> str:
    """All that was measured, a peer with its share of its reference, and ours against each peer on the same task."""
    found = read(folder)
    lines = [
        "| contender | shape | method | rows | precision | trained | tokens/s | peak GiB | step | steps | of known |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in sorted(found, key=lambda one: (one.task[:2], one.task[2], one.task[3] or 0, not one.is_ours)):
        share = "" if one.reference is None else f"{one.tokens_per_second / one.reference:.0%}"
        share += "" if one.counts else ", does not count"
        lines.append(
            f"| {one.label} | {one.row['precision']} | {one.row['num_trainable'] / 1e6:.1f} M "
            f"| {one.tokens_per_second:,.0f} | {one.peak_gib:.2f} "
            f"| {one.row['tokens_per_step']:,} | {one.row['steps']} | {share} |"
        )
    pairs = [
        (mine, peer) for mine in found for peer in found if mine.is_ours and not peer.is_ours and mine.task == peer.task
    ]
    if pairs:
        lines += ["", *_ratios(pairs)]
    devices = sorted({one.row["device"] for one in found})
    return "\n".join([*lines, "", f"Measured on {', '.join(devices)}."])


def _ratios(pairs: list[tuple[Measured, Measured]]) -> list[str]:
    lines = [
        "| ours | against | shape | method | rows | times its tokens/s | share of its peak |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for mine, peer in pairs:
        rate = mine.tokens_per_second / peer.tokens_per_second
        doubt = "" if peer.counts else " (the peer does not count)"
        lines.append(
            f"| {mine.label.split(' | ')[0]} | {peer.label} | {rate:.2f}{doubt} | {mine.peak_gib / peer.peak_gib:.2f} |"
        )
    return lines

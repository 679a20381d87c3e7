"""How long the way back through gate and up takes on a GPU, with its two thin products made apart and at once: a JSON
line each.

    python -m tests.bench.gated --shape 8b
    python -m tests.bench.gated --shape 8b --tune

Tokens are those of a step of the training benchmark. Milliseconds are the least of several launches that were recorded
as a CUDA graph, so that no launch waits for the host; `off` is how far results are from those made apart.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import astuple
from itertools import product
from typing import Any

import torch
from torch import Tensor

from tests.bench.workload import ALL_SHAPES, BATCH, RANK, row_lengths
from workers.blocks import gated_kernels, kernels
from workers.blocks.attention_choice import milliseconds_of
from workers.blocks.distance import distance
from workers.blocks.gated_kernels import TILES, Tile
from workers.blocks.operands import Activation
from workers.blocks.sizes import PAD
from workers.errors import first_line

LAUNCHES = 10


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.gated", description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", choices=sorted(ALL_SHAPES), default="8b")
    parser.add_argument("--batch", type=int, default=BATCH, help="rows of a step")
    parser.add_argument("--rank", type=int, default=RANK, help="of gate's branch, and of up's")
    parser.add_argument("--activation", choices=["silu", "gelu_tanh"], default="silu")
    parser.add_argument("--tune", action="store_true", help="at once with other tiles, too")
    options = parser.parse_args()
    num_tokens = sum(row_lengths(options.batch, None))
    work = Work(num_tokens, ALL_SHAPES[options.shape]["intermediate_size"], options.rank, options.activation)
    work.print_apart()
    usual = TILES[16 if options.rank <= 16 else 32]
    for tile in (usual, *others(usual)) if options.tune else (usual,):
        work.print_at_once(tile)


def others(usual: Tile) -> Iterator[Tile]:
    """Tiles besides the usual one whose programs have room on a multiprocessor: each number that a thread has of a tile
    takes some seven registers."""
    for tokens, columns, warps, stages, programs in product((16, 32), (256, 512), (4, 8, 16), (2, 3, 4), (1, 2)):
        tile = Tile(tokens, columns, warps, stages, programs)
        has_registers = 7 * tokens * columns <= 32 * warps * tile.registers
        shared_bytes = 3 * 2 * tokens * columns * stages * programs
        if has_registers and 8 <= warps * programs <= 16 and shared_bytes <= 2**18 and tile != usual:
            yield tile


class Work:
    """Random gradients, gate and up of a shape."""

    def __init__(self, num_tokens: int, width: int, rank: int, activation: Activation) -> None:
        torch.manual_seed(17)
        self._width, self._ranks, self._activation = width, (rank, rank), activation
        self._given = _drawn(num_tokens, width), _drawn(num_tokens, 2 * width + PAD)
        self._gradient, self._joined = (one.clone() for one in self._given)
        self._thin = _drawn(num_tokens, 2 * rank)
        self._side = _drawn(2 * width, PAD)
        self._side[:width, rank:] = self._side[width:, :rank] = self._side[:, 2 * rank :] = 0
        self._expected = self._once(self._apart)

    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """The gradient; gate and up; and the room behind them."""
        return self._gradient, self._joined[:, : 2 * self._width], self._joined[:, 2 * self._width :]

    def _pointwise(self) -> None:
        gradient, gate_up, _ = self._parts()
        kernels.gated_backward(gradient, gate_up, self._activation)

    def _thin_product(self) -> None:
        _, gate_up, room = self._parts()
        torch.mm(gate_up, self._side, out=room)

    def _by_side(self) -> list[Tensor]:
        _, gate_up, _ = self._parts()
        joined = torch.mm(gate_up.T, self._thin, out_dtype=torch.float32)
        return [joined[: self._width, : self._ranks[0]], joined[self._width :, self._ranks[0] :]]

    def _apart(self) -> list[Tensor]:
        self._pointwise()
        self._thin_product()
        return self._by_side()

    def _at_once(self, tile: Tile) -> list[Tensor]:
        gradient, gate_up, room = self._parts()
        return list(
            gated_kernels.gated_backward(
                gradient, gate_up, self._activation, self._side, self._thin, self._ranks, room, tile
            )
        )

    def _once(self, run: Callable[[], list[Tensor]]) -> list[Tensor]:
        """Results from what was drawn; to be timed, launches go on with what the last one left."""
        for own, given in zip((self._gradient, self._joined), self._given, strict=True):
            own.copy_(given)
        by_sides = run()
        return [*(one.clone() for one in self._parts()), *by_sides]

    def print_apart(self) -> None:
        """Measures the three launches, each by itself and all together."""
        line: dict[str, Any] = {"way": "apart", "tokens": self._gradient.shape[0], "width": self._width}
        line |= {
            "pointwise_ms": _milliseconds(self._pointwise),
            "thin_ms": _milliseconds(self._thin_product),
            "by_side_ms": _milliseconds(self._by_side),
            "all_ms": _milliseconds(self._apart),
        }
        print(json.dumps(line), flush=True)

    def print_at_once(self, tile: Tile) -> None:
        """Measures and prints; says what went wrong where a tile is too large."""
        line: dict[str, Any] = {"way": "at once", "tile": astuple(tile)}
        try:
            found = self._once(lambda: self._at_once(tile))
            off = max(distance([one], [two]) for one, two in zip(found, self._expected, strict=True))
            line |= {"off": round(off, 5), "all_ms": _milliseconds(lambda: self._at_once(tile))}
        except Exception as error:  # noqa: BLE001 - of a compiler, which has many
            line["error"] = first_line(error)
        print(json.dumps(line), flush=True)


def _drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16, device="cuda")


def _milliseconds(launch: Callable[[], Any]) -> float:
    def launches() -> None:
        for _ in range(LAUNCHES):
            launch()

    return round(milliseconds_of(launches, torch.device("cuda", 0)) / LAUNCHES, 4)


if __name__ == "__main__":
    main()

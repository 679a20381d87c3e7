"""How long attention of packed rows takes on a GPU, by torch's FlashAttention-2 and by our kernels: a JSON line each.

    python -m tests.bench.attention --shape 8b
    python -m tests.bench.attention --shape 8b --tune

Rows are those of a step of the training benchmark. Milliseconds are the least of several launches that were recorded
as a CUDA graph, so that no launch waits for the host; `off` is how far results are from torch's.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from tests.bench.workload import ALL_SHAPES, BATCH, row_lengths
from workers.blocks import attention, row_attention
from workers.blocks.attention_choice import milliseconds_of
from workers.blocks.distance import distance
from workers.blocks.row_attention import TILES, Tile, Tiles
from workers.blocks.rows import Attended, Rows, Sight

LAUNCHES = 10


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.attention", description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", choices=sorted(ALL_SHAPES), default="8b")
    parser.add_argument("--batch", type=int, default=BATCH, help="rows of a step")
    parser.add_argument("--length", type=int, help="every row has this many tokens")
    parser.add_argument("--tune", action="store_true", help="our kernels with other tiles, too")
    options = parser.parse_args()
    work = Work(ALL_SHAPES[options.shape], row_lengths(options.batch, options.length))
    work.print_line("flash", TILES)
    for tiles in (TILES, *others()) if options.tune else (TILES,):
        work.print_line("rows", tiles)


def others() -> Iterator[Tiles]:
    """Tiles besides the usual ones, each for one kernel; of large ones, four warps have too few registers."""
    for queries, keys, warps, stages in product((32, 64, 128), (32, 64, 128), (4, 8), (2, 3, 4)):
        tile = Tile(queries, keys, warps, stages)
        if warps == 8 or queries * keys <= 64 * 64:
            yield from (replace(TILES, **{name: tile}) for name in asdict(TILES) if getattr(TILES, name) != tile)


class Work:
    """Random heads of a shape, and the rows that they belong to."""

    def __init__(self, sizes: dict[str, int], lengths: list[int]) -> None:
        num_heads, num_key_heads = sizes["num_attention_heads"], sizes["num_key_value_heads"]
        size = sizes["head_dim"]
        self._parts = (num_heads, num_key_heads, num_key_heads)
        self._sight = Sight(size**-0.5)
        self._rows = Rows.of(lengths, torch.device("cuda"))
        torch.manual_seed(17)
        self._joined, self._gradient = (
            torch.randn(self._rows.num_tokens, heads, size, dtype=torch.bfloat16, device="cuda")
            for heads in (sum(self._parts), num_heads)
        )
        self._into = torch.empty_like(self._joined)
        angles = torch.randn(self._rows.num_tokens, size // 2, device="cuda").repeat(1, 2)
        self._angles = angles.cos().to(torch.bfloat16), angles.sin().to(torch.bfloat16)
        self._expected = self._both_ways("flash", TILES)

    def _forward(self, kernel: str, tiles: Tiles) -> Attended:
        given = self._joined.split(self._parts, dim=1)
        if kernel == "flash":
            return attention.attend(*given, self._rows, self._sight)
        return row_attention.attend(*given, self._rows, self._sight, torch.empty_like(self._gradient), tiles)

    def _backward(self, kernel: str, tiles: Tiles, attended: Attended) -> None:
        given = (self._gradient, *self._joined.split(self._parts, dim=1), attended, self._rows, self._sight)
        into = self._into.split(self._parts, dim=1)
        if kernel == "flash":
            attention.attend_backward(*given, into, self._angles)
        else:
            row_attention.attend_backward(*given, into, self._angles, tiles)

    def _both_ways(self, kernel: str, tiles: Tiles) -> list[Tensor]:
        attended = self._forward(kernel, tiles)
        self._backward(kernel, tiles, attended)
        return [attended.out_TGD.clone(), self._into.clone()]

    def print_line(self, kernel: str, tiles: Tiles) -> None:
        """Measures and prints; says what went wrong where tiles are too large."""
        line: dict[str, Any] = {"kernel": kernel, "tokens": self._rows.num_tokens, "rows": self._rows.num_rows}
        if kernel == "rows":
            line |= {name: list(one.values()) for name, one in asdict(tiles).items()}
        try:
            found = self._both_ways(kernel, tiles)
            attended = self._forward(kernel, tiles)
            line |= {
                "off": round(max(distance([one], [two]) for one, two in zip(found, self._expected, strict=True)), 5),
                "forward_ms": round(_milliseconds(lambda: self._forward(kernel, tiles)), 4),
                "backward_ms": round(_milliseconds(lambda: self._backward(kernel, tiles, attended)), 4),
            }
        except Exception as error:  # noqa: BLE001 - of a compiler, which has many
            line["error"] = str(error).splitlines()[0]
        print(json.dumps(line), flush=True)


def _milliseconds(launch: Callable[[], Any]) -> float:
    def launches() -> None:
        for _ in range(LAUNCHES):
            launch()

    return milliseconds_of(launches, torch.device("cuda", 0)) / LAUNCHES


if __name__ == "__main__":
    main()

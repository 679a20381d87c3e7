"""A recipe's steps with hand-written blocks: what they hold and how long they take, from the dataset's facts."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from workers.blocks.keeping import (
    FILLING_TOKENS,
    IN_FLIGHT,
    SAFETY,
    Keeping,
    free_bytes_for,
    is_scarce,
    offloading_wins,
)
from workers.blocks.sizes import launches_take_longer
from workers.facts import DatasetFacts, DeviceFacts
from workers.gpus import gpu_named
from workers.hand_written import Blocks, is_hand_written
from workers.hand_written_memory import CONTEXT_BYTES, LOSS_SHARE, Held, StepTokens, held, least_bytes
from workers.hand_written_time import StepWork, step_work
from workers.methods import Method
from workers.recipe import Precision, Recipe
from workers.shapes import ModelShape

ENOUGH_SLOWDOWN = 1.4
"""How many times as long a step may take in memory that is enough as in a whole device: about what it costs to compute
every block twice, in micro-batches that just fill the device."""


def blocks_of(method: Method, settings: Any, precision: Precision, shape: ModelShape, kind: str) -> Blocks | None:
    """The hand-written blocks that a recipe takes; None where the model's own do it."""
    return Blocks.of(shape, method, settings) if is_hand_written(method, precision, shape, kind) else None


def room_beside_weights(shape: ModelShape, precision: Precision, device: DeviceFacts) -> int:
    """Bytes beside the weights of a base on a GPU, for low-rank branches: whatever the method, in families with
    hand-written blocks."""
    if device.kind != "cuda" or precision != "bfloat16":
        return 0
    return Blocks.room_of(shape)


@dataclass(frozen=True)
class HandWrittenRun:
    """What steps hold, and on a GPU the least with which they work, what is enough not to be much slower (both None on
    a CPU, where nothing is chosen by memory), and what they do."""

    held: Held
    least: int | None
    enough: int | None
    rows_at_once: int
    work: StepWork | None
    work_with_memory: StepWork | None
    """What they would do with memory to keep everything."""

    def step_seconds(self, device: DeviceFacts) -> float:
        """Seconds of a step on a GPU."""
        assert self.work is not None
        return self.work.seconds(gpu_named(device.name), device.pace)

    def slowdown(self, device: DeviceFacts) -> float:
        """How many times as long a step takes on a GPU as with memory to keep everything."""
        assert self.work_with_memory is not None
        return self.step_seconds(device) / self.work_with_memory.seconds(gpu_named(device.name), device.pace)


def run_of(
    recipe: Recipe,
    blocks: Blocks,
    dataset: DatasetFacts,
    device: DeviceFacts,
    *,
    num_steps: int,
    num_trainable: int,
    has_virtual_tokens: bool,
    element: int,
    precision: Precision,
    fixed_bytes: int,
) -> HandWrittenRun:
    """How a recipe's steps are computed beside `fixed_bytes` of weights, adapter and optimizer."""
    training = recipe.training
    batch, length = training.batch_size, training.max_length
    asked = batch if training.micro_batch_size == "auto" else min(training.micro_batch_size, batch)
    step = StepTokens(
        mean=batch * dataset.mean_after_cut(length),
        most=dataset.largest_step(batch, length, num_steps),
        longest=dataset.longest_after_cut(length),
        num_rows=batch,
        rows_at_once=asked,
    )
    loss_share = 1.0 if training.loss_on == "all" else LOSS_SHARE
    is_quantised = precision == "nf4"
    on_gpu = device.kind == "cuda"
    is_lean = training.gradient_checkpointing is True

    def held_with(free_bytes: int | None, *, is_recorded: bool = False) -> Held:
        return held(
            blocks, step, element=element, kind=device.kind, is_quantised=is_quantised, loss_share=loss_share,
            is_lean=is_lean, is_recorded=is_recorded, free_bytes=free_bytes,
        )  # fmt: skip

    if not on_gpu:
        return HandWrittenRun(held_with(None), None, None, asked, None, None)
    gpu, layer_weights = gpu_named(device.name), blocks.num_weights / blocks.shape.num_layers
    costs, hides = blocks.costs(element), blocks.hides_copies(element)
    least = least_bytes(
        blocks, step, element=element, kind=device.kind, is_quantised=is_quantised, loss_share=loss_share
    )

    def held_in(free_bytes: int) -> Held:
        found = held_with(free_bytes)
        is_small = launches_take_longer(layer_weights, found.tokens, peak_flops=gpu.flops)
        if not is_small or training.neftune_alpha or has_virtual_tokens:
            return found
        recorded = held_with(free_bytes, is_recorded=True)
        offloads = hides and offloading_wins(
            costs, num_tokens=found.tokens, recorded_tokens=recorded.tokens, is_lean=is_lean
        )
        return found if offloads else recorded

    def work_of(held: Held) -> StepWork:
        return step_work(
            blocks, held, num_trainable=num_trainable, loss_share=loss_share, is_quantised=is_quantised,
            element=element, weighted_length=dataset.weighted_after_cut(length),
        )  # fmt: skip

    def seconds_in(free_bytes: int) -> float:
        return work_of(held_in(free_bytes)).seconds(gpu, device.pace)

    free_bytes = device.memory_bytes - CONTEXT_BYTES - fixed_bytes
    enough = _filling_bytes(blocks, step, element=element, is_quantised=is_quantised)
    longest_wait = ENOUGH_SLOWDOWN * seconds_in(free_bytes)
    while enough < free_bytes and seconds_in(enough) > longest_wait:
        enough = math.ceil(1.25 * enough)
    found = held_in(free_bytes)
    all_kept: list[Keeping] = ["all"] * len(found.keeping)
    everything = replace(found, keeping=tuple(all_kept))
    rows = min(asked, math.ceil(batch / found.num_micro))
    return HandWrittenRun(found, least, max(least, enough), rows, work_of(found), work_of(everything))


def _filling_bytes(blocks: Blocks, step: StepTokens, *, element: int, is_quantised: bool) -> int:
    """What a micro-batch takes beside weights, adapter and optimizer that fills a GPU, each block keeping its input,
    with the host where that is as fast, by the rule of `workers.blocks.keeping.tokens_that_fit`."""
    costs = blocks.costs(element)
    per_token = sum(cost.input for cost in costs) + max(cost.lean_working for cost in costs)
    if blocks.hides_copies(element):
        offloaded = sum(cost.offload for cost in costs) + IN_FLIGHT * max(cost.stream for cost in costs)
        per_token = offloaded + max(cost.lean_working for cost in costs)
    tokens = min(FILLING_TOKENS, math.ceil(step.most) + step.num_rows * blocks.num_virtual_tokens)
    found = free_bytes_for(math.ceil(tokens * per_token / SAFETY))
    return found + (blocks.scratch_bytes(is_lean=is_scarce(found)) if is_quantised else 0)

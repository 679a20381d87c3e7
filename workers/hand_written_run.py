"""A recipe's steps with hand-written blocks: what they hold and how long they take, from the dataset's facts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from workers.blocks.keeping import FILLING_TOKENS, SAFETY, Keeping, bytes_of_token, free_bytes_for, is_scarce
from workers.blocks.launching import LayerTime
from workers.blocks.planning import FreeMemory, MemoryPlan, StepTokens, choose_plan
from workers.blocks.sizes import LEAN_SCRATCH_BYTES
from workers.facts import DatasetFacts, DeviceFacts
from workers.gpus import gpu_named
from workers.hand_written import Blocks, is_hand_written
from workers.hand_written_memory import CONTEXT_BYTES, LOSS_SHARE, Held, free_memory, held, least_bytes
from workers.hand_written_time import StepWork, step_work
from workers.methods import Method
from workers.recipe import Precision, Recipe
from workers.shapes import ModelShape

ENOUGH_SLOWDOWN = 1.4
"""How many times as long a step may take in memory that is enough as in a whole device: about what it costs to compute
every block twice, in micro-batches that just fill the device."""

AMPLE_BYTES = 2**44
"""Memory in which every plan keeps all."""


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
        roomy = self.work_with_memory.seconds(gpu_named(device.name), device.pace)
        return max(1.0, self.step_seconds(device) / roomy)


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
    branch_bytes: int = 0,
) -> HandWrittenRun:
    """How a recipe's steps are computed beside `fixed_bytes` of weights, adapter, optimizer, and copies of branches.

    Args:
        branch_bytes: of these copies, as `workers.hand_written_memory.free_memory` takes them.
    """
    training = recipe.training
    batch, length = training.batch_size, training.max_length
    asked = batch if training.micro_batch_size == "auto" else min(training.micro_batch_size, batch)
    step = StepTokens(
        mean=batch * dataset.mean_after_cut(length),
        most=dataset.largest_step(batch, length, num_steps),
        longest=dataset.longest_after_cut(length),
        num_rows=batch,
        rows_at_once=asked,
    ).lengthened(blocks.num_virtual_tokens)
    loss_share = 1.0 if training.loss_on == "all" else LOSS_SHARE
    is_quantised = precision == "nf4"
    on_gpu = device.kind == "cuda"
    is_lean = training.gradient_checkpointing is True

    def held_by(plan: MemoryPlan) -> Held:
        return held(
            blocks, step, plan, element=element, kind=device.kind, is_quantised=is_quantised, loss_share=loss_share
        )

    if not on_gpu:
        return HandWrittenRun(held_by(MemoryPlan(is_lean)), None, None, asked, None, None)
    gpu, costs = gpu_named(device.name), blocks.costs(element)
    time = LayerTime(blocks.layer_work(is_quantised=is_quantised), gpu.flops)
    least = least_bytes(
        blocks, step, element=element, kind=device.kind, is_quantised=is_quantised, loss_share=loss_share
    )
    records = not training.neftune_alpha and not has_virtual_tokens

    def memory_of(free_bytes: int) -> FreeMemory:
        return free_memory(blocks, free_bytes, element=element, is_quantised=is_quantised, branch_bytes=branch_bytes)

    def held_in(free_bytes: int, *, is_lean: bool = is_lean) -> Held:
        return held_by(choose_plan(costs, step, memory_of(free_bytes), time, is_lean=is_lean, records=records))

    def work_of(held: Held) -> StepWork:
        return step_work(
            blocks, held, num_trainable=num_trainable, loss_share=loss_share, is_quantised=is_quantised,
            element=element, weighted_length=dataset.weighted_after_cut(length),
        )  # fmt: skip

    free_bytes = device.memory_bytes - CONTEXT_BYTES - fixed_bytes
    enough = _filling_bytes(blocks, step, memory_of(0), element=element, is_lean=is_lean)
    found = held_in(free_bytes)
    work = work_of(found)
    longest_wait = ENOUGH_SLOWDOWN * work.seconds(gpu, device.pace)
    while enough < free_bytes and work_of(held_in(enough)).seconds(gpu, device.pace) > longest_wait:
        enough = math.ceil(1.25 * enough)
    roomy = held_in(AMPLE_BYTES, is_lean=False)
    rows = min(asked, math.ceil(batch / found.num_micro))
    return HandWrittenRun(found, least, max(least, enough), rows, work, work_of(roomy))


def _filling_bytes(blocks: Blocks, step: StepTokens, memory: FreeMemory, *, element: int, is_lean: bool) -> int:
    """What a micro-batch takes beside weights, adapter and optimizer that fills a GPU, each block keeping its input,
    with the host where that is as fast."""
    tokens = min(FILLING_TOKENS, math.ceil(step.most))
    keeping: Keeping = "input" if memory.host_bytes == 0 else "offload"
    per_token = bytes_of_token(blocks.costs(element), keeping)
    found = free_bytes_for(math.ceil(tokens * per_token / SAFETY))
    if is_lean or is_scarce(found):
        return found + min(memory.scratch_bytes, LEAN_SCRATCH_BYTES)
    return found + memory.scratch_bytes + memory.turns_bytes

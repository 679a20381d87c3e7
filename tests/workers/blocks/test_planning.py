"""Tokens at once, and whether launches are recorded: by the time that a step takes either way."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from statistics import median
from typing import Any

import pytest

from tests.bench.estimate_error import shape_of
from tests.bench.workload import ALL_SHAPES
from workers.blocks.keeping import keeps_bodies, token_budgets, tokens_that_fit
from workers.blocks.launching import LayerTime, LayerWork
from workers.blocks.planning import MemoryPlan, StepTokens, choose_plan, plan_memory
from workers.gpus import gpu_named
from workers.hand_written import Blocks
from workers.hand_written_memory import free_memory, held
from workers.hand_written_time import PACE, step_work
from workers.memory import GIB
from workers.methods import get_method

H200_FLOPS = 989e12
STEP = StepTokens(mean=4700, most=6000, longest=2048, num_rows=16, rows_at_once=16)


def blocks_of(size: str, method: str = "lora") -> Blocks:
    chosen = get_method(method)
    return Blocks.of(shape_of(ALL_SHAPES[size]), chosen, chosen.read_settings({"dropout": 0.0}))


def plan_of(
    blocks: Blocks,
    gib: float,
    step: StepTokens = STEP,
    *,
    is_lean: bool = False,
    flops: float = H200_FLOPS,
    records: bool = True,
    is_quantised: bool = False,
) -> MemoryPlan:
    memory = free_memory(blocks, round(gib * GIB), element=2, is_quantised=is_quantised, branch_bytes=0)
    time = LayerTime(blocks.layer_work(is_quantised=is_quantised), flops)
    return choose_plan(blocks.costs(2), step, memory, time, is_lean=is_lean, records=records)


def test_small_models_are_recorded_and_large_ones_launched() -> None:
    assert plan_of(blocks_of("135m"), 100).is_recorded
    assert plan_of(blocks_of("1b"), 100).is_recorded
    assert not plan_of(blocks_of("8b"), 100).is_recorded
    assert not plan_of(blocks_of("1b"), 100, flops=H200_FLOPS / 8).is_recorded, "the GPU is what is waited for"
    assert not plan_of(blocks_of("135m"), 100, records=False).is_recorded, "it cannot be"


def test_nothing_is_computed_twice_for_recordings_where_two_launched_micro_batches_would_keep_all() -> None:
    blocks = blocks_of("8b")
    plan = plan_of(blocks, 14)
    assert not plan.is_recorded
    tokens = STEP.usual_tokens(plan.budget)
    assert STEP.num_micro(STEP.mean, plan.budget) == 2
    assert all(map(keeps_bodies, plan.keeping(blocks.costs(2), math.ceil(tokens))))


def test_more_is_computed_twice_where_many_small_micro_batches_would_take_longer_to_launch() -> None:
    """QLoRA with 6 GiB beside its base: three micro-batches would keep all, and one most of it not."""
    blocks = blocks_of("8b", "qlora")
    plan = plan_of(blocks, 7, is_quantised=True)
    assert STEP.num_micro(STEP.mean, plan.budget) == 1
    assert not any(map(keeps_bodies, plan.keeping(blocks.costs(2), 4700)[:16]))
    short = replace(STEP, mean=1500, most=1500, num_rows=8, rows_at_once=8)
    few = plan_of(blocks, 7, short, is_quantised=True, records=False)
    assert all(map(keeps_bodies, few.keeping(blocks.costs(2), 1500))), "a step of so few gains nothing by it"


def test_where_a_usual_step_is_the_same_the_largest_and_then_short_rows_decide() -> None:
    blocks = blocks_of("8b")
    costs = blocks.costs(2)
    some = replace(STEP, mean=3000, most=6000)
    plan = plan_of(blocks, 18, some)
    tokens = some.most / some.num_micro(some.most, plan.budget)
    assert some.num_micro(some.mean, plan.budget) == 1 < some.num_micro(some.most, plan.budget)
    assert all(map(keeps_bodies, plan.keeping(costs, math.ceil(tokens)))), "what is large is split, to keep all"
    long = replace(STEP, mean=16384, most=16384, longest=4096, num_rows=4, rows_at_once=4)
    budget = plan_of(blocks, 2, long).budget
    assert budget is not None
    assert budget > 1000, "no row is cut, and four short ones are to come at once"


def test_few_tokens_of_a_large_model_are_recorded_unless_memory_makes_them_fewer_still() -> None:
    blocks = blocks_of("8b")
    one_row = replace(STEP, mean=600, most=600, longest=600, num_rows=1, rows_at_once=1)
    assert plan_of(blocks, 40, one_row).is_recorded
    many = replace(STEP, longest=300)
    assert not plan_of(blocks, 1.2, many).is_recorded, "recordings would leave memory for a fraction of the tokens"


def test_a_lean_run_offloads_where_that_saves_much() -> None:
    blocks = blocks_of("8b")
    long, short = (
        replace(STEP, mean=tokens, most=tokens, longest=tokens, num_rows=1, rows_at_once=1) for tokens in (2048, 250)
    )
    assert not plan_of(blocks, 40, long, is_lean=True).is_recorded
    assert plan_of(blocks, 40, short, is_lean=True).is_recorded


def test_more_launches_bring_recordings_sooner() -> None:
    """Weights in 4 bits that are computed back for each use take more of them than those that are kept so."""
    step = replace(STEP, mean=2300, most=2300, longest=600, num_rows=8, rows_at_once=8)
    assert not plan_of(blocks_of("8b"), 40, step).is_recorded
    assert plan_of(blocks_of("8b", "qlora"), 20, step, is_quantised=True).is_recorded


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, 62),
        ({"again": 1.0}, 62 + 9 + 4 * 2),
        ({"drops": True}, 62 + 4 * 2),
        ({"drops": True, "ranks": (96, 32, 64, 32)}, 62 + 3 * 2 + 4),
        ({"is_quantised": True}, 62 + 28),
        ({"is_quantised": True, "has_copies": True}, 62),
        # Gate and up come in two pieces, on each of three ways through them.
        ({"is_quantised": True, "in_pieces": True, "again": 1.0}, 62 + 17 + 28 + 3 * 3.8),
        ({"ranks": (0, 0, 0, 0)}, 22),
        ({"ranks": (0, 0, 0, 0), "num_adapters": 1}, 22 + 25),
        ({"ranks": (0, 0, 0, 0), "has_prefix": True}, 22 + 40),
    ],
)
def test_launches_are_counted_by_what_causes_them(more: dict[str, Any], expected: float) -> None:
    sizes = ((4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096))
    given: dict[str, Any] = {"num_adapters": 0, "has_prefix": False, "drops": False, "is_quantised": False} | more
    how = {name: given.pop(name, 0.0 if name == "again" else False) for name in ("again", "has_copies", "in_pieces")}
    groups = tuple((*one, ranks) for one, ranks in zip(sizes, given.pop("ranks", (48, 16, 32, 16)), strict=True))
    assert LayerWork(32, groups, **given).launches(**how) == pytest.approx(expected / 62)


def test_a_step_without_tokens_has_a_plan_too() -> None:
    nothing = replace(STEP, mean=0, most=0, longest=0, num_rows=16)
    assert not plan_of(blocks_of("8b"), 40, nothing, records=False).is_recorded


def seconds_of(plan: MemoryPlan, blocks: Blocks, step: StepTokens, *, is_quantised: bool) -> float:
    """What the estimate says of a step that goes by a plan."""
    does = held(blocks, step, plan, element=2, kind="cuda", is_quantised=is_quantised, loss_share=0.65)
    work = step_work(blocks, does, num_trainable=10**7, loss_share=0.65, weighted_length=400, is_quantised=is_quantised)
    return work.seconds(gpu_named("NVIDIA H200"), PACE)


@pytest.mark.parametrize(
    ("size", "method"), [("135m", "lora"), ("1b", "lora"), ("3b", "lora"), ("8b", "lora"), ("8b", "qlora")]
)
def test_no_other_plan_is_much_faster_by_the_estimate(size: str, method: str) -> None:
    is_quantised = method == "qlora"
    blocks = blocks_of(size, method)
    costs, time = blocks.costs(2), LayerTime(blocks.layer_work(is_quantised=is_quantised), H200_FLOPS)
    behind = []
    for (mean, rows, longest), gib in product(
        ((2000, 16, 300), (4700, 16, 600), (16_000, 64, 1000), (64_000, 64, 2048)), (1, 1.5, 2, 3, 4, 6, 8, 12, 20, 60)
    ):
        step = StepTokens(mean, mean * 1.15, longest, rows, rows)
        memory = free_memory(blocks, round(gib * GIB), element=2, is_quantised=is_quantised, branch_bytes=0)
        chosen = choose_plan(costs, step, memory, time, is_lean=False, records=True)
        others = []
        for is_recorded in (False, True):
            plan = plan_memory(costs, step, memory, time, is_lean=False, is_recorded=is_recorded)
            assert plan.free_bytes is not None
            if not is_recorded or tokens_that_fit(costs, "input", free_bytes=plan.free_bytes) >= longest:
                budgets = token_budgets(costs, free_bytes=plan.free_bytes, host_bytes=plan.host_bytes)
                others += [replace(plan, budget=budget) for budget in budgets]
        best = min(seconds_of(one, blocks, step, is_quantised=is_quantised) for one in others)
        behind.append(seconds_of(chosen, blocks, step, is_quantised=is_quantised) / best)
    assert max(behind) < 1.2
    assert median(behind) < 1.02

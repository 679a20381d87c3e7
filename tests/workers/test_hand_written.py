"""The torch-free arithmetic of hand-written blocks: the same sizes and choices as of the blocks themselves."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.bench.estimate_error import shape_of
from tests.bench.workload import ALL_SHAPES, MAX_LENGTH, row_lengths
from tests.tiny import FAMILIES, make_tiny_base
from workers.base_folders import read_base_folder
from workers.blocks import keeping as rules
from workers.blocks import launching
from workers.blocks.budget import block_bytes
from workers.blocks.engine import Engine, install
from workers.blocks.families import NotByHandError, make_room
from workers.blocks.keeping import (
    FILLING_TOKENS,
    MOST_TOKENS,
    SAFETY,
    Keeping,
    token_budgets,
    tokens_that_fit,
)
from workers.blocks.launching import LayerTime
from workers.blocks.planning import FreeMemory, MemoryPlan, StepTokens, plan_memory
from workers.blocks.sizes import LEAN_SCRATCH_BYTES, RECORDING_SHARE
from workers.facts import DeviceFacts
from workers.gpus import Gpu, gpu_named
from workers.hand_written import Blocks, is_hand_written
from workers.hand_written_memory import CONTEXT_BYTES, Held, free_memory, held
from workers.hand_written_run import ENOUGH_SLOWDOWN, HandWrittenRun, run_of
from workers.hand_written_time import LINK_BANDWIDTH, PACE, step_work
from workers.memory import estimate
from workers.methods import get_method, methods
from workers.recipe import Precision, Recipe

SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4}, "lora_plus": {"rank": 4, "target_modules": ["down_proj"]}, "rslora": {"rank": 4},
    "prompt_tuning": {"num_virtual_tokens": 4}, "p_tuning": {"num_virtual_tokens": 4},
    "prefix_tuning": {"num_virtual_tokens": 4}, "bottleneck": {"placement": "houlsby"},
}  # fmt: skip


def installed(family: str, name: str, folder: Path) -> tuple[Engine | None, Blocks | None]:
    """The blocks of a tiny base with a method's adapter, as they are and by arithmetic; None where there are none."""
    import torch

    from workers import base_models

    base = make_tiny_base(folder, family=family)  # type: ignore[arg-type]
    shape = read_base_folder(base).shape
    method = get_method(name)
    settings = method.read_settings(SETTINGS.get(name, {}))
    model = method.attach(base_models.load(base, "float32", torch.device("cpu")).model, settings)
    expected = Blocks.of(shape, method, settings) if is_hand_written(method, "float32", shape, "cpu") else None
    try:
        return install(model, is_wide=False), expected
    except NotByHandError:
        return None, expected


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gpt2"])
def test_sizes_are_those_of_the_blocks_in_every_family(family: str, tmp_path: Path) -> None:
    engine, blocks = installed(family, "lora", tmp_path / "base")
    assert engine is not None
    assert blocks is not None
    assert blocks.costs(4) == engine.costs == [block_bytes(block, 4) for block in engine.blocks]
    groups = [group for half in engine.blocks[0].sublayers for group in (half.inputs, half.outputs)]
    for group, found in zip(groups, blocks.groups, strict=True):
        assert (found.num_inputs, found.num_outputs, found.num_ranks) == (
            group.num_inputs, group.num_outputs, group.num_ranks,
        )  # fmt: skip


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gpt2"])
def test_the_room_around_weights_is_what_making_it_takes(family: str, tmp_path: Path) -> None:
    import torch

    from workers import base_models

    folder = make_tiny_base(tmp_path / "base", family=family)  # type: ignore[arg-type]
    model = base_models.load(folder, "float32", torch.device("cpu")).model

    def num_bytes() -> int:
        storages = {one.untyped_storage().data_ptr(): one.untyped_storage() for one in model.model.layers.parameters()}
        return sum(one.nbytes() for one in storages.values())

    for parameter in model.model.layers.parameters():
        parameter.data = parameter.data.clone()  # instead of a file's, which all share
    before = num_bytes()
    make_room(model)
    assert num_bytes() - before == 2 * Blocks.room_of(read_base_folder(folder).shape), "float32 instead of 16 bits"


@pytest.mark.parametrize("rank", [4, 24])
@pytest.mark.parametrize("is_wide", [False, True], ids=["apart", "wide"])
def test_copies_of_branches_that_ride_in_no_product_are_counted(rank: int, is_wide: bool, tmp_path: Path) -> None:
    import torch

    from workers import base_models

    folder = make_tiny_base(tmp_path / "base", family="llama")
    method = get_method("lora")
    settings = method.read_settings({"rank": rank})
    model = method.attach(base_models.load(folder, "float32", torch.device("cpu")).model, settings)
    engine = install(model, is_wide=is_wide)
    numbers = sum(
        target.numel() for group in engine._groups() if not group.is_folded for _, target, _ in group.copies()
    )  # fmt: skip
    blocks = Blocks.of(read_base_folder(folder).shape, method, settings)
    kind = "cuda" if is_wide else "cpu"
    assert blocks.branch_bytes(4, kind=kind, is_quantised=False, take_turns=False) == 4 * numbers
    assert (numbers == 0) == (is_wide and rank == 4), "three layers of rank 24 are too many columns"


@pytest.mark.parametrize("name", [name for name, method in methods().items() if "float32" in method.precisions])
def test_every_method_is_expected_where_it_is_taken_and_with_its_sizes(name: str, tmp_path: Path) -> None:
    engine, blocks = installed("llama", name, tmp_path / "base")
    assert (engine is None) == (blocks is None)
    if engine is not None and blocks is not None:
        assert blocks.costs(4) == engine.costs
        assert blocks.num_virtual_tokens == engine.num_virtual_tokens


def test_blocks_of_other_families_and_of_types_without_kernels_are_the_models_own(tmp_path: Path) -> None:
    shape = read_base_folder(make_tiny_base(tmp_path / "base")).shape
    lora = get_method("lora")
    assert is_hand_written(lora, "bfloat16", shape, "cuda")
    cases: list[tuple[Precision, dict[str, Any]]] = [
        ("float32", {}), ("int8", {}), ("bfloat16", {"family": "gpt2"}), ("bfloat16", {"head_size": 12}),
        ("bfloat16", {"linears": ()}),
    ]  # fmt: skip
    for precision, changes in cases:
        assert not is_hand_written(lora, precision, shape.model_copy(update=changes), "cuda"), (precision, changes)


@pytest.fixture(scope="module")
def eight_b() -> Blocks:
    method = get_method("lora")
    return Blocks.of(shape_of(ALL_SHAPES["8b"]), method, method.read_settings({}))


STEP = StepTokens(mean=4700, most=6000, longest=2048, num_rows=16, rows_at_once=16)


def held_with(
    blocks: Blocks, gib: float, *, is_lean: bool = False, is_recorded: bool = False, is_quantised: bool = False
) -> Any:
    free = free_memory(blocks, round(gib * 2**30), element=2, is_quantised=is_quantised, branch_bytes=0)
    time = LayerTime(blocks.layer_work(is_quantised=is_quantised), 989e12)
    plan = plan_memory(blocks.costs(2), STEP, free, time, is_lean=is_lean, is_recorded=is_recorded)
    return held(blocks, STEP, plan, element=2, kind="cuda", is_quantised=is_quantised, loss_share=0.65)


def test_the_more_memory_is_free_the_less_is_computed_twice(eight_b: Blocks) -> None:
    found = [held_with(eight_b, gib) for gib in (3, 6, 8, 12, 40)]
    shares = [one.kept_share for one in found]
    assert shares == sorted(shares)
    assert shares[0] < 0.5
    assert shares[-1] == 1
    assert found[-1].num_micro == 1
    for one, gib in zip(found, (3, 6, 8, 12, 40), strict=True):
        assert one.activations_bytes < gib * 2**30, "a plan stays within its memory"


def test_what_is_scarce_is_saved_by_the_host_and_what_is_lean_too(eight_b: Blocks) -> None:
    scarce, lean = held_with(eight_b, 0.9), held_with(eight_b, 40, is_lean=True)
    for one in (scarce, lean):
        assert one.keeping[0] == "offload"
        assert one.keeping[-1] == "input"
    assert scarce.activations_bytes < 0.9 * 2**30
    assert scarce.num_micro <= 4, "the inputs of so many tokens take 0.3 GiB, which would not fit"
    recorded = held_with(eight_b, 40, is_lean=True, is_recorded=True)
    assert set(recorded.keeping) == {"input"}
    assert lean.activations_bytes < recorded.activations_bytes


def test_copies_take_no_time_behind_products_and_the_links_where_a_gpu_is_faster_than_that(eight_b: Blocks) -> None:
    found = held_with(eight_b, 40)

    def seconds(keeping: Keeping, gpu: Gpu) -> float:
        kept = replace(found, keeping=(keeping,) * len(found.keeping))
        work = step_work(
            eight_b, kept, num_trainable=10**6, loss_share=1.0, weighted_length=300, is_quantised=False, element=2
        )
        return work.seconds(gpu, replace(PACE, host_per_block=0.0, host_per_micro=0.0, host_per_step=0.0))

    known, fast = gpu_named("NVIDIA H200"), Gpu(flops=1e18, bandwidth=1e16)
    assert seconds("offload", known) == seconds("input", known) > seconds("all", known)
    copied = 2 * 2 * 4096 * 32 * found.tokens
    assert seconds("offload", fast) == pytest.approx(copied / LINK_BANDWIDTH)
    assert seconds("input", fast) < seconds("offload", fast)


def test_a_run_whose_launches_are_recorded_plans_with_less(eight_b: Blocks) -> None:
    plain, recorded = held_with(eight_b, 20), held_with(eight_b, 20, is_recorded=True)
    assert (plain.kept_share, plain.num_micro) == (1, 1)
    assert recorded.activations_bytes < plain.activations_bytes


LENGTHS = [20, 60, 100, 140, 180] * 16


class OfLengths:
    """Rows by their lengths alone."""

    def __init__(self, lengths: list[int]) -> None:
        self._lengths = lengths

    def length(self, row: int) -> int:
        return self._lengths[row]


def settled(engine: Any, recipe: Recipe, device: DeviceFacts, room: int, lengths: list[int]) -> Any:
    """A run on a GPU as `_settle` leaves it, whose host has memory to spare."""
    import torch

    from workers import training

    run = SimpleNamespace(
        recipe=recipe, data=SimpleNamespace(tokens=OfLengths(lengths)), device=torch.device("cuda"),
        device_facts=device, max_micro_batch_size=None, recorder=None, budget=None,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_room", lambda _run, _model: room)
        patch.setattr(training, "Recorder", lambda *_, **__: "a recorder")
        patch.setattr(training.devices, "free_host_bytes", lambda: 2**40)
        by_length = sorted(range(len(lengths)), key=lengths.__getitem__)
        training._settle(run, None, engine, by_length)  # type: ignore[arg-type]
    return run


@pytest.mark.parametrize(("family", "name"), [("llama", "lora"), ("gemma", "bottleneck"), ("llama", "prompt_tuning")])
def test_launches_are_recorded_where_the_estimate_says_so(
    family: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.workers.test_training import recipe_of
    from workers.training import dataset_facts

    engine, blocks = installed(family, name, tmp_path / "base")
    assert engine is not None
    assert blocks is not None
    facts, costs = dataset_facts(LENGTHS), engine.costs
    # The tiny layers of 600 tokens keep an H200 as busy as its host, and logits are as tiny.
    monkeypatch.setattr(launching, "MICRO_SECONDS", 0.0)
    monkeypatch.setattr(launching, "RECORDED_SECONDS", 0.0)
    monkeypatch.setattr(launching, "_WEIGHTS_TOKENS", 0)
    time = LayerTime(blocks.layer_work(is_quantised=False), 989e12)
    computing = time.of_token(600, again=1.0, has_copies=False, in_pieces=False, is_recorded=True) * 600
    launches = time.work.launches(again=1.0, has_copies=False, in_pieces=False)
    monkeypatch.setattr(launching, "LAUNCH_SECONDS", computing / launches)
    monkeypatch.setattr(rules, "LEAN_LOGIT_BYTES", 1024)
    found = {}
    for gpu, tokens, is_lean, rows in product(
        ("NVIDIA H200", "NVIDIA A100"), (50, 200, 500, 1000, 5000), (False, True), (1, 4, 8)
    ):
        per_token = sum(cost.input if is_lean else cost.all for cost in costs)
        per_token += max(cost.lean_working(1) if is_lean else cost.working for cost in costs)
        room = rules.free_bytes_for(round(tokens * per_token / SAFETY))
        device = DeviceFacts("cuda", gpu, room + CONTEXT_BYTES, 8)
        recipe = recipe_of(batch_size=8, micro_batch_size=rows, gradient_checkpointing=is_lean, max_length=256)
        run = settled(engine, recipe, device, room, LENGTHS)
        expected = run_of(
            recipe, blocks, facts, device, num_steps=10, num_trainable=1000, element=4, precision="float32",
            has_virtual_tokens=name == "prompt_tuning", fixed_bytes=0,
        ).held  # fmt: skip
        assert (run.recorder is not None) == expected.is_recorded, (gpu, tokens, is_lean, rows)
        mean = 8 * (facts.mean_after_cut(256) + run.budget.beside)
        assert max(8 // rows, min(8, math.ceil(mean / run.budget.tokens))) == expected.num_micro
        found[gpu, tokens, is_lean, rows] = expected.is_recorded
    if name == "prompt_tuning":
        assert not any(found.values())
    else:
        assert found["NVIDIA H200", 500, True, 8], "memory leaves it few tokens at once"
        assert not found["NVIDIA H200", 200, True, 8], "and here less than its longest row has, of recordings"
        assert not found["NVIDIA H200", 5000, True, 8]
        assert found["NVIDIA A100", 5000, True, 1]
        assert not found["NVIDIA A100", 5000, True, 8], "which takes longer than its host"


class OfBlocks:
    """Stands in for the engine of blocks that are too large for a test, by their sizes."""

    num_virtual_tokens, has_prefix = 0, False

    def __init__(self, blocks: Blocks) -> None:
        self.costs, self.layer_work = blocks.costs(2), blocks.layer_work(is_quantised=False)
        self.plan: MemoryPlan | None = None

    def memory(self, device_bytes: int, host_bytes: int) -> FreeMemory:
        return FreeMemory(device_bytes, host_bytes)

    def follow(self, plan: MemoryPlan) -> int:
        self.plan = plan
        return 0


@pytest.mark.parametrize(
    ("lengths", "batch", "is_lean", "mib", "is_recorded"),
    [
        # What is left of so little for recordings does not take the longest row.
        ([2048], 1, False, 450, False), ([2048], 1, False, 600, False), ([1024] * 4, 4, False, 300, False),
        ([250] * 9 + [512], 1, True, 142, False), ([250] * 9 + [512], 1, True, 213, False),
        ([2048], 1, True, 450, False), ([250] * 9 + [300], 4, True, 300, False), ([100] * 16, 16, True, 200, False),
        ([1500], 1, False, 20_000, True), ([250] * 9 + [512], 1, True, 20_000, True),
        ([2048], 1, True, 20_000, False), ([1024] * 4, 4, False, 100_000, False),
    ],
)  # fmt: skip
def test_launches_are_recorded_only_where_the_longest_row_fits_so(
    lengths: list[int], batch: int, is_lean: bool, mib: int, is_recorded: bool, eight_b: Blocks
) -> None:
    from tests.workers.test_training import recipe_of
    from workers.training import dataset_facts

    blocks = replace(eight_b, has_dropout=False)
    room, engine = mib * 2**20, OfBlocks(blocks)
    device = DeviceFacts("cuda", "NVIDIA H200", room + CONTEXT_BYTES, 8)
    recipe = recipe_of(
        batch_size=batch, micro_batch_size=batch, gradient_checkpointing=is_lean, max_length=4096, epochs=1
    )
    run = settled(engine, recipe, device, room, lengths)
    expected = run_of(
        recipe, blocks, dataset_facts(lengths), device, num_steps=10, num_trainable=1000, element=2,
        precision="bfloat16", has_virtual_tokens=False, fixed_bytes=0,
    )  # fmt: skip
    plan = engine.plan
    assert plan is not None
    assert (run.recorder is not None, plan.is_recorded, expected.held.is_recorded) == (is_recorded,) * 3
    assert (plan.host_bytes == 0) == is_recorded, "recorded launches and offloaded inputs never meet"
    assert expected.least is not None
    assert expected.least <= room
    assert expected.held.activations_bytes <= room * (RECORDING_SHARE if is_recorded else 1)


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("gpu", ["NVIDIA H200", "NVIDIA GeForce RTX 4090"])
@pytest.mark.parametrize("size", ["135m", "1b", "8b"])
def test_with_memory_that_is_enough_a_step_takes_at_most_so_many_times_as_long_as_in_a_whole_device(
    size: str, gpu: str, method: str
) -> None:
    from tests.workers.test_training import recipe_of
    from workers.training import dataset_facts

    shape, chosen = shape_of(ALL_SHAPES[size]), get_method(method)
    blocks = Blocks.of(shape, chosen, chosen.read_settings({}))
    facts = dataset_facts(row_lengths(2000, None))

    def run_in(free_bytes: float, rows: int) -> tuple[HandWrittenRun, float]:
        device = DeviceFacts("cuda", gpu, int(free_bytes) + CONTEXT_BYTES, 8)
        recipe = recipe_of(batch_size=rows, micro_batch_size=rows, max_length=MAX_LENGTH)
        found = run_of(
            recipe, blocks, facts, device, num_steps=100, num_trainable=10**7, element=2, has_virtual_tokens=False,
            precision="nf4" if method == "qlora" else "bfloat16", fixed_bytes=0,
        )  # fmt: skip
        return found, found.step_seconds(device)

    for rows in (4, 16, 64):
        whole, seconds = run_in(100 * 2**30, rows)
        assert whole.enough is not None
        assert whole.least is not None
        liked = whole.held.weights_bytes + whole.held.activations_bytes
        assert whole.least <= whole.enough
        if size == "8b":
            assert whole.enough < 0.4 * liked
        assert run_in(whole.enough, rows)[1] <= ENOUGH_SLOWDOWN * seconds


def test_lean_runs_hold_least_and_weights_in_4_bits_are_kept_computed_back_only_with_room(eight_b: Blocks) -> None:
    assert held_with(eight_b, 40, is_lean=True).activations_bytes < 0.2 * held_with(eight_b, 40).activations_bytes
    small, large = held_with(eight_b, 16, is_quantised=True), held_with(eight_b, 80, is_quantised=True)
    assert (small.has_copies, large.has_copies) == (False, True)
    assert small.weights_bytes == 2 * (2 * 14336 + 64) * (4096 + 64)
    assert large.weights_bytes > 2 * eight_b.num_weights
    assert held_with(eight_b, 40, is_quantised=True, is_lean=True).weights_bytes == LEAN_SCRATCH_BYTES < 2**28


def test_copies_of_branches_take_turns_where_launches_are_not_recorded_and_memory_is_scarce_or_to_be_saved() -> None:
    from tests.workers.test_training import recipe_of
    from workers.training import dataset_facts

    shape = shape_of(ALL_SHAPES["8b"])

    def copies(length: int, gib: int, *, is_lean: bool) -> int:
        """Bytes of them in the estimate."""
        recipe = recipe_of(batch_size=1, micro_batch_size=1, max_length=2048, gradient_checkpointing=is_lean)
        recipe = recipe.model_copy(update={"method": "qlora", "precision": "nf4"})
        device = DeviceFacts("cuda", "NVIDIA H200", gib * 2**30, 8)
        found = estimate(recipe, shape, dataset_facts([length] * 20), device)
        return found.optimizer_bytes - 12 * found.num_trainable

    in_turns = copies(2048, 140, is_lean=True)
    assert in_turns > 0
    assert copies(2048, 7, is_lean=False) == in_turns, "recordings would not fit"
    assert copies(2048, 140, is_lean=False) == 32 * in_turns
    assert copies(250, 140, is_lean=True) == 32 * in_turns, "it is recorded"


def test_the_weights_of_networks_that_go_in_pieces_are_computed_back_for_each(eight_b: Blocks) -> None:
    layers = eight_b.shape.num_layers

    def moved(tokens: int, num_micro: int, pieces: int) -> float:
        kept = Held(tokens, num_micro, ("input",) * layers, pieces, False, False, False, False, 0, 0)
        return step_work(
            eight_b, kept, num_trainable=0, loss_share=1.0, weighted_length=300, is_quantised=True
        ).moved_bytes  # fmt: skip

    joined, out, _, _ = (group.num_weights for group in eight_b.groups)
    # Four pieces of one micro-batch differ from four micro-batches by attention's weights alone.
    assert moved(1024, 4, 1) - moved(4096, 1, 4) == pytest.approx(3 * layers * 2.5 * 3 * (joined + out))


def test_micro_batches_keep_all_or_fill_the_device_or_are_as_large_as_fits(eight_b: Blocks) -> None:
    costs = eight_b.costs(2)
    per_token = sum(cost.bodies for cost in costs) + costs[0].working
    for tokens, expected in (
        (3000, [3000, 16384]), (10 * MOST_TOKENS, [MOST_TOKENS]), (1000, [1000, FILLING_TOKENS, 7821]),
    ):  # fmt: skip
        free = round(tokens * per_token / SAFETY) + 4096
        assert token_budgets(costs, free_bytes=free) == expected
    tight = round(100 * (sum(cost.input for cost in costs) + costs[0].lean_working(1)) / SAFETY) + 4096
    assert token_budgets(costs, free_bytes=tight)[-1] == tokens_that_fit(costs, "input", free_bytes=tight) == 100
    assert token_budgets(costs, free_bytes=-1) == [1]


def test_none_of_it_needs_torch() -> None:
    code = "import sys, workers.memory, workers.hand_written_run; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

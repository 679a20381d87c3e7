"""As much is kept as memory holds, and no more."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.workers.blocks.models import make_model, with_lora
from workers.blocks.budget import block_bytes
from workers.blocks.engine import install
from workers.blocks.keeping import (
    FILLING_TOKENS,
    IN_FLIGHT,
    MOST_PIECES,
    MOST_TOKENS,
    SAFETY,
    BlockBytes,
    Keeping,
    bytes_of_block,
    bytes_of_token,
    choose_keeping,
    choose_pieces,
    flash_features,
    free_bytes_for,
    hides_copies,
    lean_token_budget,
    least_keeping,
    logit_bytes,
    planned_bytes,
    token_budgets,
    tokens_that_fit,
)
from workers.blocks.sizes import LEAN_LOGIT_BYTES, LOGIT_BYTES, PAD

COST = BlockBytes(all=120, bodies=100, attention=40, input=8, offload=1, working=200, lean_attention=200)
TOKENS = 10
WORKING = TOKENS * COST.working


def room_for(num_bytes: int) -> int:
    """Free memory of which `num_bytes` are left beside what one block works with."""
    return -int(-(num_bytes + WORKING) / SAFETY) + 1


@pytest.mark.parametrize(
    ("num_bytes", "expected"),
    [
        (11600, ["all"] * 4),
        (11599, ["bodies"] * 4),
        (4000, ["bodies"] * 4),
        (3999, ["attention", "bodies", "bodies", "bodies"]),
        (3399, ["input", "bodies", "bodies", "bodies"]),
        (2481, ["input", "attention", "bodies", "bodies"]),
        (320, ["input"] * 4),
        (0, ["input"] * 4),
    ],
)
def test_blocks_give_up_one_after_the_other(num_bytes: int, expected: list[str]) -> None:
    assert choose_keeping([COST] * 4, num_tokens=TOKENS, free_bytes=room_for(num_bytes)) == expected


@pytest.mark.parametrize(("num_bytes", "num_offloaded"), [(640, 0), (639, 3), (430, 5), (429, 6), (0, 7)])
def test_inputs_are_offloaded_last_and_only_as_far_as_need_be(num_bytes: int, num_offloaded: int) -> None:
    """Of 70 bytes each; two of them are on the device while others are not, and the last block's is needed at once."""
    found = choose_keeping([COST] * 8, num_tokens=TOKENS, free_bytes=room_for(num_bytes), host_bytes=None)
    assert found == ["offload"] * num_offloaded + ["input"] * (8 - num_offloaded)


def test_the_host_takes_no_more_inputs_than_it_has_room_for() -> None:
    # Page-locked memory comes in powers of two: up to twice the 70 bytes.
    for host_bytes, expected in ((0, 0), (139, 0), (140, 1), (699, 4), (10**6, 7)):
        for found in (
            choose_keeping([COST] * 8, num_tokens=TOKENS, free_bytes=0, host_bytes=host_bytes),
            least_keeping([COST] * 8, num_tokens=TOKENS, host_bytes=host_bytes),
        ):
            assert found == ["offload"] * expected + ["input"] * (8 - expected)


@given(free=st.integers(0, 10**6), num=st.integers(1, 40), tokens=st.integers(1, 50), share=st.integers(0, 10))
def test_what_is_kept_never_exceeds_the_memory_unless_nothing_would_do(
    free: int, num: int, tokens: int, share: int
) -> None:
    host = None if share == 10 else share * 10**4
    keeping = choose_keeping([COST] * num, num_tokens=tokens, free_bytes=free, host_bytes=host)
    in_flight = IN_FLIGHT * COST.stream if "offload" in keeping else 0
    needed = tokens * (sum(COST.of(one) for one in keeping) + COST.working + in_flight)
    assert needed <= free * SAFETY or keeping == least_keeping([COST] * num, num_tokens=tokens, host_bytes=host)


EIGHT_B = bytes_of_block([10304, 28720], 4096, 2)
BLOCKS = 32


def free_for(tokens: int, keeping: str) -> int:
    """Free memory with which so many tokens fit."""
    low, high = 0, 2**40
    while low < high:
        middle = (low + high) // 2
        if tokens_that_fit([EIGHT_B] * BLOCKS, keeping, free_bytes=middle) >= tokens:  # type: ignore[arg-type]
            high = middle
        else:
            low = middle + 1
    return low


def test_as_many_tokens_as_fill_the_device_may_offload_their_inputs() -> None:
    costs = [EIGHT_B] * BLOCKS
    scarce = free_for(FILLING_TOKENS // 2, "input")
    assert token_budgets(costs, free_bytes=scarce)[-1] == FILLING_TOKENS // 2
    found = token_budgets(costs, free_bytes=scarce, host_bytes=None)[-1]
    assert found == tokens_that_fit(costs, "offload", free_bytes=scarce) > 1.1 * FILLING_TOKENS
    keeping = choose_keeping(costs, num_tokens=found, free_bytes=scarce, host_bytes=None)
    assert keeping == ["offload"] * (BLOCKS - 1) + ["input"]


def test_a_lean_batch_is_bounded_by_what_is_worked_with_and_by_the_host() -> None:
    costs = [EIGHT_B] * BLOCKS
    free = free_for(5000, "offload")
    assert lean_token_budget(costs, free_bytes=free, host_bytes=None) == 5000
    assert lean_token_budget(costs, free_bytes=2**40, host_bytes=None) == MOST_TOKENS
    of_3000 = 3000 * 2 * EIGHT_B.stream * (BLOCKS - 1)
    assert lean_token_budget(costs, free_bytes=free, host_bytes=of_3000) == 3000
    on_the_device = tokens_that_fit(costs, "input", free_bytes=free)
    assert lean_token_budget(costs, free_bytes=free, host_bytes=1) == on_the_device < 2500


@given(
    tokens=st.integers(1, 20_000),
    keeping=st.sampled_from(["all", "bodies", "attention", "input", "offload"]),
    pieces=st.integers(1, MOST_PIECES),
)
def test_the_tokens_that_fit_are_as_many_as_their_bytes_allow(tokens: int, keeping: Keeping, pieces: int) -> None:
    costs = [EIGHT_B] * BLOCKS

    def needed(tokens: int) -> int:
        return tokens * bytes_of_token(costs, keeping, pieces=pieces)

    found = tokens_that_fit(costs, keeping, free_bytes=math.ceil(needed(tokens) / SAFETY), pieces=pieces)
    assert found == tokens


@given(tokens=st.integers(1, 20_000), free=st.integers(0, 2**31), has_host=st.booleans())
def test_pieces_are_as_few_as_fit_and_none_where_anything_else_would_do(tokens: int, free: int, has_host: bool) -> None:
    costs = [EIGHT_B] * BLOCKS
    host_bytes = None if has_host else 0
    found = choose_pieces(costs, num_tokens=tokens, free_bytes=free, host_bytes=host_bytes)
    fits = [
        tokens <= tokens_that_fit(costs, keeping, free_bytes=free, pieces=found)
        for keeping in (["offload"] if has_host else ["input"])
    ]
    assert all(fits) or found == MOST_PIECES or has_host, "the last block's input stays, too"
    if found > 1:
        keeping: Keeping = "offload" if has_host else "input"
        assert tokens > tokens_that_fit(costs, keeping, free_bytes=free, pieces=found - 1) - 1000
    kept = choose_keeping(costs, num_tokens=tokens, free_bytes=free, host_bytes=host_bytes)
    if found > 1:
        assert kept == least_keeping(costs, num_tokens=tokens, host_bytes=host_bytes)


def test_a_row_that_is_longer_than_what_fits_is_gone_back_through_in_pieces() -> None:
    costs = [EIGHT_B] * BLOCKS
    free = free_for(1500, "offload")
    assert lean_token_budget(costs, free_bytes=free, host_bytes=None) == 1500
    found = [
        choose_pieces(costs, num_tokens=tokens, free_bytes=free, host_bytes=None) for tokens in (1500, 1900, 2300, 9000)
    ]
    assert found == [1, 2, 3, 4]


@pytest.mark.parametrize(("num_key_heads", "has_prefix"), [(8, False), (32, False), (8, True)])
def test_what_torchs_attention_works_with_on_its_way_back_is_counted(num_key_heads: int, has_prefix: bool) -> None:
    hidden = queries = 4096
    keys = num_key_heads * 128
    joined = queries + 2 * keys
    features = flash_features(joined, queries, has_prefix=has_prefix)
    cost = bytes_of_block([joined + queries, 28672], hidden, 2, attention_features=features)
    there = joined + queries + 3 * hidden + joined + queries  # with the gradients behind and before, and the norm's
    by_kernel = queries + 2 * keys + 2 * queries  # the last in float32, in which queries' gradients are added up
    if num_key_heads < 32:
        by_kernel += 2 * queries  # of keys and values for each query head
    if has_prefix:
        by_kernel += 2 * keys
    assert 2 * (there + by_kernel) <= cost.lean_working(4) < 2.1 * (there + by_kernel)
    assert cost.of("bodies") == bytes_of_block([joined + queries, 28672], hidden, 2).of("bodies")


@given(free=st.integers(0, 2**38), more=st.integers(0, 2**34))
def test_the_more_is_free_the_more_is_planned_with(free: int, more: int) -> None:
    assert planned_bytes(free + more) >= planned_bytes(free)
    assert logit_bytes(free + more, is_lean=False) >= logit_bytes(free, is_lean=False) >= LEAN_LOGIT_BYTES
    assert free - planned_bytes(free) >= logit_bytes(free, is_lean=False)
    enough = free_bytes_for(free)
    assert planned_bytes(enough) >= free > planned_bytes(enough - 64) - 64
    plenty = 64 * LOGIT_BYTES + free
    assert (plenty - planned_bytes(plenty), logit_bytes(plenty, is_lean=False)) == (3 * LOGIT_BYTES, LOGIT_BYTES)


def test_copies_hide_behind_the_products_of_large_layers_alone() -> None:
    weights = {"8b": 218_103_808, "1b": 60_817_408, "135m": 3_538_944}
    hidden = {"8b": 4096, "1b": 2048, "135m": 576}
    assert {name for name in weights if hides_copies(weights[name], 2 * hidden[name])} == {"8b", "1b"}


def test_the_bytes_of_a_block_are_those_of_its_shapes() -> None:
    engine = install(with_lora(make_model("llama")), is_wide=False)
    block = engine.blocks[0]
    hidden, inner, joined, attended, rank = 48, 80, 48 + 2 * 24, 48, 4
    attention = joined + attended + 4 * rank
    gate_up = 2 * inner + 3 * rank
    found = block_bytes(block, 2)
    assert found.bodies == 2 * (attention + gate_up + 2 * hidden)
    assert found.all == found.bodies + 2 * 2 * (hidden + PAD)
    assert found.attention == 2 * (attention + 2 * hidden)
    assert found.input == found.stream == 2 * hidden
    assert found.offload == 0
    assert found.lean_attention == 2 * (2 * attention + 4 * (hidden + PAD))
    for pieces in (1, 2, 4):
        in_piece = math.ceil(2 * (gate_up + gate_up // 2 + 2 * (hidden + PAD)) / pieces)
        in_feed_forward = 2 * (attention + 3 * (hidden + PAD)) + in_piece
        assert found.lean_working(pieces) == max(found.lean_attention, in_feed_forward)
    assert found.working == 2 * found.bodies
    by_torch = block_bytes(block, 2, on_gpu=True)
    assert by_torch.lean_attention == 2 * (2 * attention + 3 * (hidden + PAD) + flash_features(joined, attended))
    engine.attend_by("rows")
    assert block_bytes(block, 2, on_gpu=True) == found

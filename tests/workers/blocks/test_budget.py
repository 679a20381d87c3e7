"""As much is kept as memory holds, and no more."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.workers.blocks.models import make_model, with_lora
from workers.blocks.budget import block_bytes
from workers.blocks.engine import install
from workers.blocks.keeping import SAFETY, BlockBytes, choose_keeping

COST = BlockBytes(all=100, attention=40, input=8, working=200)
TOKENS = 10
WORKING = TOKENS * COST.working


def room_for(num_bytes: int) -> int:
    """Free memory of which `num_bytes` are left beside what one block works with."""
    return -int(-(num_bytes + WORKING) / SAFETY) + 1


@pytest.mark.parametrize(
    ("num_bytes", "expected"),
    [
        (4000, ["all"] * 4),
        (3999, ["attention", "all", "all", "all"]),
        (3399, ["input", "all", "all", "all"]),
        (2481, ["input", "attention", "all", "all"]),
        (320, ["input"] * 4),
        (0, ["input"] * 4),
    ],
)
def test_blocks_give_up_one_after_the_other(num_bytes: int, expected: list[str]) -> None:
    assert choose_keeping([COST] * 4, num_tokens=TOKENS, free_bytes=room_for(num_bytes)) == expected


@given(free=st.integers(0, 10**6), num=st.integers(1, 40), tokens=st.integers(1, 50))
def test_what_is_kept_never_exceeds_the_memory_unless_nothing_would_do(free: int, num: int, tokens: int) -> None:
    keeping = choose_keeping([COST] * num, num_tokens=tokens, free_bytes=free)
    needed = tokens * (sum(COST.of(one) for one in keeping) + COST.working)
    assert needed <= free * SAFETY or keeping == ["input"] * num


def test_the_bytes_of_a_block_are_those_of_its_shapes() -> None:
    block = install(with_lora(make_model("llama")), is_wide=False).blocks[0]
    hidden, inner, joined, attended, rank = 48, 80, 48 + 2 * 24, 48, 4
    attention = joined + attended + 4 * rank
    gate_up = 2 * inner + 3 * rank
    found = block_bytes(block, 2)
    assert found.all == 2 * (attention + gate_up + 2 * hidden)
    assert found.attention == 2 * (attention + 2 * hidden)
    assert found.input == 2 * hidden

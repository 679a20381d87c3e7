"""That peers are measured on our rows: in the environment that parity tests make, on a model of two layers."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from tests.bench.stand_ins.flash_attn.bert_padding import pad_input, unpad_input
from tests.bench.stand_ins.flash_attn.flash_attn_interface import flash_attn_func, flash_attn_varlen_func
from tests.bench.workload import row_lengths
from tests.parity.environments import environment
from tests.parity.jobs import PINS

ROOT = Path(__file__).parents[2]
NUM_STEPS, NUM_WARM, NUM_ROWS = 6, 2, 4


@pytest.mark.slow
@pytest.mark.parametrize(("contender", "blocks"), [("naive", "padded, sdpa"), ("trl", "packed, sdpa")])
def test_a_peer_trains_on_our_rows_and_counts_their_tokens(contender: str, blocks: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            environment("trl", PINS), "-m", "tests.bench.peers", contender, "--steps", str(NUM_STEPS),
            "--warm", str(NUM_WARM), "--batch", str(NUM_ROWS), "--rows", tmp_path,
        ],
        cwd=ROOT, env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    (file,) = tmp_path.glob("*.json")
    row = json.loads(file.read_text())
    assert row["blocks"].startswith(blocks)
    assert row["steps"] == NUM_STEPS - NUM_WARM
    assert row["tokens_per_second"] > 0
    assert 0.6 < row["trained_share"] < 0.7
    if contender == "naive":
        # Every row is seen once, so at most the shortest ones fall into the warm steps.
        lengths = sorted(row_lengths(NUM_STEPS * NUM_ROWS, None))
        timed = (NUM_STEPS - NUM_WARM) * NUM_ROWS
        assert sum(lengths[:timed]) <= row["tokens_per_step"] * row["steps"] <= sum(lengths[-timed:]) + row["steps"]


def test_padding_is_taken_out_and_put_back() -> None:
    states = torch.randn(3, 5, 2)
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [0, 1, 1, 1, 0]])
    flat, indices, starts, longest, used = unpad_input(states, mask)
    assert starts.tolist() == [0, 2, 7, 10]
    assert (longest, used.tolist()) == (5, [2, 5, 3])
    assert torch.equal(flat[2:7], states[1])
    assert torch.equal(pad_input(flat, indices, 3, 5), states * mask[..., None])


def test_what_the_stand_in_cannot_do_is_refused() -> None:
    query = torch.randn(1, 4, 2, 8)
    with pytest.raises(NotImplementedError, match="softcap"):
        flash_attn_func(query, query, query, softcap=30.0)
    with pytest.raises(NotImplementedError, match="dropout"):
        flash_attn_func(query, query, query, 0.1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="flash attention is a GPU's")
def test_the_stand_in_attends_within_rows_as_sdpa_does() -> None:
    lengths = [5, 64, 17]
    starts = torch.tensor([0, 5, 69, 86], dtype=torch.int32, device="cuda")
    query, key, value = (
        torch.randn(86, heads, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True) for heads in (4, 2, 2)
    )
    given = torch.randn_like(query)
    found = []
    for attend in (
        lambda: flash_attn_varlen_func(query, key, value, starts, starts, 64, 64, causal=True),
        lambda: torch.cat(
            [
                torch.nn.functional.scaled_dot_product_attention(
                    *(one.transpose(0, 1)[None] for one in rows), is_causal=True, enable_gqa=True
                )[0].transpose(0, 1)
                for rows in zip(*(one.split(lengths) for one in (query, key, value)), strict=True)
            ]
        ),
    ):
        out = attend()
        found.append((out, *torch.autograd.grad(out, (query, key, value), given)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=3e-2, rtol=3e-2)

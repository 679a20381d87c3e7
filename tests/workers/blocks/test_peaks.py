"""Tests of what a block works with against what is planned for it: memory is counted where tensors are made.

Of a GPU's kernels, which need no memory of their own, only the results are made here.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from tests.workers.blocks.models import make_model, with_lora
from workers.blocks import budget, linears, pointwise, sublayers
from workers.blocks.engine import install
from workers.blocks.function import run_block
from workers.blocks.offloading import HostMemory, Inputs
from workers.blocks.operands import Seed
from workers.blocks.room import with_room_behind
from workers.blocks.rows import Attended, Rows
from workers.blocks.sublayers import Surroundings

HIDDEN, INNER, HEAD = 512, 1792, 128


class Peak(TorchDispatchMode):
    """The most bytes that tensors made inside take at once."""

    def __init__(self, there: list[Tensor]) -> None:
        super().__init__()
        self._sizes = {one.untyped_storage()._cdata: 0 for one in there}
        self._now = self.most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        for one in tree_iter(found):
            if isinstance(one, Tensor) and one.untyped_storage()._cdata not in self._sizes:
                storage = one.untyped_storage()
                self._sizes[storage._cdata] = storage.nbytes()
                self._now += storage.nbytes()
                weakref.finalize(storage, self._gone, storage._cdata)
        self.most = max(self.most, self._now)
        return found

    def _gone(self, place: int) -> None:
        self._now -= self._sizes.pop(place, 0)


@pytest.fixture
def as_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def attend(query_TGD: Tensor, *_: Any, room: int = 0) -> Attended:
        out_TN = with_room_behind(query_TGD, query_TGD.shape[1] * query_TGD.shape[2], room)
        return Attended(out_TN.unflatten(1, query_TGD.shape[1:]), (torch.empty(query_TGD.shape[:2]),))

    stands_for: dict[str, Callable[..., Any]] = {
        "attend": attend,
        "attend_backward": lambda *_: None,
        "gated": lambda *_: None,
        "gated_backward": lambda _, gate_up, __: gate_up,
        "rms_norm": lambda x, *_: torch.empty(x.shape[0]),
        "rms_norm_backward": lambda gradient, x, norm, inverse, out, added=None: out,
        "rotate": lambda heads, *_: heads,
    }
    for name, one in stands_for.items():
        monkeypatch.setattr(sublayers, name, one)
    monkeypatch.setattr(pointwise, "dropped", lambda x, *_: torch.empty(x.shape, dtype=x.dtype))
    monkeypatch.setattr(pointwise, "add_dropped", lambda *_: None)


@pytest.fixture
def as_products(as_kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With those that drop within products besides, and the parts of sums that grow with tokens."""

    def product(x_TK: Tensor, down_RK: Tensor, *_: Any) -> Tensor:
        num_ranks = 1 << max(4, (down_RK.shape[0] - 1).bit_length())
        parts = torch.empty(max(1, x_TK.shape[1] // 512), x_TK.shape[0], num_ranks)
        assert parts.shape[0] <= 8
        return torch.empty(x_TK.shape[0], down_RK.shape[0], dtype=x_TK.dtype)

    def of_rows(thin_TR: Tensor, x_TK: Tensor, *_: Any) -> Tensor:
        return torch.empty(thin_TR.shape[1], x_TK.shape[1])

    monkeypatch.setattr(linears, "dropped_product", product)
    monkeypatch.setattr(linears, "add_dropped_product", lambda *_: None)
    monkeypatch.setattr(linears, "product_of_dropped", of_rows)


@pytest.mark.parametrize("how", ["nothing is dropped", "dropped within products", "copied to be dropped"])
@pytest.mark.parametrize(
    ("num_tokens", "share", "pieces"), [(1024, 1.0, 1), (2048, 0.74, 2), (4096, 1.0, 4), (4096, 0.49, 4)]
)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_a_block_that_keeps_its_input_works_within_what_is_planned(
    family: str, num_tokens: int, share: float, pieces: int, how: str, request: pytest.FixtureRequest
) -> None:
    dropout = 0.0 if how == "nothing is dropped" else 0.1
    request.getfixturevalue("as_products" if how == "dropped within products" else "as_kernels")
    if how == "copied to be dropped":
        request.getfixturevalue("monkeypatch").setattr(budget, "drops_within_products", lambda _: False)
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INNER, "head_dim": HEAD, "num_key_value_heads": 1}
    model = with_lora(make_model(family, dtype=torch.bfloat16, num_attention_heads=4, **sizes), dropout=dropout)
    engine = install(model, is_wide=True)
    block, cost = engine.blocks[1], engine.costs[1]
    rows = Rows.of([256] * (num_tokens // 256), torch.device("cpu"))
    angles = torch.zeros(num_tokens, HEAD, dtype=torch.bfloat16)
    read_N = None if share == 1.0 else torch.arange(int(share * num_tokens))
    x_TH = torch.zeros(num_tokens, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    gradient_TH = torch.zeros_like(x_TH)
    weights = [
        one
        for group in block.groups()
        for one in [*group.parameters(), *(view for _, view, _ in group.copies())]
        + [piece for _, piece in group.weights.beside(None)]
    ]
    seed = Seed(torch.tensor([3])) if dropout else None
    around = Surroundings(rows, angles, angles, read_N=read_N, pieces=pieces)
    with Peak([x_TH, angles, *weights]) as forward:
        result_TH = run_block(block, x_TH, around, "input", seed, Inputs(HostMemory()))
    parameters = block.parameters()
    with Peak([x_TH, angles, gradient_TH, result_TH, *weights]) as backward:
        torch.autograd.grad(result_TH, [x_TH, *parameters], gradient_TH)
    of_parameters = 2 * sum(one.nbytes for one in parameters)  # and in float32 before they are scaled
    # The room for branches behind each tensor's rows weighs more in so narrow a block than it does elsewhere.
    planned = 1.02 * num_tokens * cost.lean_working(pieces) + of_parameters
    assert forward.most <= planned
    assert backward.most + gradient_TH.nbytes <= planned
    assert share < 1.0 or backward.most > 0.75 * planned, "and not far below"

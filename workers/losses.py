"""Cross-entropy at the tokens that carry loss, without ever holding the logits of a whole batch.

The model's own forward pass runs; only what reaches its output layer is swapped for the hidden states at the N
positions that are needed. Letters of shapes: B rows, T tokens, N loss-carrying tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from workers.batching import Batch
from workers.blocks.pointwise import cross_entropy
from workers.blocks.sizes import LOGIT_BYTES as GPU_LOGIT_BYTES

LOGIT_BYTES = {"cpu": 2**26, "cuda": GPU_LOGIT_BYTES}
"""Most bytes of logits at once, where nobody says less."""
_within: ContextVar[int | None] = ContextVar("_within", default=None)

_is_plain: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@contextmanager
def logits_within(num_bytes: int | None) -> Iterator[None]:
    """Inside, logits take so many bytes at once, at most; None for as many as otherwise."""
    token = _within.set(num_bytes)
    try:
        yield
    finally:
        _within.reset(token)


def summed_cross_entropy(
    model: Any, batch: Batch, *, note: Callable[[Tensor], None] | None = None
) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy in nats over the batch's loss-carrying tokens and their number, both on the device.

    With weights, the sum of weight times cross-entropy, and the sum of weights. `note` is given each row's sum
    without weights, on the device and apart from what is learned.
    """
    losses_N = token_losses(model, batch)
    if note is not None:
        losses = losses_N.detach()
        note(losses.new_zeros(len(batch.lengths)).index_add_(0, batch.rows_N, losses))
    if batch.weights_N is not None:
        return (losses_N * batch.weights_N).sum(), batch.weights_N.sum()
    # Filled on the device: a copy from the host would wait for it.
    return losses_N.sum(), losses_N.new_full((), batch.num_loss_tokens, dtype=torch.long)


def token_losses(model: Any, batch: Batch) -> Tensor:
    """Cross-entropy in nats of every loss-carrying token, float32, in the order of `batch.targets_N`."""
    assert batch.num_loss_tokens, "a row without loss-carrying tokens was not sorted out"
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "use_cache": False}
    if batch.position_ids is not None:
        inputs["position_ids"] = batch.position_ids
    head = _output_layer(model)
    if head is None:
        logits_BTV = model(**inputs).logits
        return functional.cross_entropy(
            logits_BTV.flatten(0, 1)[batch.positions_N].float(), batch.targets_N, reduction="none"
        )
    if not head_is_plain(model):
        # Something follows the output layer (a cap, a scale): the model does it itself, at the N positions only.
        with _Gathering(head, batch.positions_N, keep=False):
            logits_NV = model(**inputs).logits[0]
        return functional.cross_entropy(logits_NV.float(), batch.targets_N, reduction="none")
    with _Gathering(head, batch.positions_N, keep=True) as gathered:
        model(**inputs)
    assert gathered.hidden_NH is not None
    with _autocast(model):
        return _chunked(head, gathered.hidden_NH, batch.targets_N, _width(head, model))


def head_is_plain(model: Any) -> bool:
    """Whether the model's logits are what its output layer gives, with nothing behind it.

    Asked of the model, not of a list of names: one forward pass in which the output layer answers with known
    numbers, large enough that a cap, a scale or a shift cannot leave them alone.
    """
    head = _output_layer(model)
    if head is None:
        return False
    if head not in _is_plain:
        width = _width(head, model)
        device = next(model.parameters()).device
        known = torch.linspace(-200.0, 200.0, width, device=device)[None, None]
        seen: list[bool] = []

        def answer(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
            seen.append(True)
            return known.to(output.dtype).expand_as(output)

        handle = head.register_forward_hook(answer)
        devices = [device] if device.type == "cuda" else []
        try:
            # Dropout must not use up random numbers here, or a resumed run would differ from an unbroken one.
            with torch.no_grad(), torch.random.fork_rng(devices=devices):
                logits_BTV = model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=device), use_cache=False).logits
        finally:
            handle.remove()
        expected = known.to(logits_BTV.dtype).expand_as(logits_BTV) if logits_BTV.shape[-1] == width else None
        _is_plain[head] = bool(seen) and expected is not None and torch.equal(logits_BTV, expected)
    return _is_plain[head]


def _autocast(model: Any) -> AbstractContextManager[None]:
    """The mixed precision that the model's own forward has, for the output layer that runs outside of it."""
    found: AbstractContextManager[None] = model.autocast() if hasattr(model, "autocast") else nullcontext()
    return found


def _output_layer(model: Any) -> nn.Module | None:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    found = base.get_output_embeddings()
    return found if isinstance(found, nn.Module) else None


def _width(head: nn.Module, model: Any) -> int:
    """Entries of one token's logits."""
    return int(head.out_features) if isinstance(head, nn.Linear) else int(model.config.get_text_config().vocab_size)


class _Gathering:
    """While entered, the output layer is given the hidden states at some positions only.

    With `keep` they are kept in `hidden_NH` and the layer computes one position, whose logits nobody reads.
    """

    def __init__(self, head: nn.Module, positions_N: Tensor, *, keep: bool) -> None:
        self._head = head
        self._positions_N = positions_N
        self._keep = keep
        self.hidden_NH: Tensor | None = None

    def __enter__(self) -> _Gathering:
        self._handle = self._head.register_forward_pre_hook(self._swap)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()

    def _swap(self, _module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden_BTH = inputs[0]
        hidden_NH = hidden_BTH.flatten(0, -2).index_select(0, self._positions_N)
        if not self._keep:
            return (hidden_NH[None], *inputs[1:])
        self.hidden_NH = hidden_NH
        return (hidden_NH[None, :1].detach(), *inputs[1:])


def _chunked(head: nn.Module, hidden_NH: Tensor, targets_N: Tensor, width: int) -> Tensor:
    """Cross-entropy per token from hidden states, with the logits of one chunk of tokens at a time."""
    limit = _within.get() or LOGIT_BYTES.get(hidden_NH.device.type, LOGIT_BYTES["cpu"])
    size = max(16, limit // (hidden_NH.element_size() * width))
    # Products work in tiles of 128 rows.
    size -= size % 128 if size > 128 else 0
    if type(head) is nn.Linear and not any(parameter.requires_grad for parameter in head.parameters()):
        return _FrozenHead.apply(hidden_NH, head.weight, head.bias, targets_N, size)

    def losses(part_NH: Tensor, part_N: Tensor) -> Tensor:
        return functional.cross_entropy(head(part_NH).float(), part_N, reduction="none")

    parts = zip(hidden_NH.split(size), targets_N.split(size), strict=True)
    # A trainable output layer: each chunk's logits are computed again on the way back instead of being kept.
    return torch.cat([checkpoint(losses, *part, use_reentrant=False) for part in parts])


class _FrozenHead(torch.autograd.Function):
    """Cross-entropy behind a frozen linear layer; the gradient of the hidden states is made on the way forward."""

    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, targets_N: Tensor, size: int
    ) -> Tensor:
        wants_gradient = ctx.needs_input_grad[0]
        losses_N = torch.empty(hidden_NH.shape[0], dtype=torch.float32, device=hidden_NH.device)
        gradient_NH = torch.empty_like(hidden_NH) if wants_gradient else None
        for start in range(0, hidden_NH.shape[0], size):
            part = slice(start, start + size)
            logits_CV = functional.linear(hidden_NH[part].to(weight_VH.dtype), weight_VH, bias_V)
            losses_N[part] = cross_entropy(logits_CV, targets_N[part], with_gradient=wants_gradient)
            if gradient_NH is not None:
                gradient_NH[part] = (logits_CV @ weight_VH).to(hidden_NH.dtype)
            del logits_CV  # before the next chunk's are made, not after
        if gradient_NH is not None:
            ctx.save_for_backward(gradient_NH)
        return losses_N

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_NH,) = ctx.saved_tensors
        # In float32: a share of the tokens, rounded to 16 bits first, would scale the whole step.
        return (gradient_NH.float() * outputs[0][:, None]).to(gradient_NH.dtype), None, None, None, None

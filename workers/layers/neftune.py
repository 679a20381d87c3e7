"""NEFTune: random noise on the embeddings of the rows that are trained on (Jain et al. 2023, algorithm 1)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from workers.batching import Batch

# B rows, T tokens of the longest row (or of all rows, packed into one), L tokens of one row, H hidden.


class EmbeddingNoise:
    """The noise of one optimizer step: uniform in [-1, 1], times alpha / sqrt(L * H), on each row's own tokens.

    L is the row's own length, whether it is padded or packed with others; padding gets no noise, and neither do
    virtual tokens, which do not come out of the base's input embeddings.

    A pure function of seed and step, drawn row after row in the order in which `split_step` sorts them. So a resumed
    run sees the noise of an unbroken one, and on one device every row sees the same noise whatever the micro-batch
    size, packed or not, unless a budget of tokens settles the order. A GPU draws other numbers than a CPU.
    """

    def __init__(self, alpha: float, *, seed: int, step: int, device: torch.device) -> None:
        self._alpha = alpha
        digest = hashlib.blake2b(f"neftune:{seed}:{step}".encode(), digest_size=7).digest()
        self._generator = torch.Generator(device).manual_seed(int.from_bytes(digest))

    @contextmanager
    def added_to(self, model: Any, batch: Batch) -> Iterator[None]:
        """While entered, the model reads the batch through noisy embeddings, also when activations are recomputed.

        The step's micro-batches must come in their order, each once. With alpha 0 nothing happens.
        """
        if not self._alpha:
            yield
            return
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        noise_BTH: Tensor | None = None

        def add(_module: Any, _inputs: Any, output: Tensor) -> Tensor | None:
            nonlocal noise_BTH
            if output.shape[:-1] != batch.input_ids.shape:
                return None
            if noise_BTH is None:
                noise_BTH = self._draw(batch, output)
            return output + noise_BTH

        handle = base.get_input_embeddings().register_forward_hook(add)
        try:
            yield
        finally:
            handle.remove()
        assert noise_BTH is not None, "the model did not read the batch through its input embeddings"

    def _draw(self, batch: Batch, embedded_BTH: Tensor) -> Tensor:
        size = embedded_BTH.shape[-1]
        noise_BTH = torch.zeros(embedded_BTH.shape, dtype=torch.float32, device=embedded_BTH.device)
        flat_SH = noise_BTH.view(-1, size)
        start = 0
        for length in batch.lengths:
            row_LH = flat_SH[start : start + length]
            row_LH.uniform_(-1, 1, generator=self._generator).mul_(self._alpha / math.sqrt(length * size))
            start += length if batch.position_ids is not None else batch.input_ids.shape[1]
        return noise_BTH.to(embedded_BTH.dtype)

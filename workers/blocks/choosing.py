"""Whether a run's blocks are computed by hand: where they can be, and where they agree with the model's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from workers.batching import Batch
from workers.blocks.agreement import TOLERANCES, compare
from workers.blocks.engine import Engine, install
from workers.blocks.families import NotByHandError
from workers.device_errors import is_gpu_failure, is_out_of_memory
from workers.errors import first_line


def hand_written(
    model: Any,
    sample: Batch,
    loss: Callable[[Any, Batch], Tensor],
    lengths: Sequence[int],
    *,
    is_lean: bool,
    say: Callable[[str], None],
    warn: Callable[[str], None],
) -> Engine | None:
    """The hand-written blocks of a model with its adapter, tried on `sample`, a small packed batch; `lengths` are those
    of a usual step's rows, in tokens. With `is_lean` that takes little memory, too.

    None where the model's own blocks do it: they are not among those written by hand, or the two do not agree, of
    which a warning is given.
    """
    device = sample.input_ids.device
    try:
        # Beside the weights only on a GPU: on a CPU the file that is mapped into memory would be read and copied.
        engine = install(model, is_wide=device.type == "cuda")
    except NotByHandError as reason:
        if device.type == "cuda":
            say(f"The model's own blocks are used, which are slower: {reason}.")
        return None
    except Exception as error:
        if is_out_of_memory(error) or is_gpu_failure(error):
            raise
        warn(f"The model's own blocks are used, because the fast ones cannot be made of them: {first_line(error)}")
        return None
    try:
        if is_lean:
            engine.limit_scratch()
        if not engine.has_prefix:
            engine.attend_by(engine.faster_attention(lengths))
        off = compare(engine, model, sample, loss)
    except Exception as error:
        # Of a compiler, a kernel or an operation of another version; the model's own blocks do without them.
        engine.remove()
        if is_out_of_memory(error) or is_gpu_failure(error):
            raise
        warn(f"The fast blocks do not run here, and the model's own are used: {first_line(error)}")
        return None
    if not off.within(TOLERANCES.get(_dtype(model), TOLERANCES[torch.float32])):
        engine.remove()
        warn(
            f"The fast blocks give gradients that are {off} the model's own, so they are not used. Please "
            "report this with the versions on the adapter's page."
        )
        return None
    return engine


def _dtype(model: Any) -> torch.dtype:
    found: torch.dtype = model.get_input_embeddings().weight.dtype
    return found

"""Supervised fine-tuning: the next token of the turns that are to be learned."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from workers.examples import ExampleType
from workers.objectives import Objective

if TYPE_CHECKING:
    from torch import Tensor

    from workers.batching import Batch


class SupervisedFineTuning(Objective):
    """Cross-entropy of each loss-carrying token given everything before it."""

    name = "sft"
    label = "Supervised fine-tuning"
    help = "Learns to write the assistant's turns of the dataset."
    example_type: ExampleType = "chat"

    def loss(self, model: Any, batch: Batch, *, note: Callable[[Tensor], None] | None = None) -> tuple[Tensor, Tensor]:
        """Summed cross-entropy in nats and the number of tokens it covers, both weighted, on the device."""
        from workers.losses import summed_cross_entropy

        return summed_cross_entropy(model, batch, note=note)


PLUGIN = SupervisedFineTuning()

"""Perplexity per byte: comparable between bases, whatever tokens they cut a text into."""

from __future__ import annotations

from workers.evaluations import RowValue, ScoredRow
from workers.evaluations._losses import ExponentialOfLoss, mean_loss


class BytePerplexity(ExponentialOfLoss):
    name = "byte_perplexity"
    label = "Perplexity per byte"
    help = (
        "Exponential of the loss per byte of the reference answers' text (Gao et al. 2020, The Pile, section 3.1): "
        "bases with different tokenizers compare by it. Lower is better; 1 would be certainty."
    )
    smallest_effect = 0.005  # as a share of the base's

    def row_value(self, row: ScoredRow) -> RowValue:
        """The row's loss per byte, weighted by its bytes."""
        return mean_loss(row.loss_sum, row.num_bytes)


PLUGIN = BytePerplexity()

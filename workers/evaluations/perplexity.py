"""Perplexity: the held-out loss as a number of equally likely next tokens."""

from __future__ import annotations

from workers.evaluations import RowValue, ScoredRow
from workers.evaluations._losses import ExponentialOfLoss, mean_loss


class Perplexity(ExponentialOfLoss):
    name = "perplexity"
    label = "Perplexity"
    help = (
        "Exponential of the held-out loss: between how many equally likely tokens the model wavers. Bases with other "
        "tokenizers do not compare; perplexity per byte does."
    )
    smallest_effect = 0.02  # as a share of the base's

    def row_value(self, row: ScoredRow) -> RowValue:
        """The row's mean loss per token, weighted by its tokens."""
        return mean_loss(row.loss_sum, row.num_tokens)


PLUGIN = Perplexity()

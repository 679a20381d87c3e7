"""Held-out loss: how surprised the model is by the right answers."""

from __future__ import annotations

from workers.evaluations import MeanEvaluation, RowValue, ScoredRow
from workers.evaluations._losses import mean_loss


class Loss(MeanEvaluation):
    name = "loss"
    label = "Held-out loss"
    unit = "nats/token"
    help = "Mean cross-entropy per token of the reference answers. Lower is better; 0 would be certainty."
    higher_is_better = False
    needs = "loss"
    smallest_effect = 0.02

    def row_value(self, row: ScoredRow) -> RowValue:
        """The row's mean loss, weighted by its tokens: the score is the mean over all tokens."""
        return mean_loss(row.loss_sum, row.num_tokens)


PLUGIN = Loss()

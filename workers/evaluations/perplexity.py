"""Perplexity: the held-out loss as a number of equally likely next tokens."""

from __future__ import annotations

import math

from workers.evaluations import MeanEvaluation, RowValue, ScoredRow


class Perplexity(MeanEvaluation):
    name = "perplexity"
    label = "Perplexity"
    help = (
        "Exponential of the held-out loss: between how many equally likely tokens the model wavers. Bases with other "
        "tokenizers do not compare; perplexity per byte does."
    )
    higher_is_better = False
    needs = "loss"
    smallest_effect = 0.02  # as a share of the base's

    def row_value(self, row: ScoredRow) -> RowValue:
        """The row's mean loss per token, weighted by its tokens."""
        return RowValue(row.loss_sum / row.num_tokens, row.num_tokens) if row.num_tokens else RowValue(0.0, 0.0)

    def effect_at(self, base_value: float) -> float:
        """A share of the base's figure: differences of exponentials grow with them."""
        return self.smallest_effect * base_value

    def present(self, mean: float) -> float:
        """exp(loss); infinite where that overflows."""
        return math.exp(mean) if mean < 700 else math.inf


PLUGIN = Perplexity()

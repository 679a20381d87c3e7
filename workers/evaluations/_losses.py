"""What the figures of the loss share."""

from __future__ import annotations

import math

from workers.evaluations import MeanEvaluation, RowValue


def mean_loss(loss_sum: float, num_units: int) -> RowValue:
    """A row's mean loss per token or byte, weighted by their number; no weight for a row without any."""
    return RowValue(loss_sum / num_units, num_units) if num_units else RowValue(0.0, 0.0)


class ExponentialOfLoss(MeanEvaluation):
    """A perplexity: the exponential of a mean loss."""

    higher_is_better = False
    needs = "loss"

    def effect_at(self, base_value: float) -> float:
        """A share of the base's figure: differences of exponentials grow with them."""
        return self.smallest_effect * base_value

    def present(self, mean: float) -> float:
        """exp(mean); infinite where that overflows."""
        return math.exp(mean) if mean < 700 else math.inf

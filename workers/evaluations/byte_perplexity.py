"""Perplexity per byte: comparable between bases, whatever tokens they cut a text into."""

from __future__ import annotations

import math

from workers.evaluations import MeanEvaluation, RowValue, ScoredRow


class BytePerplexity(MeanEvaluation):
    name = "byte_perplexity"
    label = "Perplexity per byte"
    help = (
        "Exponential of the loss per byte of the reference answers' text (Gao et al. 2020, The Pile, section 3.1): "
        "bases with different tokenizers compare by it. Lower is better; 1 would be certainty."
    )
    higher_is_better = False
    needs = "loss"
    smallest_effect = 0.005  # as a share of the base's

    def row_value(self, row: ScoredRow) -> RowValue:
        """The row's loss per byte, weighted by its bytes."""
        return RowValue(row.loss_sum / row.num_bytes, row.num_bytes) if row.num_bytes else RowValue(0.0, 0.0)

    def effect_at(self, base_value: float) -> float:
        """A share of the base's figure: differences of exponentials grow with them."""
        return self.smallest_effect * base_value

    def present(self, mean: float) -> float:
        """exp(loss per byte); infinite where that overflows."""
        return math.exp(mean) if mean < 700 else math.inf


PLUGIN = BytePerplexity()

"""Exact match of answers, after the normalisation of SQuAD."""

from __future__ import annotations

from workers.evaluations import MeanEvaluation, RowValue, ScoredRow
from workers.evaluations._answers import normalise


class ExactMatch(MeanEvaluation):
    name = "exact_match"
    label = "Exact match"
    help = (
        "Share of generated answers that equal the reference, apart from case, punctuation, articles and spaces "
        "(Rajpurkar et al. 2016). Suits short answers."
    )
    higher_is_better = True
    needs = "answer"
    smallest_effect = 0.05
    bounds = (0.0, 1.0)

    def row_value(self, row: ScoredRow) -> RowValue:
        """1 for a match, else 0."""
        return RowValue(float(normalise(row.answer or "") == normalise(row.reference)))


PLUGIN = ExactMatch()

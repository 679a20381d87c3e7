"""Token F1 of answers, as SQuAD measures it."""

from __future__ import annotations

from collections import Counter

from workers.evaluations import MeanEvaluation, RowValue, ScoredRow
from workers.evaluations._answers import normalise


class TokenF1(MeanEvaluation):
    name = "token_f1"
    label = "Token F1"
    help = (
        "Overlap of words between the generated answer and the reference: harmonic mean of precision and recall, "
        "averaged over rows (Rajpurkar et al. 2016)."
    )
    higher_is_better = True
    needs = "answer"
    smallest_effect = 0.02
    bounds = (0.0, 1.0)

    def row_value(self, row: ScoredRow) -> RowValue:
        """F1 over the words of both texts, counted with repetition; two empty texts agree."""
        answer = normalise(row.answer or "").split()
        reference = normalise(row.reference).split()
        if not answer or not reference:
            return RowValue(float(answer == reference))
        num_shared = (Counter(answer) & Counter(reference)).total()
        if num_shared == 0:
            return RowValue(0.0)
        precision, recall = num_shared / len(answer), num_shared / len(reference)
        return RowValue(2 * precision * recall / (precision + recall))


PLUGIN = TokenF1()

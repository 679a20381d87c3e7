"""chrF over all answers: shared runs of characters, so that word endings and scripts without spaces count."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from workers.evaluations import Evaluation, ScoredRow

if TYPE_CHECKING:
    from workers.evaluations import Array

ORDER = 6
BETA_SQUARED = 4.0


class ChrF(Evaluation):
    name = "chrf"
    label = "chrF"
    help = (
        "Runs of one to six characters that the generated answers share with the references, recall counting twice, "
        "over all rows together (Popović 2015, with sacrebleu's settings). Suits translation into any language; 100 "
        "would be every character."
    )
    higher_is_better = True
    needs = "answer"
    smallest_effect = 1.0
    bounds = (0.0, 100.0)

    def row_counts(self, row: ScoredRow) -> tuple[float, ...]:
        """For each order the n-grams that are shared, of the answer and of the reference; and 1."""
        answer, reference = ("".join(text.split()) for text in (row.answer or "", row.reference))
        counts: list[float] = []
        for order in range(1, ORDER + 1):
            of_answer, of_reference = _ngrams(answer, order), _ngrams(reference, order)
            # An order that the reference is too short for says nothing of the answer.
            num_of_answer = of_answer.total() if of_reference else 0
            counts += [(of_answer & of_reference).total(), num_of_answer, of_reference.total()]
        return (*counts, 1.0)

    def figure(self, sums: Array) -> Array:
        """F2 of the precisions' and the recalls' means over the orders that both texts have, times 100."""
        import numpy as np

        shared, of_answer, of_reference = (sums[..., which : 3 * ORDER : 3] for which in range(3))
        is_counted = (of_answer > 0) & (of_reference > 0)
        num_orders = np.maximum(1, is_counted.sum(axis=-1))
        means = [
            np.where(is_counted, shared / np.where(total > 0, total, 1.0), 0.0).sum(axis=-1) / num_orders
            for total in (of_answer, of_reference)
        ]
        below = BETA_SQUARED * means[0] + means[1]
        return 100.0 * (1 + BETA_SQUARED) * means[0] * means[1] / np.where(below > 0, below, 1.0)


def _ngrams(text: str, order: int) -> Counter[str]:
    return Counter(text[at : at + order] for at in range(len(text) - order + 1))


PLUGIN = ChrF()

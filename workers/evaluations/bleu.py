"""BLEU over all answers, as sacrebleu gives it."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from workers.evaluations import Evaluation, ScoredRow

if TYPE_CHECKING:
    from workers.evaluations import Array

ORDER = 4


class Bleu(Evaluation):
    name = "bleu"
    label = "BLEU"
    help = (
        "Words and runs of up to four words that the generated answers share with the references, with a penalty for "
        "short answers, over all rows together (Papineni et al. 2002; sacrebleu's tokens 13a and exponential "
        "smoothing, Post 2018). Suits translation; 100 would be every word."
    )
    higher_is_better = True
    needs = "answer"
    smallest_effect = 1.0
    bounds = (0.0, 100.0)

    def row_counts(self, row: ScoredRow) -> tuple[float, ...]:
        """Shared n-grams of orders 1 to 4, n-grams of the answer of orders 1 to 4, words of the answer, words of the
        reference, and 1."""
        found = _scorer().sentence_score(row.answer or "", [row.reference])
        return (*found.counts, *found.totals, found.sys_len, found.ref_len, 1.0)

    def figure(self, sums: Array) -> Array:
        """Geometric mean of the precisions, times the brevity penalty, times 100."""
        import numpy as np

        shared, totals = sums[..., :ORDER], sums[..., ORDER : 2 * ORDER]
        num_words, num_reference_words = sums[..., 2 * ORDER], sums[..., 2 * ORDER + 1]
        # The k-th order without a shared n-gram counts as 1 / 2^k of one.
        smoothed = np.where(shared > 0, shared, 0.5 ** np.cumsum(shared == 0, axis=-1))
        is_possible = (totals > 0).all(axis=-1) & (shared > 0).any(axis=-1)
        precisions = smoothed / np.where(totals > 0, totals, 1.0)
        penalty = np.exp(np.minimum(0.0, 1.0 - num_reference_words / np.where(num_words > 0, num_words, 1.0)))
        return np.where(is_possible, 100.0 * penalty * np.exp(np.log(precisions).mean(axis=-1)), 0.0)


@cache
def _scorer() -> Any:
    from sacrebleu.metrics import BLEU

    # For its counts alone, which no kind of order or smoothing changes.
    return BLEU(effective_order=True)


PLUGIN = Bleu()

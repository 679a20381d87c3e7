"""What the ROUGE measures share (Lin 2004, "ROUGE: A package for automatic evaluation of summaries")."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from workers.evaluations import MeanEvaluation, RowValue, ScoredRow

# Words of every script: the usual implementation knows ASCII alone, and agrees with this one there.
_WORD = re.compile(r"[^\W_]+")


def words(text: str) -> list[str]:
    """Lower-case words; punctuation and underscores separate them. No stemming."""
    return _WORD.findall(text.lower())


class NgramRouge(MeanEvaluation):
    """ROUGE-N: F1 over the n-grams that two texts share, counted with repetition, averaged over rows."""

    higher_is_better = True
    needs = "answer"
    smallest_effect = 0.02
    bounds = (0.0, 1.0)
    order: int

    def row_value(self, row: ScoredRow) -> RowValue:
        """F1 of the answer's n-grams; 0 where either text has none."""
        answer, reference = (self._ngrams(text) for text in (row.answer or "", row.reference))
        return RowValue(f1((answer & reference).total(), answer.total(), reference.total()))

    def _ngrams(self, text: str) -> Counter[tuple[str, ...]]:
        found = words(text)
        return Counter(tuple(found[at : at + self.order]) for at in range(len(found) - self.order + 1))


def f1(num_shared: int, num_answer: int, num_reference: int) -> float:
    """Harmonic mean of precision and recall."""
    return 2 * num_shared / (num_answer + num_reference) if num_shared else 0.0


def longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence, by dynamic programming over bits (Hyyrö 2004): a word of the second
    text costs a few operations on integers as long as the first, so answers of a thousand words cost milliseconds."""
    positions: dict[str, int] = {}
    for at, word in enumerate(first):
        positions[word] = positions.get(word, 0) | 1 << at
    mask = (1 << len(first)) - 1
    row = mask
    for word in second:
        shared = row & positions.get(word, 0)
        row = ((row + shared) | (row - shared)) & mask
    return len(first) - row.bit_count()

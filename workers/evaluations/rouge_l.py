"""ROUGE-L: the longest common subsequence of words of answer and reference."""

from __future__ import annotations

from workers.evaluations import MeanEvaluation, RowValue, ScoredRow
from workers.evaluations._rouge import f1, longest_common_subsequence, words


class RougeL(MeanEvaluation):
    name = "rouge_l"
    label = "ROUGE-L"
    help = (
        "F1 over the longest run of words, gaps allowed, that the generated answer and the reference have in the same "
        "order, averaged over rows (Lin 2004). Suits summaries."
    )
    higher_is_better = True
    needs = "answer"
    smallest_effect = 0.02
    bounds = (0.0, 1.0)

    def row_value(self, row: ScoredRow) -> RowValue:
        """F1 of the longest common subsequence; 0 where either text has no word."""
        answer, reference = words(row.answer or ""), words(row.reference)
        return RowValue(f1(longest_common_subsequence(answer, reference), len(answer), len(reference)))


PLUGIN = RougeL()

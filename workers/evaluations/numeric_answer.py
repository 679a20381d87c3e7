"""Numeric answer: whether the answer ends with the reference's number, as grade-school mathematics is scored."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation

from workers.evaluations import MeanEvaluation, Question, RowValue, ScoredRow

_MARKED = re.compile(r"####\s*([-+]?[\d,]*\.?\d+)")
_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?|[-+]?\.\d+")


class NumericAnswer(MeanEvaluation):
    name = "numeric_answer"
    label = "Numeric answer"
    help = (
        "Share of answers whose number is the reference's: the one behind #### where there is one (Cobbe et al. 2021, "
        "GSM8K), else the last one. 1,000 and 1000.0 are equal. Rows whose reference has no number are left out."
    )
    higher_is_better = True
    needs = "answer"
    smallest_effect = 0.05
    bounds = (0.0, 1.0)

    def why_left_out(self, rows: Sequence[Question]) -> list[str]:
        """Rows whose reference has no number."""
        return ["" if final_number(row.reference) is not None else "The right answer has no number." for row in rows]

    def row_value(self, row: ScoredRow) -> RowValue:
        """1 for the right number, else 0; no weight for a reference without one."""
        expected = final_number(row.reference)
        if expected is None:
            return RowValue(0.0, 0.0)
        return RowValue(float(final_number(row.answer or "") == expected))


def final_number(text: str) -> Decimal | None:
    """The number behind the last ####, else the last number of a text; None when there is none."""
    marked = _MARKED.findall(text)
    found = marked or _NUMBER.findall(text)
    if not found:
        return None
    try:
        return Decimal(found[-1].replace(",", ""))
    except InvalidOperation:
        return None


PLUGIN = NumericAnswer()

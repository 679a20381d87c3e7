"""JSON validity: whether an answer can be read by a program at all."""

from __future__ import annotations

from collections.abc import Sequence

import orjson

from workers.evaluations import MeanEvaluation, Question, RowValue, ScoredRow


class JsonValid(MeanEvaluation):
    name = "json_valid"
    label = "Valid JSON"
    help = (
        "Share of generated answers that are one JSON object or list and nothing else (RFC 8259): no words around it, "
        "no code fence, no NaN. Rows whose reference is not JSON are left out."
    )
    higher_is_better = True
    needs = "answer"
    smallest_effect = 0.05
    bounds = (0.0, 1.0)

    def why_left_out(self, rows: Sequence[Question]) -> list[str]:
        """Rows whose reference is not JSON."""
        why = "The right answer is not one JSON object or list, so JSON is not asked for."
        return ["" if _is_json(row.reference) else why for row in rows]

    def row_value(self, row: ScoredRow) -> RowValue:
        """1 for JSON, else 0; no weight where the reference is none."""
        return RowValue(float(_is_json(row.answer or ""))) if _is_json(row.reference) else RowValue(0.0, 0.0)


def _is_json(text: str) -> bool:
    try:
        return isinstance(orjson.loads(text), (dict, list))
    except orjson.JSONDecodeError:
        return False


PLUGIN = JsonValid()

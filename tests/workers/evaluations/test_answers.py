from __future__ import annotations

from decimal import Decimal

import pytest

from workers.evaluations import RowValue, ScoredRow, get_evaluation
from workers.evaluations.numeric_answer import final_number
from workers.scoring import compare_rows, samples


def row(
    answer: str | None = None, reference: str = "", *, line: int = 1, loss: float = 0.0, tokens: int = 1
) -> ScoredRow:
    return ScoredRow(line, "q", reference, answer, loss, tokens, len(reference.encode()))


@pytest.mark.parametrize(
    ("answer", "reference", "f1", "exact"),
    [
        ("The cat sat.", "a cat sat", 1.0, 1.0),
        ("cat sat on the mat", "the cat sat", 2 * (2 / 4) * 1 / (2 / 4 + 1), 0.0),
        ("dog", "cat", 0.0, 0.0),
        ("", "", 1.0, 1.0),
        ("", "cat", 0.0, 0.0),
        ("cat cat cat", "cat", 0.5, 0.0),
    ],
)
def test_answers_are_compared_as_squad_does(answer, reference, f1, exact) -> None:
    assert get_evaluation("token_f1").row_value(row(answer, reference)).value == pytest.approx(f1)
    assert get_evaluation("exact_match").row_value(row(answer, reference)).value == exact


def test_the_loss_is_a_mean_over_tokens_and_not_over_rows() -> None:
    base = [row(line=1, loss=10.0, tokens=10), row(line=2, loss=1.0, tokens=90), row(line=3, loss=0.0, tokens=0)]
    better = [row(line=one.line, loss=one.loss_sum / 2, tokens=one.num_tokens) for one in base]
    (record,) = compare_rows(base, better, ["loss"])
    assert record.base_value == pytest.approx(0.11)
    assert record.value == pytest.approx(0.055)
    assert record.num_rows == 2


def test_a_metric_without_answers_gives_no_record() -> None:
    assert compare_rows([row()], [row()], ["token_f1"]) == []


def test_samples_stand_side_by_side_in_the_order_of_the_file() -> None:
    base = [row("b9", "r", line=9), row("b2", "r", line=2), row(None, "r", line=4)]
    adapter = [row("a9", "r", line=9), row("a2", "r", line=2), row("a4", "r", line=4)]
    assert [(one.line, one.base_answer, one.adapter_answer) for one in samples(base, adapter)] == [
        (2, "b2", "a2"),
        (9, "b9", "a9"),
    ]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She has 3 and then 12 left.\n#### 12", "12"),
        ("#### 1,234.50", "1234.5"),
        ("So it is -7.", "-7"),
        ("the answer is 5. Check: 2 + 3\n#### 6\n#### 5", "5"),
        ("no number", None),
        ("", None),
        ("#### none, but 4", "4"),
    ],
)
def test_the_final_number_of_a_text(text: str, number: str | None) -> None:
    assert final_number(text) == (None if number is None else Decimal(number))


def test_a_number_counts_by_its_value_and_a_reference_without_one_has_no_weight() -> None:
    numeric = get_evaluation("numeric_answer")
    assert numeric.row_value(row("It costs 1000", "#### 1,000.0")) == RowValue(1.0)
    assert numeric.row_value(row("It costs 1001", "#### 1,000")) == RowValue(0.0)
    assert numeric.row_value(row("", "#### 1,000")) == RowValue(0.0)
    assert numeric.row_value(row("7", "seven")) == RowValue(0.0, 0.0)


def test_rows_that_a_metric_cannot_weigh_are_no_part_of_n() -> None:
    base = [row("3", "#### 4", line=1), row("4", "#### 4", line=2), row("4", "four", line=3)]
    (record,) = compare_rows(base, [row("4", one.reference, line=one.line) for one in base], ["numeric_answer"])
    assert (record.num_rows, record.base_value, record.value) == (2, 0.5, 1.0)
    assert compare_rows(base[2:], base[2:], ["numeric_answer"]) == []


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ('{"a": [1, null]}', 1), ("[]", 1), (' {"a": 1}\n', 1), ("", 0), ("42", 0), ('"text"', 0), ("{a: 1}", 0),
        ('{"a": NaN}', 0), ('```json\n{"a": 1}\n```', 0), ('Here it is: {"a": 1}', 0), ('{"a": 1', 0),
    ],
)  # fmt: skip
def test_valid_json_is_an_object_or_a_list_and_nothing_else(answer: str, value: int) -> None:
    assert get_evaluation("json_valid").row_value(row(answer, '{"b": 2}')) == RowValue(value)
    assert get_evaluation("json_valid").row_value(row(answer, "plain words")).weight == 0

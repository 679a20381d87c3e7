"""Perplexities are the exponential of what the loss says, per token and per byte."""

from __future__ import annotations

import math

import pytest

from workers.evaluations import ScoredRow, get_evaluation
from workers.scoring import mean_value

ROWS = [ScoredRow(1, "q", "r", None, 6.0, 3, 12), ScoredRow(2, "q", "r", None, 2.0, 5, 28)]


def test_the_perplexity_is_over_all_tokens() -> None:
    assert mean_value(ROWS, get_evaluation("perplexity")) == pytest.approx(math.exp(8.0 / 8))


def test_the_perplexity_per_byte_is_over_all_bytes() -> None:
    assert mean_value(ROWS, get_evaluation("byte_perplexity")) == pytest.approx(math.exp(8.0 / 40))


def test_rows_without_tokens_have_no_part_and_a_broken_model_has_an_infinite_one() -> None:
    empty = ScoredRow(3, "q", "r", None, 0.0, 0, 0)
    for name in ("perplexity", "byte_perplexity"):
        assert mean_value([*ROWS, empty], get_evaluation(name)) == mean_value(ROWS, get_evaluation(name))
        assert mean_value([empty], get_evaluation(name)) is None
    assert mean_value([ScoredRow(1, "q", "r", None, 9e5, 1, 1)], get_evaluation("perplexity")) == math.inf

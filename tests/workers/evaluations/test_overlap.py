"""ROUGE, BLEU and chrF give what the usual implementations give, by themselves and as sums over rows."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.evaluations import Evaluation, ScoredRow, get_evaluation
from workers.evaluations._rouge import longest_common_subsequence
from workers.scoring import compare_rows, mean_value

PAIRS = [
    ("The cat sat on the mat.", "The cat is sitting on the mat."),
    ("the the the the", "the cat"),
    ("A quick brown fox, it jumps over 3 lazy dogs!", "The quick brown fox jumped over the lazy dogs."),
    ("no word in common", "entirely different text here"),
    ("", "something"),
    ("short", "short"),
    ("It costs $3.50, doesn't it? Yes (it does).", "It costs $3.50, does it not? Yes: it does."),
]


def rows(pairs: list[tuple[str, str]]) -> list[ScoredRow]:
    return [ScoredRow(at, "q", reference, answer, 0.0, 0, 0) for at, (answer, reference) in enumerate(pairs, start=1)]


def random_pairs(seed: int, num: int = 30) -> list[tuple[str, str]]:
    chosen = random.Random(seed)
    vocabulary = ["the", "a", "cat", "dog", "sat", "on", "mat", "ran", "fast,", "slowly.", "3", "red-blue", "it's"]

    def text() -> str:
        return " ".join(chosen.choices(vocabulary, k=chosen.randint(1, 14)))

    return [(text(), text()) for _ in range(num)]


# Mean F1 by the package rouge-score 0.1.2, without stemming, over the same pairs.
ROUGE = {
    "rouge_1": (0.504878, 0.267662, 0.283822),
    "rouge_2": (0.207707, 0.057689, 0.074216),
    "rouge_l": (0.504878, 0.239039, 0.217629),
}


@pytest.mark.parametrize("name", ROUGE)
def test_rouge_is_what_the_usual_package_gives(name: str) -> None:
    found = [mean_value(rows(pairs), get_evaluation(name)) for pairs in (PAIRS, random_pairs(1), random_pairs(2))]
    assert found == pytest.approx(ROUGE[name], abs=1e-6)


def test_rouge_counts_words_that_are_not_ascii() -> None:
    assert mean_value(rows([("Größe zählt", "Größe zählt nicht")]), get_evaluation("rouge_1")) == pytest.approx(0.8)
    assert mean_value(rows([("Größe", "Breite")]), get_evaluation("rouge_l")) == 0


@given(st.lists(st.sampled_from("abc"), max_size=12), st.lists(st.sampled_from("abc"), max_size=12))
def test_the_longest_common_subsequence_is_that_of_the_plain_recursion(first: list[str], second: list[str]) -> None:
    table = np.zeros((len(first) + 1, len(second) + 1), dtype=int)
    for i, one in enumerate(first):
        for j, other in enumerate(second):
            table[i + 1, j + 1] = table[i, j] + 1 if one == other else max(table[i, j + 1], table[i + 1, j])
    assert longest_common_subsequence(first, second) == table[-1, -1]


@pytest.mark.parametrize("pairs", [PAIRS, PAIRS[:1], PAIRS[3:4], PAIRS[5:6], random_pairs(3), random_pairs(4)])
def test_bleu_and_chrf_are_those_of_sacrebleu_over_the_corpus(pairs: list[tuple[str, str]]) -> None:
    import sacrebleu

    answers, references = [answer for answer, _ in pairs], [[reference for _, reference in pairs]]
    expected = {
        "bleu": sacrebleu.corpus_bleu(answers, references).score,
        "chrf": sacrebleu.corpus_chrf(answers, references).score,
    }
    for name, score in expected.items():
        assert mean_value(rows(pairs), get_evaluation(name)) == pytest.approx(score), name


@pytest.mark.parametrize("name", ["bleu", "chrf", "rouge_l"])
def test_a_better_model_is_found_better_with_an_interval_around_its_score(name: str) -> None:
    base, reference = random_pairs(5, 60), [pair[1] for pair in random_pairs(5, 60)]
    adapter = [
        (text if at % 3 else answer, text) for at, ((answer, _), text) in enumerate(zip(base, reference, strict=True))
    ]
    (found,) = compare_rows(rows(base), rows(adapter), [name])
    assert found.low < found.value < found.high
    assert found.difference_low > 0
    assert found.num_rows == 60


def test_a_model_beside_itself_differs_by_nothing() -> None:
    for found in compare_rows(rows(PAIRS), rows(PAIRS), ["bleu", "chrf", "rouge_1"]):
        assert (found.difference, found.difference_low, found.difference_high) == (0, 0, 0), found.evaluation


def test_answers_that_share_nothing_have_the_bound_that_their_number_allows() -> None:
    nothing = rows([("qqq www", "eee rrr ttt")] * 40)
    for found in compare_rows(nothing, nothing, ["bleu", "rouge_1"]):
        largest = get_evaluation(found.evaluation).bounds[1]
        assert found.value == 0
        assert found.high == pytest.approx(largest * (1 - 0.025 ** (1 / 40)))


def test_every_figure_stays_within_its_bounds_on_hostile_text() -> None:
    hostile = ["", " ", "\x00", "\u202e\u0301", "😀" * 50, "a" * 5000, "<pad>" * 20, "\n\n"]
    pairs = [(answer, reference) for answer in hostile for reference in hostile]
    for name in ("rouge_1", "rouge_2", "rouge_l", "bleu", "chrf", "token_f1", "exact_match"):
        evaluation: Evaluation = get_evaluation(name)
        assert evaluation.bounds is not None
        for row in rows(pairs):
            found = mean_value([row], evaluation)
            assert found is not None, name
            assert evaluation.bounds[0] <= found <= evaluation.bounds[1] + 1e-9, (name, row)

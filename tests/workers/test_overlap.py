"""Overlap: what was trained on is found however it was dressed up; what only shares a template is left alone."""

from __future__ import annotations

import random

import pytest

from workers.examples import Example, Message
from workers.overlap import find_overlap, row_key
from workers.results import OverlapRecord

WORDS = [f"{first}{second}" for first in ("bar", "fen", "lor", "mik", "sut", "wen") for second in ("a", "ed", "ing")]
SYSTEM = "You are a careful assistant of a large firm that sells garden tools. " * 8
TEMPLATE = "Please read the customer's letter with care, then answer in one sentence what should be done next: {}"


def row(line: int, question: str, answer: str, system: str = "") -> Example:
    messages = (Message("user", question), Message("assistant", answer))
    return Example(line, (Message("system", system), *messages) if system else messages)


def rows(num: int, seed: int = 3, *, template: str = "{}", system: str = "", length: int = 24) -> list[Example]:
    """Rows of random words; equal ones are as good as impossible."""
    random_ = random.Random(seed)

    def text(num_words: int) -> str:
        return " ".join(f"{random_.choice(WORDS)}{random_.randrange(40)}" for _ in range(num_words))

    return [row(line, template.format(text(length)), text(8), system) for line in range(1, num + 1)]


def overlap(scored: list[Example], training: list[Example]) -> OverlapRecord:
    return find_overlap(scored, lambda: iter(training), num_training=len(training))


def test_rows_that_are_trained_on_are_found_with_the_lines_of_both() -> None:
    training, scored = rows(300), rows(40, seed=9)
    leaked = row(1001, training[7].messages[0].content, training[7].messages[1].content)
    found = overlap([*scored, leaked], training)
    assert (found.num_held_out_rows, found.num_exact, found.num_near) == (41, 1, 0)
    assert found.pairs == ((1001, 8, 1.0),)


@pytest.mark.parametrize(
    "dress",
    [
        lambda text: text.upper().replace(" ", "  "),
        lambda text: f"\n{text}  ",
    ],
)
def test_spaces_and_case_are_no_difference(dress: object) -> None:
    training = rows(50)
    question, answer = (one.content for one in training[4].messages)
    found = overlap([row(99, dress(question), answer)], training)  # type: ignore[operator]
    assert (found.num_exact, found.num_near) == (1, 0)


@pytest.mark.parametrize(
    "dress",
    [
        lambda text: text.replace(" ", ", ", 3) + "!",
        lambda text: f"Hello there. {text} Thank you.",
        lambda text: text.replace(text.split()[2], "other", 1),
    ],
)
def test_a_row_that_was_reworded_a_little_is_nearly_the_same(dress: object) -> None:
    training = rows(300)
    question, answer = (one.content for one in training[4].messages)
    found = overlap([*rows(40, seed=9), row(99, dress(question), answer)], training)  # type: ignore[operator]
    assert (found.num_exact, found.num_near) == (0, 1)
    assert found.pairs[0][:2] == (99, 5)
    assert 0.8 <= found.pairs[0][2] <= 1


def test_a_question_that_was_trained_on_counts_whatever_its_answer() -> None:
    training = rows(300)
    found = overlap([row(99, training[4].messages[0].content, "Something else entirely, in other words.")], training)
    assert (found.num_exact, found.num_near) == (0, 1)


def test_a_shared_system_prompt_or_template_is_no_overlap() -> None:
    training = rows(300, template=TEMPLATE, system=SYSTEM, length=5)
    scored = rows(100, seed=9, template=TEMPLATE, system=SYSTEM, length=5)
    found = overlap(scored, training)
    assert (found.num_exact, found.num_near) == (0, 0)
    leaked = row(99, training[4].messages[-2].content + " now", training[4].messages[-1].content)
    assert overlap([*scored, leaked], training).pairs[0][:2] == (99, 5)


def test_the_same_question_to_every_row_is_a_template_and_no_leak() -> None:
    random_ = random.Random(5)
    training = [row(line, "Tell me a joke.", f"One about {random_.random()} and more.") for line in range(1, 200)]
    found = overlap([row(900, "Tell me a joke.", "A new one, never told before.")], training)
    assert (found.num_exact, found.num_near) == (0, 0)


def test_sums_that_differ_by_an_operator_or_a_number_are_different_rows() -> None:
    training = [row(line, f"{line} + {line + 7} =", str(2 * line + 7)) for line in range(1, 100)]
    found = overlap([row(900, "5 - 12 =", "-7"), row(901, "5 + 13 =", "18")], training)
    assert (found.num_exact, found.num_near) == (0, 0)


def test_short_rows_are_compared_word_for_word() -> None:
    training = [row(1, "Capital of Peru?", "Lima"), row(2, "Hi", "Hello"), row(3, "", "Nothing")]
    found = overlap([row(11, "hi", "hello"), row(12, "Hi", "Bye"), row(13, "", "")], training)
    assert (found.num_exact, found.num_near, found.pairs) == (1, 0, ((11, 2, 1.0),))


def test_nothing_to_score_overlaps_with_nothing() -> None:
    assert overlap([], rows(5)) == OverlapRecord(num_held_out_rows=0, num_exact=0, num_near=0)


def test_keys_of_rows_tell_system_prompts_apart_and_nothing_else() -> None:
    key = row_key(row(1, "What?", "That."))
    assert key == row_key(row(2, " what? ", "THAT."))
    assert key != row_key(row(1, "What?", "That.", "Be brief."))

"""Scores against transformers' own loss, one row at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.tiny import make_tiny_base, tiny_rows
from workers.evaluations import get_evaluation
from workers.examples import Example, Message
from workers.rendering import Renderer
from workers.scoring import compare_rows, held_out, mean_value, row_losses, samples, score_rows


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def model(base: Path):
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def renderer(base: Path) -> Renderer:
    return Renderer(base, max_length=128, loss_on="assistant")


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    return [
        Example(line, (Message("user", row["instruction"]), Message("assistant", row["output"])))
        for line, row in enumerate(tiny_rows(9), start=1)
    ]


def transformers_loss(model, ids: list[int], trained: list[bool]) -> float:
    """Mean loss over the trained tokens, by the library."""
    labels = [token if is_trained else -100 for token, is_trained in zip(ids, trained, strict=True)]
    with torch.no_grad():
        return float(model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss)


def test_the_loss_of_each_row_is_the_librarys_whatever_stands_beside_it(model, renderer, examples) -> None:
    rows = [(row.ids, row.trained) for row in map(renderer.render, examples)]
    with torch.inference_mode():
        together = row_losses(model, rows)
    for (ids, trained), (loss, count) in zip(rows, together, strict=True):
        assert count == sum(trained[1:])
        assert loss / count == pytest.approx(transformers_loss(model, ids, trained), rel=1e-5)


def test_how_rows_are_batched_changes_no_score(model, renderer, examples) -> None:
    asked = {"generate_lines": [2, 5], "max_new_tokens": 6}
    one_by_one = score_rows(model, renderer, examples, batch_tokens=1, **asked)
    all_at_once = score_rows(model, renderer, examples, batch_tokens=100_000, **asked)
    assert [row.line for row in one_by_one] == [example.line for example in examples]
    assert [row.answer for row in one_by_one] == [row.answer for row in all_at_once]
    for left, right in zip(one_by_one, all_at_once, strict=True):
        assert left.loss_sum == pytest.approx(right.loss_sum, rel=1e-5)
    assert {row.line for row in one_by_one if row.answer is not None} == {2, 5}


def test_scoring_leaves_the_model_in_the_mode_it_was_in(model, renderer, examples) -> None:
    model.train()
    score_rows(model, renderer, examples[:1], generate_lines=[], max_new_tokens=1)
    assert model.training
    model.eval()


def test_only_rows_that_both_models_were_scored_on_are_compared(model, renderer, examples) -> None:
    asked = {"generate_lines": [1, 2], "max_new_tokens": 2}
    base_rows = score_rows(model, renderer, examples[:3], **asked)
    adapter_rows = score_rows(model, renderer, examples[1:], **asked)
    assert [record.line for record in held_out(base_rows, adapter_rows)] == [2, 3]
    assert [sample.line for sample in samples(base_rows, adapter_rows)] == [2]


def test_a_turn_of_weight_0_is_not_scored_and_other_weights_change_no_score(model, renderer) -> None:
    def example(first: Message, second: Message) -> Example:
        return Example(1, (Message("user", "What?"), first, Message("user", "And?"), second))

    def score(*answers: Message) -> tuple[float, int]:
        (row,) = score_rows(model, renderer, [example(*answers)], generate_lines=[], max_new_tokens=1)
        return row.loss_sum, row.num_tokens

    plain = score(Message("assistant", "meow"), Message("assistant", "woof"))
    weighted = score(Message("assistant", "meow", True, 0.25), Message("assistant", "woof", True, 8.0))
    silenced = score(Message("assistant", "meow", False), Message("assistant", "woof"))
    assert weighted == plain
    assert silenced[1] == plain[1] - renderer.count("meow<|im_end|>")
    assert silenced[0] < plain[0]


def test_one_models_value_is_the_one_in_its_comparison(model, renderer, examples) -> None:
    rows = score_rows(model, renderer, examples, generate_lines=[1, 4], max_new_tokens=6)
    for record in compare_rows(rows, rows, ["loss", "token_f1"]):
        assert mean_value(rows, get_evaluation(record.evaluation)) == pytest.approx(record.value)
    silent = score_rows(model, renderer, examples, generate_lines=[], max_new_tokens=1)
    assert mean_value(silent, get_evaluation("token_f1")) is None

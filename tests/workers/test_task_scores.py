from __future__ import annotations

import math
from typing import Any

import pytest

from workers.lm_eval_layout import HarnessRun, HarnessTask
from workers.task_scores import score_key, score_label, score_tasks


def sample(doc_id: int, name: str = "none", **values: Any) -> dict[str, Any]:
    return {
        "doc_id": doc_id, "target": f"target {doc_id}", "filter": name, "resps": [[f"answer {doc_id}"]],
        "arguments": {"gen_args_0": {"arg_0": f"prompt {doc_id}", "arg_1": {}}}, "doc_hash": f"d{doc_id}",
        "prompt_hash": f"p{doc_id}", "target_hash": f"t{doc_id}", **values,
    }  # fmt: skip


def task(name: str, right: list[int], **changes: Any) -> HarnessTask:
    values: dict[str, Any] = {
        "name": name, "values": {"acc,none": sum(right) / len(right)}, "stderr": {"acc,none": 0.05},
        "higher_is_better": {"acc": True}, "num_rows": len(right),
        "samples": [sample(at, acc=float(one)) for at, one in reversed(list(enumerate(right)))],
    }  # fmt: skip
    return HarnessTask(**(values | changes))


def run_of(*tasks: HarnessTask) -> HarnessRun:
    return HarnessRun("model", {one.name: one for one in tasks}, {})


BASE = [1] * 20 + [0] * 60
ADAPTER = [1] * 60 + [0] * 20


def test_means_over_rows_are_compared_row_by_row() -> None:
    found = score_tasks(run_of(task("sizes", BASE)), run_of(task("sizes", ADAPTER)), settings={})
    (score,) = found.scores
    assert (score.evaluation, score.label) == ("lm_eval-sizes-acc", "sizes: acc")
    assert (score.base_value, score.value, score.difference, score.num_rows) == (0.25, 0.75, 0.5, 80)
    assert score.difference_low > 0
    assert score.p_value is not None
    assert score.p_value < 0.001
    assert "paired" in score.interval_method
    assert found.counts.base["lm_eval-sizes-acc"][0] == (1.0, 1.0)
    assert found.rows[30].figures == {"lm_eval-sizes-acc": (0.0, 1.0)}
    assert (found.rows[0].line, found.rows[0].prompt, found.rows[0].base_answer) == (1, "prompt 0", "answer 0")


def test_a_base_alone_has_no_adapter_to_say_anything_of() -> None:
    found = score_tasks(run_of(task("sizes", BASE)), None, settings={})
    assert (found.scores[0].value, found.scores[0].difference) == (0.25, 0.0)
    assert found.rows[0].adapter_answer is None
    assert found.rows[0].figures == {"lm_eval-sizes-acc": (1.0, None)}


def test_each_filter_of_an_answer_has_a_figure_of_its_own_and_a_row_stands_once() -> None:
    samples = [sample(at, name, exact_match=float(name == "loose")) for at in range(4) for name in ("strict", "loose")]
    values = {"exact_match,strict": 0.0, "exact_match,loose": 1.0}
    both = task("sums", [0] * 4, values=values, samples=samples, higher_is_better={"exact_match": True})
    found = score_tasks(run_of(both), run_of(both), settings={})
    assert {one.label: one.value for one in found.scores} == {
        "sums: exact_match (strict)": 0.0, "sums: exact_match (loose)": 1.0
    }  # fmt: skip
    assert found.num_rows == 4


def test_a_figure_that_is_no_mean_has_the_harness_s_own_error_and_one_without_is_left_out_with_a_word() -> None:
    def corpus(value: float) -> HarnessTask:
        samples = [sample(at, word_perplexity=[-30.0, 10]) for at in range(5)]
        values = {"word_perplexity,none": value, "bleu,none": 0.3}
        return task("wiki", [0] * 5, values=values, samples=samples, stderr={"word_perplexity,none": 1.0},
                    higher_is_better={"word_perplexity": False, "bleu": True})  # fmt: skip

    found = score_tasks(run_of(corpus(20.0)), run_of(corpus(15.0)), settings={})
    (score,) = found.scores
    assert not score.higher_is_better
    assert (score.base_value, score.value, score.difference) == (20.0, 15.0, -5.0)
    assert score.difference_high - score.difference == pytest.approx(1.959964 * math.sqrt(2))
    assert score.p_value == pytest.approx(math.erfc(5 / math.sqrt(2) / math.sqrt(2)))
    assert "not paired" in score.interval_method
    assert found.warnings == ("wiki: bleu has no standard error, so it is not among the scores.",)


def test_a_group_is_pooled_where_its_figure_is_the_mean_over_its_rows() -> None:
    def group(value: float, *, right: list[int]) -> HarnessRun:
        members = task("a", right), task("b", right[:10])
        whole = task("animals", [0], values={"acc,none": value}, samples=[], subtasks=("a", "b"))
        return run_of(whole, *members)

    base, adapter = group(30 / 90, right=BASE), group(70 / 90, right=ADAPTER)
    found = score_tasks(base, adapter, settings={})
    assert [one.label for one in found.scores] == ["animals: acc", "a: acc", "b: acc"]
    assert (found.scores[0].num_rows, found.scores[0].value) == (90, pytest.approx(70 / 90))
    unweighted = score_tasks(group((0.25 + 1.0) / 2, right=BASE), adapter, settings={})
    assert [one.label for one in unweighted.scores] == ["a: acc", "b: acc"]
    assert "animals: acc is no mean" in unweighted.warnings[0]


def test_other_rows_prompts_or_settings_have_other_digests() -> None:
    def digests(*, settings: dict[str, Any] | None = None, **changes: Any) -> tuple[str, str]:
        samples = [sample(at, acc=1.0) | changes for at in range(3)]
        found = score_tasks(run_of(task("sizes", [1] * 3, samples=samples)), None, settings=settings or {})
        return found.test_set_sha256, found.settings_sha256

    rows, settings = digests()
    assert digests() == (rows, settings)
    assert digests(doc_hash="other")[0] != rows
    assert digests(prompt_hash="other") == (rows, digests(prompt_hash="other")[1])
    assert digests(prompt_hash="other")[1] != settings
    assert digests(settings={"num_fewshot": 5})[1] != settings


def test_keys_and_labels_of_long_names_fit_and_differ() -> None:
    first, second = f"{'bbh_' * 30}one", f"{'bbh_' * 30}two"
    assert score_key(first, "acc,none") != score_key(second, "acc,none")
    assert len(score_key(first, "acc,none")) == 80
    assert len(score_label(first, "exact_match,get-answer")) == 80

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from workers.evaluations import ScoredRow, choose_evaluations
from workers.lm_eval_layout import LayoutError, read_run, write_run
from workers.recipe import MetricChoice
from workers.scoring import compare_rows

CHOICE = MetricChoice(name="multiple_choice", settings={"options_from": "list", "options": ["yes", "no"]})


def test_a_run_is_read_back_with_the_scores_and_the_rows_that_were_written(tmp_path: Path) -> None:
    metrics = ("loss", "exact_match", "bleu", CHOICE)
    evaluations = choose_evaluations(metrics)
    key = evaluations[-1].key
    rows = [
        ScoredRow(n, f"q{n}", "yes", ("yes", "no")[n % 2] if n < 5 else None, 2.0 * n, 3, 9,
                  options={key: {"yes": -1.0, "no": -0.5 * n}})
        for n in range(1, 8)
    ]  # fmt: skip
    scores = compare_rows(rows, rows, metrics)
    path = write_run(
        tmp_path / "lm_eval", task="sounds/held out", scores=scores, rows=rows, evaluations=evaluations,
        model_name="org/adapter", config={"model": "peft-studio"}, max_new_tokens=8, chat_template="t",
        when=datetime(2026, 11, 25, 8, 30, tzinfo=UTC),
    )  # fmt: skip
    assert ":" not in path.name
    found = read_run(tmp_path / "lm_eval")
    (task,) = found.tasks.values()
    assert task.values == {f"{score.evaluation},none": pytest.approx(score.value) for score in scores}
    assert set(task.stderr) == set(task.values)
    assert task.num_rows == len(task.samples) == 7
    assert task.higher_is_better["loss"] is False
    assert [one.get("exact_match") for one in task.samples] == [0.0, 1.0, 0.0, 1.0, None, None, None]
    assert task.samples[0]["resps"] == [["no"]]
    assert list(task.samples[6]["arguments"]["gen_args_1"].values()) == ["q7", "no"]


def test_a_file_that_holds_no_results_is_refused_with_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match="holds no results"):
        read_run(tmp_path)
    (tmp_path / "results_x.json").write_text(json.dumps({"results": 3}))
    with pytest.raises(LayoutError, match="cannot be read"):
        read_run(tmp_path / "results_x.json")

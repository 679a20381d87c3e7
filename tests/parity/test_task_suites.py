"""A suite of standard tasks, GSM8K-like and BBH-like, by the trainer's own command line with the harness installed."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.parity.environments import environment
from tests.parity.test_against_the_harness import PINS, REPOSITORY, TASKS, by_command_line, offline, sizes, sums
from tests.tiny import make_tiny_base, write_rows
from workers import training
from workers.events import PhaseEvent, parse_event
from workers.lm_eval_layout import read_run
from workers.recipe import Recipe
from workers.results import Result
from workers.training import Folders

CODED = """
include: sums.yaml
task: coded
process_docs: !function functions.first_rows
"""
SLY = """
include: sums.yaml
task: sly
doc_to_text: "{{question.__class__.__mro__}}"
"""


def recipe_of(**changes: Any) -> dict[str, Any]:
    return {
        "name": "Tasks",
        "base_model": {"name": "tiny"},
        "dataset": {"name": "mixed", "format": "prompt_completion"},
        "training": {"epochs": 12, "batch_size": 8, "learning_rate": 0.005},
        "evaluation": {"metrics": ["loss"], "num_generated": 2, "general": False},
    } | changes


def make_tasks(folder: Path) -> Path:
    folder.mkdir()
    for name, questions in (("sums", sums(0, 5)), ("sizes", sizes(10, 50))):
        write_rows(folder / f"{name}.jsonl", questions)
        # A name without a folder: the task folder is where data files are sought.
        (folder / f"{name}.yaml").write_text(TASKS[name].format(data=f"{name}.jsonl"))
    (folder / "more.yaml").write_text("include: sizes.yaml\ntask: more\n")
    (folder / "animals.yaml").write_text(
        "group: animals\ntask: [sizes, more]\naggregate_metric_list:\n  - metric: acc\n    weight_by_size: true\n"
    )
    (folder / "coded.yaml").write_text(CODED)
    (folder / "sly.yaml").write_text(SLY)
    (folder / "functions.py").write_text(
        "from pathlib import Path\nPath(__file__).with_name('it_ran').touch()\n\n\n"
        "def first_rows(rows):\n    return rows.select(range(3))\n"
    )
    return folder


def run_trainer(python: Path, folder: Path, *options: object) -> tuple[int, list[Any], str]:
    """Exit status, events and standard error of a trainer that scores tasks; it may reach no network."""
    folder.mkdir(exist_ok=True)
    (folder / "recipe.json").write_text(json.dumps(recipe_of(dataset={"name": "tasks", "format": "lm_eval"})))
    ours, theirs = os.pipe()
    with subprocess.Popen(
        [python, "-m", "workers", folder / "recipe.json", "--evaluate", "--out", folder / "out", "--events",
         str(theirs), *map(str, options)],
        env=offline(folder), cwd=REPOSITORY, pass_fds=[theirs], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True,
    ) as trainer:  # fmt: skip
        os.close(theirs)
        with os.fdopen(ours, "rb") as lines:
            events = [parse_event(line) for line in lines]
        assert trainer.stderr is not None
        said = trainer.stderr.read()
    return trainer.returncode, events, said


@pytest.mark.slow
def test_a_suite_of_tasks_scores_base_and_adapter_row_by_row_as_the_harness_does(tmp_path: Path) -> None:
    python = environment("lm_eval", PINS)
    base, tasks = make_tiny_base(tmp_path / "base", "llama"), make_tasks(tmp_path / "tasks")
    rows = [{"prompt": one["question"], "completion": one["answer"]} for one in [*sums(0, 6), *sizes(0, 48)]]
    folders = Folders(base, write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "trained")
    recipe = Recipe.from_dict(recipe_of())
    adapter = training.train(recipe, folders, report=lambda _: None, should_stop=lambda: None)
    assert adapter is not None

    where = ("--base-model-folder", base, "--tasks-folder", tasks)
    status, events, said = run_trainer(
        python, tmp_path / "job", *where, "--adapter-folder", adapter, "--task=sums", "--task=animals"
    )
    assert status == 0, said[-4000:]
    phases = [one for one in events if isinstance(one, PhaseEvent)]
    assert any(one.phase == "evaluating" and one.total == 280 and one.done for one in phases), "progress is told"
    result = Result.from_folder(Path(events[-1].folder))
    layout = Path(events[-1].folder) / "eval" / "lm_eval"

    # The same figures as the harness's own command line finds, for the base and for the adapter.
    for task in ("sums", "sizes"):
        text = (tasks / f"{task}.yaml").read_text()
        (tasks / f"{task}.yaml").write_text(text.replace(f"{task}.jsonl", str(tasks / f"{task}.jsonl")))
    for side, folder in (("base", None), ("adapter", adapter)):
        theirs = by_command_line(python, base, folder, tasks, tmp_path / f"{side}-harness")
        by_label = {one.label: one.base_value if side == "base" else one.value for one in result.scores}
        assert by_label["sums: exact_match (marked)"] == pytest.approx(
            theirs.tasks["sums"].values["exact_match,marked"]
        )
        for metric in ("acc", "acc_norm"):
            assert by_label[f"sizes: {metric}"] == pytest.approx(theirs.tasks["sizes"].values[f"{metric},none"])
        kept = read_run(layout / side)
        assert kept.tasks["sizes"].values == pytest.approx(theirs.tasks["sizes"].values)

    scores = {one.label: one for one in result.scores}
    assert set(scores) == {
        "animals: acc", "sums: exact_match (marked)", "sizes: acc", "sizes: acc_norm", "more: acc", "more: acc_norm"
    }  # fmt: skip
    assert scores["animals: acc"].num_rows == 80
    assert scores["sizes: acc"].difference == pytest.approx(
        scores["sizes: acc"].value - scores["sizes: acc"].base_value
    )
    assert any(0 < one.value < 1 for one in result.scores), "figures that are all 0 or 1 would hide a mistake"
    assert all("paired" in one.interval_method and one.p_value is not None for one in result.scores)
    assert len(result.rows) == 120
    assert len(result.counts.lines) == 120
    first = next(one for one in result.rows if one.task == "sums")
    assert first.adapter_answer is not None
    assert "What is 0 and 1?" in first.prompt
    chosen = next(one for one in result.rows if one.task == "sizes")
    assert chosen.adapter_answer in ("(A) cat", "(B) cat", "(C) cat", "(A) elephant", "(B) elephant", "(C) elephant",
                                     "(A) hippopotamus", "(B) hippopotamus", "(C) hippopotamus")  # fmt: skip


@pytest.mark.slow
def test_tasks_that_run_code_are_refused_before_any_of_it_runs_unless_it_is_allowed(tmp_path: Path) -> None:
    python = environment("lm_eval", PINS)
    base, tasks = make_tiny_base(tmp_path / "base", "llama"), make_tasks(tmp_path / "tasks")
    where = ("--base-model-folder", base, "--tasks-folder", tasks, "--max-rows", "4")

    status, events, _ = run_trainer(python, tmp_path / "refused", *where, "--task=coded")
    assert (status, events[-1].code) == (1, "harness")
    assert "process_docs calls the function functions.first_rows" in events[-1].message
    assert not (tasks / "it_ran").exists()

    status, events, _ = run_trainer(python, tmp_path / "sly", *where, "--task=sly")
    assert (status, events[-1].code) == (1, "harness")
    assert "unsafe" in events[-1].message, "a template reaches nothing behind its values"

    status, events, _ = run_trainer(python, tmp_path / "changed", *where, "--task=sums", "--tasks-sha256", "0" * 64)
    assert (status, "has changed" in events[-1].message) == (1, True)

    status, events, said = run_trainer(python, tmp_path / "ran", *where, "--task=coded", "--tasks-may-run-code")
    assert status == 0, said[-4000:]
    assert (tasks / "it_ran").exists()
    assert len(Result.from_folder(Path(events[-1].folder)).rows) == 3

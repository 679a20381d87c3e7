from __future__ import annotations

import json
from pathlib import Path

import pytest

from workers.task_files import HarnessError, choose_tasks, definitions_sha256, read_tasks

GSM = """
# Grade-school sums, as GSM8K has them
task: sums
dataset_path: json
dataset_kwargs:
  data_files:
    test: data/sums.jsonl
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
metric_list:
  - metric: exact_match
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "sums.jsonl").write_text("".join(json.dumps({"question": n}) + "\n" for n in range(7)))
    (folder / "data" / "list.json").write_text(json.dumps([{"q": 1}, {"q": 2}]))
    (folder / "data" / "table.csv").write_text('q,a\n"one\ntwo",3\nfour,5\n')
    (folder / "sums.yaml").write_text(GSM)
    (folder / "more.yaml").write_text("include: sums.yaml\ntask: more\ntask_alias: More sums\n")
    (folder / "both.yaml").write_text("group: arithmetic\ntask:\n  - sums\n  - task: more\n    num_fewshot: 2\n")
    return folder


def test_it_lists_what_a_folder_holds(folder: Path) -> None:
    found = read_tasks(folder)
    assert set(found) == {"sums", "more", "arithmetic"}
    assert (found["sums"].num_rows, found["sums"].description) == (7, "Grade-school sums, as GSM8K has them")
    assert (found["more"].num_rows, found["more"].description) == (7, "More sums"), "what it includes counts"
    assert found["arithmetic"].tasks == ("sums", "more")


@pytest.mark.parametrize(("files", "rows"), [("data/list.json", 2), ("data/table.csv", 2), ("data/none.jsonl", None)])
def test_rows_are_counted_where_the_file_says_them(folder: Path, files: str, rows: int | None) -> None:
    text = GSM.replace("data/sums.jsonl", files).replace("task: sums", "task: other")
    (folder / "other.yaml").write_text(text)
    assert read_tasks(folder)["other"].num_rows == rows


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("process_docs: !function utils.process", "process_docs calls the function utils.process"),
        ("filter_list:\n  - filter:\n      - function: !function utils.Mine", "filter_list calls the function"),
        ("class: !function task.Mine", "it is a class of its own"),
        ("unsafe_code: true", "it runs what the model writes"),
        ("dataset_path: pandas", "its dataset_path pandas unpickles files"),
    ],
)
def test_a_task_that_runs_code_is_refused_unless_that_is_allowed(folder: Path, line: str, said: str) -> None:
    (folder / "coded.yaml").write_text(f"include: sums.yaml\ntask: coded\n{line}\n")
    (folder / "utils.py").write_text("raise SystemExit('it ran')\n")
    (folder / "group.yaml").write_text("group: mixed\ntask: [sums, coded]\n")
    for name in ("coded", "mixed"):
        with pytest.raises(HarnessError, match="The task coded runs code: ") as caught:
            choose_tasks(folder, [name], may_run_code=False)
        assert said in str(caught.value)
        assert "STUDIO_TASKS_MAY_RUN_CODE" in caught.value.next_step
        assert choose_tasks(folder, [name], may_run_code=True)


def test_a_task_that_includes_what_lies_outside_of_the_folder_is_not_offered(folder: Path) -> None:
    (folder.parent / "outside.yaml").write_text(GSM)
    (folder / "sly.yaml").write_text("include: ../outside.yaml\ntask: sly\n")
    (folder / "round.yaml").write_text("include: round.yaml\ntask: round\n")
    (folder / "broken.yaml").write_text("task: [\n")
    (folder / "python.yaml").write_text("task: evil\nx: !!python/object/apply:os.system ['true']\n")
    assert set(read_tasks(folder)) == {"sums", "more", "arithmetic"}


def test_what_is_not_there_is_told_with_what_is(folder: Path) -> None:
    with pytest.raises(HarnessError, match="defines the task sum") as caught:
        choose_tasks(folder, ["sum"], may_run_code=False)
    assert "sums" in caught.value.next_step
    with pytest.raises(HarnessError, match="no folder of tasks"):
        read_tasks(folder / "nowhere")


def test_the_digest_changes_with_every_file_that_a_task_is_made_of(folder: Path) -> None:
    before = {name: definitions_sha256(folder, [name]) for name in ("sums", "more", "arithmetic")}
    assert len(set(before.values())) == 3
    (folder / "sums.yaml").write_text(f"{GSM}num_fewshot: 3\n")
    assert all(definitions_sha256(folder, [name]) != digest for name, digest in before.items())
    (folder / "sums.yaml").write_text(GSM)
    (folder / "unrelated.yaml").write_text("task: unrelated\n")
    assert all(definitions_sha256(folder, [name]) == digest for name, digest in before.items())

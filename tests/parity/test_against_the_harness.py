"""An exported adapter scored by the evaluation harness's own command line and by our code: the same figures."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.parity.environments import environment
from tests.tiny import make_tiny_base, write_rows
from workers import adapters, training
from workers.evaluations import ScoredRow, choose_evaluations
from workers.examples import Example, Message
from workers.lm_eval_layout import HarnessRun, read_run
from workers.recipe import MetricChoice, Recipe
from workers.rendering import Renderer
from workers.scoring import mean_value, score_rows
from workers.training import Folders

REPOSITORY = Path(__file__).parents[2]
PINS = ["lm-eval==0.4.13", "accelerate==1.15.0", "datasets==5.2.0", "peft==0.21.2", "transformers==5.23.0",
        "torch==2.13.0", "pydantic==2.14.3",
        # What a trainer imports besides.
        "bitsandbytes==0.50.2", "google-re2==1.1.20251105", "jsonschema==4.26.0", "nvidia-ml-py==13.615.71",
        "orjson==3.13.0", "psutil==7.2.2", "sacrebleu==2.6.0", "scipy==1.17.1"]  # fmt: skip
NUMBER = r"#### (\d+)"
MAX_NEW_TOKENS = 24
SUMS = MetricChoice(name="regex", settings={"pattern": NUMBER, "mode": "same_group"})
ACC = MetricChoice(name="multiple_choice", settings={"pattern": r"\([A-C]\) \w+"})
ACC_NORM = MetricChoice(name="multiple_choice", settings={"pattern": r"\([A-C]\) \w+", "per_character": True})

TASKS = {
    "sums": """
task: sums
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer.split('#### ')[-1]}}}}"
generation_kwargs:
  until: ["<|im_end|>"]
  do_sample: false
  max_gen_toks: 24
filter_list:
  - name: marked
    filter:
      - function: regex
        regex_pattern: '#### (\\d+)'
      - function: take_first
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
""",
    "sizes": """
task: sizes
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{options}}}}"
doc_to_target: "{{{{options.index(answer)}}}}"
metric_list:
  - metric: acc
  - metric: acc_norm
metadata:
  version: 1.0
""",
}


def sums(first: int, last: int) -> list[dict[str, object]]:
    return [
        {"question": f"What is {a} and {b}?", "answer": f"{a} and {b} make {a + b}.\n#### {a + b}"}
        for a in range(first, last)
        for b in range(1, 9)
    ]


def sizes(first: int, last: int) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for n in range(first, last):
        words = ["cat", "elephant", "hippopotamus"]
        order = [words[(n + k) % 3] for k in range(3)]
        options = [f"({letter}) {word}" for letter, word in zip("ABC", order, strict=True)]
        answer = options[(n // 3) % 3]
        rows.append({"question": f"{n}: which is meant? {' '.join(options)}", "answer": answer, "options": options})
    return rows


@pytest.mark.slow
def test_the_harness_and_our_code_give_the_same_figures(tmp_path: Path) -> None:
    python = environment("lm_eval", PINS)
    base = make_tiny_base(tmp_path / "base", "llama")
    rows = [{"prompt": one["question"], "completion": one["answer"]} for one in [*sums(0, 6), *sizes(0, 48)]]
    recipe = Recipe.from_dict(
        {
            "name": "Harness",
            "base_model": {"name": "tiny"},
            "dataset": {"name": "mixed", "format": "prompt_completion"},
            "training": {"epochs": 12, "batch_size": 8, "learning_rate": 0.005},
            "evaluation": {"metrics": ["loss"], "num_generated": 2},
        }
    )
    folders = Folders(base, write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "out")
    adapter = training.train(recipe, folders, report=lambda _: None, should_stop=lambda: None)
    assert adapter is not None
    asked = {"sums": (sums(0, 5), [SUMS]), "sizes": (sizes(10, 50), [ACC, ACC_NORM])}
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    for name, (questions, _) in asked.items():
        data = write_rows(tasks / f"{name}.jsonl", questions)
        (tasks / f"{name}.yaml").write_text(TASKS[name].format(data=data))

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    printed = []
    for side, folder in (("base", None), ("adapter", adapter)):
        theirs = by_command_line(python, base, folder, tasks, tmp_path / f"{side}-harness")
        by_ours = by_our_module(python, base, folder, tasks, tmp_path / f"{side}-module")
        if folder is not None:
            model = adapters.load(model, folder)
        for name, (questions, metrics) in asked.items():
            scored = our_rows(model, base, questions, metrics)
            ours = [mean_value(scored, one) for one in choose_evaluations(metrics)]
            found = list(theirs.tasks[name].values.values())
            printed.append(f"{side} {name}: ours {ours}, harness {theirs.tasks[name].values}")
            assert ours == pytest.approx(found), printed[-1]
            assert by_ours.tasks[name].values == theirs.tasks[name].values
            assert theirs.tasks[name].num_rows == len(questions)
            for row, sample in zip(scored, theirs.tasks[name].samples, strict=True):
                # The figures may agree by chance; what they are made of may not.
                if row.answer is not None:
                    assert row.answer == sample["resps"][0][0]
                for options in row.options.values():
                    likelihoods = [float(one) for one, _ in sample["filtered_resps"]]
                    assert list(options.values()) == pytest.approx(likelihoods, rel=1e-4)
    print("\n".join(printed))
    model_figures = [float(part) for line in printed if line.startswith("adapter") for part in _numbers(line)]
    assert any(0 < one < 1 for one in model_figures), "figures that are all 0 or 1 would hide a difference"


def _numbers(line: str) -> list[str]:
    return line.split("ours [")[1].split("]")[0].split(", ")


def our_rows(
    model: torch.nn.Module, base: Path, questions: list[dict[str, object]], metrics: list[MetricChoice]
) -> list[ScoredRow]:
    examples = [
        Example(at, (Message("user", str(one["question"])), Message("assistant", str(one["answer"]))))
        for at, one in enumerate(questions, start=1)
    ]
    evaluations = choose_evaluations(metrics)
    writes = any(one.needs == "answer" for one in evaluations)
    return score_rows(
        model,
        Renderer(base, max_length=256, loss_on="assistant"),
        examples,
        generate_lines=[one.line for one in examples] if writes else (),
        max_new_tokens=MAX_NEW_TOKENS,
        evaluations=evaluations,
    )


def offline(home: Path) -> dict[str, str]:
    return {"PATH": os.environ["PATH"], "HOME": str(home), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1",
            "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}  # fmt: skip


def by_command_line(python: Path, base: Path, adapter: Path | None, tasks: Path, out: Path) -> HarnessRun:
    out.mkdir()
    peft = f",peft={adapter}" if adapter is not None else ""
    done = subprocess.run(
        [python.with_name("lm_eval"), "run", "--model", "hf", "--model_args", f"pretrained={base}{peft},dtype=float32",
         "--tasks", "sums,sizes", "--include_path", tasks, "--apply_chat_template", "--batch_size", "8",
         "--device", "cpu", "--output_path", out / "results", "--log_samples"],
        env=offline(out), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return read_run(out / "results")


def by_our_module(python: Path, base: Path, adapter: Path | None, tasks: Path, out: Path) -> HarnessRun:
    out.mkdir()
    done = subprocess.run(
        [python, "-m", "workers.harness", "--base-model-folder", base, "--tasks-folder", tasks, "--tasks", "sums,sizes",
         "--out", out / "results", *(["--adapter", adapter] if adapter is not None else [])],
        env=offline(out), cwd=REPOSITORY, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return read_run(out / "results")


def test_without_the_extra_or_the_task_the_command_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("task: sums\n")

    def said(tasks: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "workers.harness", "--base-model-folder", tmp_path, "--tasks-folder", tmp_path,
             "--tasks", tasks, "--out", tmp_path / "out"],
            cwd=REPOSITORY, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        return done.stderr

    assert "No file in" in said("sum")
    assert "Choose among: sums." in said("sum")
    assert "pip install" in said("sums")

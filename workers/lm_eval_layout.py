"""A run of ours in the result layout of the evaluation harness (lm-eval 0.4), written and read without it.

A folder holds `results_<ISO>.json` and, beside it, `samples_<task>_<ISO>.jsonl`. The shapes are those of
`lm_eval/result_schema.py` and `lm_eval/loggers/evaluation_tracker.py` of lm-eval 0.4.13.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from workers.errors import ExplainedError
from workers.evaluations import Evaluation, MeanEvaluation, ScoredRow
from workers.mixing import row_at
from workers.results import ScoreRecord

FILTER = "none"
_Z_OF_INTERVAL = 1.959964
_NOT_IN_A_FILE_NAME = re.compile(r'["<>:/|\\?*\[\]\s]+')


class LayoutError(ExplainedError):
    """A folder does not hold results of the evaluation harness."""

    code = "unreadable_harness_results"


@dataclass(frozen=True)
class HarnessTask:
    """One task of a results file: its figures by "metric,filter", their standard errors, and its rows."""

    name: str
    values: dict[str, float]
    stderr: dict[str, float]
    higher_is_better: dict[str, bool | None]
    num_rows: int
    samples: list[dict[str, Any]] = field(default_factory=list)
    subtasks: tuple[str, ...] = ()
    """Of a group: what its figures are taken over."""


@dataclass(frozen=True)
class HarnessRun:
    """A results file with the samples beside it."""

    model_name: str
    tasks: dict[str, HarnessTask]
    config: dict[str, Any]


def write_run(
    folder: Path,
    *,
    task: str,
    scores: Sequence[ScoreRecord],
    rows: Sequence[ScoredRow],
    evaluations: Sequence[Evaluation],
    model_name: str,
    config: Mapping[str, Any],
    max_new_tokens: int,
    chat_template: str,
    when: datetime,
    seconds: float = 0.0,
    of_base: bool = False,
) -> Path:
    """Writes one model's scores on one set of rows as a task; gives the path of its results file.

    Every value is the score's own, so the harness's tools show what our pages show. `config` says how it was made.
    The standard error is half of our 95 % interval's width, divided by the normal distribution's quantile.

    Args:
        rows: the model's rows that the scores are from; a row's samples have the metrics that are means over rows.
        of_base: take the base's side of the scores.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name, iso = _NOT_IN_A_FILE_NAME.sub("__", task), when.isoformat().replace(":", "-")
    figures: dict[str, Any] = {"alias": task, "name": task, "sample_len": len(rows)}
    for score in scores:
        side = "base_" if of_base else ""
        low, high = getattr(score, f"{side}low"), getattr(score, f"{side}high")
        figures[f"{score.evaluation},{FILTER}"] = _finite(getattr(score, f"{side}value"))
        figures[f"{score.evaluation}_stderr,{FILTER}"] = _finite((high - low) / (2 * _Z_OF_INTERVAL))
    samples = [_sample(at, row, evaluations, max_new_tokens) for at, row in enumerate(rows)]
    hashes = "".join(one["doc_hash"] + one["prompt_hash"] + one["target_hash"] for one in samples)
    results = {
        "results": {name: figures},
        "group_subtasks": {name: []},
        "configs": {name: {"task": task, "output_type": _output_type(evaluations), "num_fewshot": 0}},
        "versions": {name: 1.0},
        "n-shot": {name: 0},
        "higher_is_better": {name: {score.evaluation: score.higher_is_better for score in scores}},
        "n-samples": {name: {"original": len(rows), "effective": len(rows)}},
        "config": dict(config),
        "git_hash": None,
        "date": when.timestamp(),
        "task_hashes": {name: _digest(hashes)},
        "model_source": "peft-studio",
        "model_name": model_name,
        "model_name_sanitized": _NOT_IN_A_FILE_NAME.sub("__", model_name),
        "system_instruction": None,
        "system_instruction_sha": None,
        "fewshot_as_multiturn": None,
        "chat_template": chat_template,
        "chat_template_sha": _digest(chat_template),
        "total_evaluation_time_seconds": str(seconds),
    }
    path = folder / f"results_{iso}.json"
    path.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", "utf-8", errors="replace")
    lines = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in samples)
    (folder / f"samples_{name}_{iso}.jsonl").write_text(lines, "utf-8", errors="replace")
    return path


def read_run(path: Path) -> HarnessRun:
    """A results file, ours or the harness's own, or the newest one in a folder, with the samples beside it.

    Raises:
        LayoutError: there is none, or it does not hold results.
    """
    if path.is_dir():
        found = sorted(path.rglob("results_*.json"))
        if not found:
            raise LayoutError(f"{path.name} holds no results_*.json.", next_step="Name a folder that lm_eval wrote.")
        path = found[-1]
    iso = path.stem.removeprefix("results_")
    try:
        value = json.loads(path.read_text("utf-8"))
        tasks = {}
        for name, figures in value["results"].items():
            numbers = {key: float(one) for key, one in figures.items() if "," in key and _is_number(one)}
            samples = path.with_name(f"samples_{name}_{iso}.jsonl")
            tasks[name] = HarnessTask(
                name=name,
                values={key: one for key, one in numbers.items() if "_stderr," not in key},
                stderr={key.replace("_stderr,", ","): one for key, one in numbers.items() if "_stderr," in key},
                higher_is_better=value.get("higher_is_better", {}).get(name, {}),
                num_rows=int(value.get("n-samples", {}).get(name, {}).get("effective", 0)),
                samples=list(_read_lines(samples)) if samples.exists() else [],
                subtasks=tuple(value.get("group_subtasks", {}).get(name, ())),
            )
        return HarnessRun(str(value.get("model_name") or ""), tasks, value.get("config") or {})
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise LayoutError(
            f"{path.name} cannot be read as results of the evaluation harness: {error}.",
            next_step="Write it with lm_eval 0.4 and --output_path, with --log_samples for the rows.",
        ) from error


def _sample(at: int, row: ScoredRow, evaluations: Sequence[Evaluation], max_new_tokens: int) -> dict[str, Any]:
    source, line = row_at(row.line)
    doc = {"line": line, **({"source": source} if source else {}), "prompt": row.prompt, "reference": row.reference}
    arguments: list[tuple[str, Any]] = [(row.prompt, {"until": [], "max_gen_toks": max_new_tokens})]
    responses: list[Any] = [[row.answer]] if row.answer is not None else []
    options = next((one for one in row.options.values() if one), None)
    if row.answer is None and options is not None:
        arguments = [(row.prompt, option) for option in options]
        likeliest = max(options.values())
        responses = [[[str(value), str(value == likeliest)]] for value in options.values()]
    values = {}
    for one in evaluations:
        usable = row.answer is not None if one.needs == "answer" else one.needs == "loss" or one.key in row.options
        if isinstance(one, MeanEvaluation) and usable and (found := one.row_value(row)).weight > 0:
            values[one.key] = _finite(one.present(found.value))
    return {
        "doc_id": at,
        "doc": doc,
        "target": row.reference,
        "arguments": {f"gen_args_{n}": {"arg_0": one, "arg_1": other} for n, (one, other) in enumerate(arguments)},
        "resps": responses,
        "filtered_resps": [one[0] for one in responses],
        "filter": FILTER,
        "metrics": list(values),
        "doc_hash": _digest(json.dumps(doc, indent=2, ensure_ascii=False)),
        "prompt_hash": _digest(arguments[0][0]),
        "target_hash": _digest(row.reference),
        **values,
    }


def _output_type(evaluations: Sequence[Evaluation]) -> str:
    needs = {one.needs for one in evaluations}
    return "multiple_choice" if "choices" in needs and "answer" not in needs else "generate_until"


def _read_lines(path: Path) -> Iterable[dict[str, Any]]:
    return (json.loads(line) for line in path.read_text("utf-8").split("\n") if line)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()

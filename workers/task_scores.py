"""What the evaluation harness measured of a base and of an adapter, as scores of ours: with intervals, paired by row.

Figures that are means over rows are compared row by row like any other of ours. For others the harness says no more
than a standard error, so their difference is not paired.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from workers.lm_eval_layout import HarnessRun, HarnessTask
from workers.results import RowCountsRecord, RunRowRecord, ScoreRecord
from workers.statistics import compare_counts
from workers.verdicts import rows_needed, rows_recommended

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

HARNESS = "lm_eval"
"""What the key of a score of the harness begins with, where that of an evaluation has its name."""
SMALLEST_EFFECT = 0.05
"""The smallest difference worth telling of a share of rows; of other figures, as a share of the base's."""
MAX_KEY = 80
_Z_OF_INTERVAL = 1.959964


@dataclass(frozen=True)
class TaskScores:
    """Scores, rows and counts of a run of tasks, and sentences about what could not be told."""

    scores: tuple[ScoreRecord, ...]
    rows: tuple[RunRowRecord, ...]
    counts: RowCountsRecord
    num_rows: int
    test_set_sha256: str
    settings_sha256: str
    warnings: tuple[str, ...]


def mean(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """The figure of every score here that is paired by row: (..., 2) sums of values and weights to their means."""
    found: NDArray[np.float64] = sums[..., 0] / sums[..., 1]
    return found


def score_key(task: str, figure: str) -> str:
    """The key of a task's figure ("exact_match,strict-match"), at most 80 characters."""
    metric, _, name = figure.partition(",")
    key = f"{HARNESS}-{task}-{metric}{'' if name in {'', 'none'} else f'-{name}'}"
    if len(key) <= MAX_KEY:
        return key
    return f"{key[: MAX_KEY - 9]}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"


def score_label(task: str, figure: str) -> str:
    """What people call it: "gsm8k: exact_match (strict-match)"."""
    metric, _, name = figure.partition(",")
    label = f"{task}: {metric}{'' if name in {'', 'none'} else f' ({name})'}"
    return label if len(label) <= MAX_KEY else f"{label[: MAX_KEY - 1]}\N{HORIZONTAL ELLIPSIS}"


def score_tasks(base: HarnessRun, adapter: HarnessRun | None, *, settings: dict[str, Any]) -> TaskScores:
    """Both models' figures of the same tasks side by side; without an adapter the base is its own neighbour.

    Args:
        settings: what beside the prompts decides an answer, for the digest that says what compares.
    """
    other = adapter or base
    scores: list[ScoreRecord] = []
    warnings: list[str] = []
    paired: dict[tuple[str, str], tuple[list[float], list[float]]] = {}
    for name, task in base.tasks.items():
        theirs = other.tasks.get(name)
        if not task.samples or theirs is None or not theirs.samples:
            continue
        for figure in task.values:
            pair = (_row_values(task, figure), _row_values(theirs, figure))
            if pair[0] is not None and pair[1] is not None and len(pair[0]) == len(pair[1]):
                paired[name, figure] = (pair[0], pair[1])
                scores.append(_paired_score(name, figure, task, *paired[name, figure]))
            elif (found := _unpaired_score(name, figure, task, theirs)) is not None:
                scores.append(found)
            else:
                warnings.append(f"{score_label(name, figure)} has no standard error, so it is not among the scores.")
    groups: list[ScoreRecord] = []
    for name, group in base.tasks.items():
        if not group.samples and group.subtasks:
            leaves = _leaves(base, name)
            for figure in group.values:
                members = [paired.get((one, figure)) for one in leaves]
                pooled = _pooled([one for one in members if one is not None]) if members and all(members) else None
                if pooled is not None and math.isclose(_mean_of(pooled[0]), group.values[figure], abs_tol=1e-6):
                    groups.append(_paired_score(name, figure, base.tasks[leaves[0]], *pooled))
                else:
                    warnings.append(f"{score_label(name, figure)} is no mean over the rows of its tasks: see those.")
    rows, counts = _rows(base, other, paired, is_base_alone=adapter is None)
    return TaskScores(
        scores=(*groups, *scores), rows=tuple(rows), counts=counts, num_rows=len(rows),
        test_set_sha256=_digest(_facts(base, "doc_hash", "target_hash")),
        settings_sha256=_digest([_facts(base, "prompt_hash"), settings]),
        warnings=tuple(warnings),
    )  # fmt: skip


def _samples(task: HarnessTask, figure: str) -> list[dict[str, Any]]:
    """The rows of a task as one of its filters left them, in the order of the documents."""
    name = figure.partition(",")[2]
    return sorted((one for one in task.samples if one.get("filter", name) == name), key=lambda one: int(one["doc_id"]))


def _row_values(task: HarnessTask, figure: str) -> list[float] | None:
    """Each row's value of a figure that is their mean; None for any other figure."""
    metric = figure.partition(",")[0]
    values = [one.get(metric) for one in _samples(task, figure)]
    numbers = [float(one) for one in values if isinstance(one, (bool, int, float)) and math.isfinite(one)]
    if not numbers or len(numbers) < len(values):
        return None
    return numbers if math.isclose(_mean_of(numbers), task.values[figure], rel_tol=1e-6, abs_tol=1e-9) else None


def _mean_of(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _paired_score(
    name: str, figure: str, task: HarnessTask, base: Sequence[float], adapter: Sequence[float]
) -> ScoreRecord:
    is_share = all(0 <= one <= 1 for one in (*base, *adapter))
    bounds = (0.0, 1.0) if is_share else None
    found = compare_counts([(one, 1.0) for one in base], [(one, 1.0) for one in adapter], figure=mean, bounds=bounds)
    effect = SMALLEST_EFFECT if is_share else max(SMALLEST_EFFECT * abs(found.base.value), 1e-9)
    return ScoreRecord(
        evaluation=score_key(name, figure), label=score_label(name, figure),
        higher_is_better=_is_higher_better(task, figure), num_rows=found.num_rows,
        value=found.adapter.value, low=found.adapter.low, high=found.adapter.high,
        base_value=found.base.value, base_low=found.base.low, base_high=found.base.high,
        difference=found.difference.value, difference_low=found.difference.low, difference_high=found.difference.high,
        interval_method=found.interval_method, p_value=found.p_value, smallest_effect=effect,
        rows_needed=rows_needed(found, effect), rows_recommended=rows_recommended(found, effect),
    )  # fmt: skip


def _unpaired_score(name: str, figure: str, base: HarnessTask, adapter: HarnessTask) -> ScoreRecord | None:
    """From the harness's standard errors, which say nothing of how the rows of both go together."""
    errors = base.stderr.get(figure), adapter.stderr.get(figure)
    values = base.values[figure], adapter.values.get(figure)
    if errors[0] is None or errors[1] is None or values[1] is None:
        return None
    reach, error = [_Z_OF_INTERVAL * one for one in errors if one is not None], math.hypot(errors[0], errors[1])
    difference = values[1] - values[0]
    p_value = math.erfc(abs(difference) / error / math.sqrt(2)) if error > 0 else float(difference == 0)
    return ScoreRecord(
        evaluation=score_key(name, figure), label=score_label(name, figure),
        higher_is_better=_is_higher_better(base, figure), num_rows=base.num_rows,
        value=values[1], low=values[1] - reach[1], high=values[1] + reach[1],
        base_value=values[0], base_low=values[0] - reach[0], base_high=values[0] + reach[0],
        difference=difference, difference_low=difference - _Z_OF_INTERVAL * error,
        difference_high=difference + _Z_OF_INTERVAL * error,
        interval_method="the harness's standard errors, not paired by row", p_value=p_value,
    )  # fmt: skip


def _is_higher_better(task: HarnessTask, figure: str) -> bool:
    return task.higher_is_better.get(figure.partition(",")[0]) is not False


def _leaves(run: HarnessRun, name: str) -> list[str]:
    """The tasks with rows of a group, and of the groups in it."""
    found: list[str] = []
    for one in run.tasks[name].subtasks:
        task = run.tasks.get(one)
        if task is not None:
            found += [one] if task.samples else _leaves(run, one)
    return list(dict.fromkeys(found))


def _pooled(members: Sequence[tuple[list[float], list[float]]]) -> tuple[list[float], list[float]]:
    return [one for base, _ in members for one in base], [one for _, adapter in members for one in adapter]


def _rows(
    base: HarnessRun,
    other: HarnessRun,
    paired: dict[tuple[str, str], tuple[list[float], list[float]]],
    *,
    is_base_alone: bool,
) -> tuple[list[RunRowRecord], RowCountsRecord]:
    rows: list[RunRowRecord] = []
    counts: tuple[dict[str, list[Any]], dict[str, list[Any]]] = ({}, {})
    documents = [(name, sample) for name, task in base.tasks.items() for sample in _first_of_each(task)]
    answers = {
        name: {int(one["doc_id"]): _answer(one) for one in _first_of_each(task)} for name, task in other.tasks.items()
    }
    places = {name: [at for at, (one, _) in enumerate(documents) if one == name] for name in base.tasks}
    for (name, figure), values in paired.items():
        key = score_key(name, figure)
        for which in (0, 1):
            counts[which][key] = [None] * len(documents)
            for at, value in zip(places[name], values[which], strict=True):
                counts[which][key][at] = (value, 1.0)
    for at, (name, sample) in enumerate(documents):
        figures = {
            key: (counts[0][key][at][0], None if is_base_alone else counts[1][key][at][0])
            for key in counts[0]
            if counts[0][key][at] is not None
        }
        answer = answers[name].get(int(sample["doc_id"]))
        rows.append(
            RunRowRecord(
                line=int(sample["doc_id"]) + 1,
                task=name[:200],
                prompt=_prompt(sample),
                reference=str(sample["target"]),
                base_answer=_answer(sample),
                adapter_answer=None if is_base_alone else answer,
                figures=figures,
            )
        )
    return rows, RowCountsRecord(
        lines=tuple(range(1, len(documents) + 1)),
        base={key: tuple(value) for key, value in counts[0].items()},
        adapter={key: tuple(value) for key, value in counts[1].items()},
    )


def _first_of_each(task: HarnessTask) -> list[dict[str, Any]]:
    """One sample of each document, by the first filter, in the order of the documents."""
    found: dict[int, dict[str, Any]] = {}
    for sample in task.samples:
        found.setdefault(int(sample["doc_id"]), sample)
    return [found[number] for number in sorted(found)]


def _arguments(sample: dict[str, Any]) -> list[dict[str, Any]]:
    return list(sample["arguments"].values())


def _prompt(sample: dict[str, Any]) -> str:
    found = _arguments(sample)
    return str(found[0].get("arg_0", "")) if found else ""


def _answer(sample: dict[str, Any]) -> str | None:
    """What the model wrote, or the option that it found the likeliest."""
    responses, arguments = sample.get("resps") or [], _arguments(sample)
    if not responses or not arguments:
        return None
    if isinstance(responses[0][0], str):
        return responses[0][0]
    if len(responses) < 2 or len(responses) > len(arguments):
        return None
    likelihoods = [float(one[0][0]) for one in responses]
    return str(arguments[likelihoods.index(max(likelihoods))].get("arg_1", "")).strip()


def _facts(run: HarnessRun, *names: str) -> list[Any]:
    return [
        [name, [[sample.get(one, "") for one in names] for sample in _first_of_each(task)]]
        for name, task in sorted(run.tasks.items())
        if task.samples
    ]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=True, separators=(",", ":")).encode()).hexdigest()

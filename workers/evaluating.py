"""Scoring what is there: an adapter beside its base, or a base alone, on the rows of a test set, with nothing trained.

The same code as at the end of a training, so that a figure means the same wherever it was measured.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from workers import adapters, checkpoints, devices, scoring
from workers.base_scores import BaseScores, scores_key
from workers.bases import Bases
from workers.device_errors import is_out_of_memory
from workers.digests import damaged_file, file_sha256
from workers.errors import DamagedAdapterError, DatasetError, OutOfMemoryError
from workers.evaluations import ScoredRow
from workers.events import MessageEvent, PhaseEvent, Report, ResultEvent, ShouldStop, StoppedEvent
from workers.examples import Example, Problem
from workers.memory import GIB
from workers.reading import read_examples
from workers.recipe import Recipe
from workers.rendering import Renderer
from workers.resolving import resolve
from workers.results import Provenance, Result
from workers.test_sets import rows_sha256, settings_sha256
from workers.training import Folders, base_facts, check_revision, dataset_facts, facts_of_device, versions


class Stopped(Exception):  # noqa: N818 - an outcome, not an error
    """The evaluation ends without a product because it was asked to."""


def evaluate(
    recipe: Recipe,
    folders: Folders,
    *,
    adapter: Path | None,
    report: Report,
    should_stop: ShouldStop,
    max_rows: int | None = None,
    attempt: int = 1,
    bases: Bases | None = None,
    base_scores: BaseScores | None = None,
) -> Path | None:
    """Scores a base, and the adapter in a folder on it, on every row of the dataset; gives the folder of the result.

    Args:
        recipe: what it says of the base, its precision, the dataset, the maximum length and the evaluation counts.
        adapter: an adapter's folder as training leaves it; None scores the base alone.
        max_rows: usable rows from the beginning of the file; None for all.
        base_scores: keeps what the base was measured at for later runs.

    None when it was stopped. Whatever way it is asked to stop, there is nothing to keep: half a test set is no score.

    Raises:
        ExplainedError: what a person can mend: the dataset, the base model, the adapter, memory, disk space.
    """
    started = time.monotonic()
    device = devices.choose_device()
    bases = bases or Bases()
    kept = base_scores or BaseScores(folders.out / "base_scores")

    try:
        report(PhaseEvent(phase="preparing"))
        folders.out.mkdir(parents=True, exist_ok=True)
        base = bases.read(folders.base_model)
        check_revision(recipe, base)
        renderer = Renderer(folders.base_model, max_length=recipe.training.max_length, loss_on=recipe.training.loss_on)
        examples, num_left_out = read_rows(recipe, folders, renderer, max_rows, report)
        lengths = [len(renderer.render(example).ids) for example in examples]
        recipe = resolve(recipe, base.shape, dataset_facts(lengths), facts_of_device(device))
        assert recipe.precision != "auto"
        key = scores_key(base_facts(base.revision, recipe, renderer, examples, device))
        base_rows = kept.get(key)
        model: Any = None
        if base_rows is None or adapter is not None:
            end_if_asked(should_stop)
            report(PhaseEvent(phase="loading"))
            model = bases.load(base, recipe.precision, device, say=lambda text: report(MessageEvent(text=text)))
        if base_rows is None:
            base_rows = _score(model, renderer, examples, recipe, "scoring_base", report, should_stop)
            kept.put(key, base_rows)
        rows = base_rows
        if adapter is not None:
            refuse_damaged(adapter)
            model = adapters.load(model, adapter)
            rows = _score(model, renderer, examples, recipe, "evaluating", report, should_stop)
    except Stopped:
        report(StoppedEvent(mode=should_stop() or "now", step=0))
        return None
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise out_of_memory(device) from error
        raise
    report(PhaseEvent(phase="packaging"))
    for message in scoring.left_out_messages(rows, recipe.evaluation.metrics):
        report(message)
    result = Result(
        scores=tuple(scoring.compare_rows(base_rows, rows, recipe.evaluation.metrics)),
        samples=tuple(scoring.samples(base_rows, rows)) if adapter is not None else (),
        held_out=tuple(scoring.held_out(base_rows, rows)),
        counts=scoring.row_counts(base_rows, rows, recipe.evaluation.metrics),
        rows=tuple(scoring.run_rows(base_rows, rows, recipe.evaluation.metrics, is_base_alone=adapter is None)),
        num_rows_to_score=len(examples) + num_left_out,
        num_rows_scored=len(rows),
        test_set_sha256=rows_sha256(examples),
        settings_sha256=settings_sha256(recipe.evaluation, renderer),
        provenance=Provenance(
            versions=versions(), device=devices.device_name(device), num_threads=torch.get_num_threads(),
            wall_seconds=time.monotonic() - started, peak_memory_bytes=devices.peak_memory_bytes(device),
            dataset_sha256=recipe.dataset.sha256 or "", base_revision=base.revision, recipe_sha256=recipe.sha256(),
            num_held_out_rows=len(rows),
        ),
    )  # fmt: skip
    folder = write(folders.out / "attempts" / str(attempt) / "evaluation", result)
    report(ResultEvent(folder=str(folder)))
    return folder


def read_rows(
    recipe: Recipe, folders: Folders, renderer: Renderer, max_rows: int | None, report: Report
) -> tuple[list[Example], int]:
    """The usable rows of the dataset file, the first `max_rows` of them, and how many rows before its end are not.

    A row that the format cannot read is not part of the test set; one that this model cannot take (its answer does not
    fit the maximum length, say) is, and makes the evaluation incomplete.
    """
    examples: list[Example] = []
    left_out: list[Problem] = []
    for row in read_examples(folders.dataset, recipe.dataset.format, recipe.dataset.columns):
        if max_rows is not None and len(examples) + len(left_out) >= max_rows:
            break
        if not isinstance(row, Example):
            continue
        rendered = renderer.try_render(row)
        if not isinstance(rendered, Problem):
            examples.append(row)
        elif rendered.level == "error":
            left_out.append(rendered)
    if not examples:
        raise DatasetError(
            "No row of this test set can be scored." + (f" The first: {left_out[0].message}" if left_out else ""),
            next_step="Open the dataset to see what is wrong with its rows.",
        )
    if left_out:
        noun = "row" if len(left_out) == 1 else "rows"
        text = f"{len(left_out)} {noun} cannot be scored, so the evaluation is incomplete. First: {left_out[0].message}"
        report(MessageEvent(level="warning", text=text))
    return examples, len(left_out)


def write(folder: Path, result: Result, *, layout: Path | None = None) -> Path:
    """The result's folder: complete, or not there. `result.json`, its rows in `eval/`, and checksums.

    `layout` is a folder of the evaluation harness's results, which moves into `eval/`.
    """
    aside = folder.with_name(f".tmp-{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    (aside / "eval").mkdir(parents=True)
    try:
        for name, records in (("samples", result.samples), ("held_out", result.held_out)):
            lines = [json.dumps(record.model_dump(mode="json"), ensure_ascii=False) + "\n" for record in records]
            (aside / "eval" / f"{name}.jsonl").write_text("".join(lines), "utf-8", errors="replace")
        if layout is not None:
            layout.replace(aside / "eval" / layout.name)
        result.write(aside)
        adapters.write_checksums(aside)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise checkpoints.disk_error(error, "the evaluation") from error
    shutil.rmtree(folder, ignore_errors=True)
    return aside.replace(folder)


def _score(
    model: Any,
    renderer: Renderer,
    examples: Sequence[Example],
    recipe: Recipe,
    phase: Any,
    report: Report,
    should_stop: ShouldStop,
) -> list[ScoredRow]:
    report(PhaseEvent(phase=phase, done=0))
    rows = scoring.score_test_set(
        model, renderer, examples, recipe.evaluation, report=report, phase=phase, should_stop=should_stop
    )
    end_if_asked(should_stop)
    return rows


def refuse_damaged(adapter: Path) -> None:
    """Raise DamagedAdapterError for a folder whose files are not those that its checksums were written for."""
    if (name := damaged_file(adapter, lambda name: _file_digest(adapter / name))) is not None:
        raise DamagedAdapterError(
            f'The file "{name}" of this adapter is missing or has changed since it was made.',
            next_step="Restore it, or train the adapter again; figures of a damaged one mean nothing.",
        )


def _file_digest(path: Path) -> str | None:
    """Digest of a file; None for one that is not there."""
    return file_sha256(path) if path.is_file() else None


def end_if_asked(should_stop: ShouldStop) -> None:
    """Raises Stopped when a stop was asked for."""
    if should_stop() is not None:
        raise Stopped


def out_of_memory(device: torch.device) -> OutOfMemoryError:
    """What scoring that ran out of memory says."""
    peak, has = devices.peak_memory_bytes(device), devices.memory_bytes(device)
    return OutOfMemoryError(
        f"Scoring ran out of memory: it held {peak / GIB:.1f} GiB when it asked for more, and the device has "
        f"{has / GIB:.1f} GiB.",
        next_step="Run it on a device with more memory, or with shorter answers.",
        details={"peak_memory_bytes": peak, "device_memory_bytes": has},
    )

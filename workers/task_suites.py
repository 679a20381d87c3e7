"""Standard tasks of the evaluation harness on a base, and on an adapter beside it: what an evaluation job of them runs.

The models are loaded as everywhere else here, so that any method's adapter and any precision can be scored.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from workers import adapters, devices
from workers.bases import Bases
from workers.device_errors import is_out_of_memory
from workers.errors import BaseModelError
from workers.evaluating import Stopped, end_if_asked, out_of_memory, refuse_damaged, write
from workers.events import MessageEvent, PhaseEvent, Report, ResultEvent, ShouldStop, StoppedEvent
from workers.facts import DatasetFacts
from workers.harness import HarnessRequest, prepare, run
from workers.lm_eval_layout import HarnessRun
from workers.recipe import Recipe
from workers.rendering import read_chat_template
from workers.resolving import resolve
from workers.results import Provenance, Result
from workers.task_files import HarnessError, definitions_sha256
from workers.task_scores import score_tasks
from workers.training import check_revision, facts_of_device, versions

BATCH_SIZE = 8
"""Rows in memory at once: the harness's own examples use as many."""
LAYOUT_FOLDER = "lm_eval"


@dataclass(frozen=True)
class TaskRequest:
    """What is asked of the harness. `definitions_sha256`, when given, is what the task files must still be."""

    folder: Path
    names: tuple[str, ...]
    num_fewshot: int | None = None
    max_rows: int | None = None
    with_chat_template: bool = True
    may_run_code: bool = False
    definitions_sha256: str = ""


def evaluate_tasks(
    recipe: Recipe,
    base_model: Path,
    out: Path,
    asked: TaskRequest,
    *,
    adapter: Path | None,
    report: Report,
    should_stop: ShouldStop,
    attempt: int = 1,
    bases: Bases | None = None,
) -> Path | None:
    """Scores a base, and the adapter in a folder on it, on standard tasks; gives the folder of the result.

    Beside `result.json` it holds what the harness wrote, in its own layout: `lm_eval/base` and `lm_eval/adapter`.
    None when it was stopped.

    Raises:
        ExplainedError: what a person can mend: the tasks, the base model, the adapter, memory, disk space.
    """
    started = time.monotonic()
    device = devices.choose_device()
    bases = bases or Bases()
    try:
        report(PhaseEvent(phase="preparing"))
        prepare()
        _check_definitions(asked)
        out.mkdir(parents=True, exist_ok=True)
        base = bases.read(base_model)
        check_revision(recipe, base)
        # Only the precision is wanted: nothing is trained, and how long its rows are the harness finds out.
        recipe = resolve(recipe, base.shape, DatasetFacts(1, 1, 1), facts_of_device(device))
        assert recipe.precision != "auto"
        layout = out / "attempts" / str(attempt) / LAYOUT_FOLDER
        end_if_asked(should_stop)
        report(PhaseEvent(phase="loading"))
        model = bases.load(base, recipe.precision, device, say=lambda text: report(MessageEvent(text=text)))

        def score(model: Any, side: str, phase: Any) -> HarnessRun:
            report(PhaseEvent(phase=phase, done=0))
            request = HarnessRequest(
                base=base_model, tasks=asked.folder, names=asked.names, out=layout / side,
                num_fewshot=asked.num_fewshot, limit=asked.max_rows, batch_size=str(BATCH_SIZE),
                with_chat_template=asked.with_chat_template and read_chat_template(base_model) is not None,
                may_run_code=asked.may_run_code,
            )  # fmt: skip
            wrapped = _language_model(model, base_model, _Progress(phase, report, should_stop))
            return run(request, model=wrapped, label=recipe.base_model.name if side == "base" else recipe.name)

        of_base = score(model, "base", "scoring_base")
        of_adapter = None
        if adapter is not None:
            refuse_damaged(adapter)
            of_adapter = score(adapters.load(model, adapter), "adapter", "evaluating")
    except Stopped:
        report(StoppedEvent(mode=should_stop() or "now", step=0))
        return None
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise out_of_memory(device) from error
        raise
    report(PhaseEvent(phase="packaging"))
    settings = {"num_fewshot": asked.num_fewshot, "harness": _harness_version(), "precision": recipe.precision}
    found = score_tasks(of_base, of_adapter, settings=settings)
    for text in found.warnings:
        report(MessageEvent(level="warning", text=text))
    result = Result(
        scores=found.scores, counts=found.counts, rows=found.rows, num_rows_to_score=found.num_rows,
        num_rows_scored=found.num_rows, test_set_sha256=found.test_set_sha256, settings_sha256=found.settings_sha256,
        provenance=Provenance(
            versions={**versions(), "lm_eval": _harness_version()}, device=devices.device_name(device),
            num_threads=torch.get_num_threads(), wall_seconds=time.monotonic() - started,
            peak_memory_bytes=devices.peak_memory_bytes(device), base_revision=base.revision,
            recipe_sha256=recipe.sha256(), num_held_out_rows=found.num_rows,
        ),
    )  # fmt: skip
    folder = write(out / "attempts" / str(attempt) / "evaluation", result, layout=layout)
    report(ResultEvent(folder=str(folder)))
    return folder


def _check_definitions(asked: TaskRequest) -> None:
    if asked.definitions_sha256 and definitions_sha256(asked.folder, asked.names) != asked.definitions_sha256:
        raise HarnessError(
            "The task files are not those that the suite was made of: one of them has changed, or is missing here.",
            next_step="Make the suite's next version, or restore the files in the folder of tasks.",
        )


class _Progress:
    """Tells how many requests are done, and ends the run when that is asked for."""

    def __init__(self, phase: Any, report: Report, should_stop: ShouldStop) -> None:
        self._phase, self._report, self._should_stop = phase, report, should_stop
        self._done, self._total = 0, 0

    def expect(self, num: int) -> None:
        self._total += num

    def advance(self, num: int) -> None:
        end_if_asked(self._should_stop)
        self._done = min(self._done + num, self._total)
        self._report(PhaseEvent(phase=self._phase, done=self._done, total=self._total))


def _language_model(model: Any, base_model: Path, progress: _Progress) -> Any:
    """A loaded model as the harness takes one, telling its progress at every batch."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    class LoadedModel(HFLM):
        """The harness's own code for a model, around one that is loaded already."""

        def loglikelihood(self, requests: Any, *rest: Any, **named: Any) -> Any:
            return self._counted(super().loglikelihood, requests, *rest, **named)

        def loglikelihood_rolling(self, requests: Any, *rest: Any, **named: Any) -> Any:
            return self._counted(super().loglikelihood_rolling, requests, *rest, **named)

        def generate_until(self, requests: Any, *rest: Any, **named: Any) -> Any:
            return self._counted(super().generate_until, requests, *rest, **named)

        def _counted(self, ask: Callable[..., Any], requests: Any, *rest: Any, **named: Any) -> Any:
            progress.expect(len(requests))
            return ask(requests, *rest, **named)

        def _model_call(self, inps: Any, *rest: Any, **named: Any) -> Any:
            progress.advance(0)
            found = super()._model_call(inps, *rest, **named)
            progress.advance(len(inps))
            return found

        def _model_generate(self, context: Any, *rest: Any, **named: Any) -> Any:
            progress.advance(0)
            found = super()._model_generate(context, *rest, **named)
            progress.advance(len(context))
            return found

    try:
        tokenizer = AutoTokenizer.from_pretrained(base_model, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise BaseModelError(f"The tokenizer of the base model cannot be loaded: {error}.") from error
    wrapped = LoadedModel(pretrained=model, tokenizer=tokenizer, batch_size=BATCH_SIZE)
    # The harness would ask a hub for the digest of what it takes for a name.
    wrapped.pretrained = base_model.name
    return wrapped


def _harness_version() -> str:
    from importlib.metadata import version

    return version("lm-eval")

"""`python -m workers.harness`: standard tasks of the evaluation harness, offline, on a base or an adapter.

The tasks are task files (YAML) of lm-eval 0.4 in a folder of yours, beside the data files that they name; nothing is
fetched. Results are left in the harness's own layout. Needs the extra: pip install '.[harness]'.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workers.errors import ExplainedError
from workers.lm_eval_layout import HarnessRun, read_run
from workers.task_files import INSTALL, HarnessError, choose_tasks

EXIT_FAILED = 1
_OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_EVALUATE_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass(frozen=True)
class HarnessRequest:
    """What to score, on which tasks, and where results go. Paths to folders; `adapter` is a plain peft folder."""

    base: Path
    tasks: Path
    names: tuple[str, ...]
    out: Path
    adapter: Path | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    batch_size: str = "8"
    with_chat_template: bool = True
    may_run_code: bool = False
    """Whether a task may bring functions of its own, which are then run."""


def run(request: HarnessRequest, *, model: Any = None, label: str = "") -> HarnessRun:
    """Runs the tasks by the harness's own evaluator and gives what it wrote.

    Args:
        model: an LM of the harness around a model that is loaded already; None has the harness load the folders.
        label: what the results call such a model.

    Raises:
        HarnessError: the extra is not installed, a task is in no file of the folder, runs code where that is not
            allowed, or is refused by the harness.
    """
    choose_tasks(request.tasks, request.names, may_run_code=request.may_run_code)
    for name, folder in (("base model", request.base), ("adapter", request.adapter)):
        if folder is not None and not folder.is_dir():
            raise HarnessError(f"There is no folder of the {name} at {folder}.")
    prepare()
    from jinja2 import TemplateError
    from lm_eval import simple_evaluate
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.tasks import TaskManager

    from workers.device_errors import is_out_of_memory
    from workers.devices import choose_device

    arguments = {"pretrained": label or str(request.base.resolve())}
    if request.adapter is not None and model is None:
        arguments["peft"] = str(request.adapter.resolve())
    tasks, out = request.tasks.resolve(), request.out.resolve()
    tracker = EvaluationTracker(output_path=str(out))
    try:
        # Data files that a task names by a relative path lie in its folder.
        with contextlib.chdir(tasks), _templates(may_run_code=request.may_run_code):
            results = simple_evaluate(
                model="hf" if model is None else model,
                model_args=arguments,
                tasks=list(request.names),
                num_fewshot=request.num_fewshot,
                limit=request.limit,
                batch_size=request.batch_size,
                device=str(choose_device()),
                apply_chat_template=request.with_chat_template,
                task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
                evaluation_tracker=tracker,
                log_samples=True,
                confirm_run_unsafe_code=request.may_run_code,
            )
    except (ValueError, KeyError, OSError, RuntimeError, TemplateError) as error:
        if is_out_of_memory(error):
            raise
        raise HarnessError(
            f"The evaluation harness cannot run {', '.join(request.names)}: {str(error).strip()[:500]}",
            next_step="Let the task's dataset_path and data_files name files of its folder.",
        ) from error
    samples = results.pop("samples")
    tracker.save_results_aggregated(results=results, samples=samples)
    for name in results["configs"]:
        tracker.save_results_samples(task_name=name, samples=samples[name])
    return read_run(out)


def prepare() -> None:
    """Imports the harness so that it reaches no network; raises HarnessError where it is not installed."""
    # Before anything of it is imported: its libraries read these once.
    os.environ.update(_OFFLINE)
    try:
        import lm_eval.models.huggingface  # noqa: F401
    except ImportError as error:
        raise HarnessError(
            f"The evaluation harness is not installed here ({error}).", next_step=f"Install it with: {INSTALL}."
        ) from error


@contextlib.contextmanager
def _templates(*, may_run_code: bool) -> Iterator[None]:
    """Has the harness render a task's templates in Jinja's sandbox, out of which they reach no code."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from lm_eval import utils

    usual = utils.env
    if not may_run_code:
        utils.env = ImmutableSandboxedEnvironment(
            loader=usual.loader, undefined=usual.undefined, keep_trailing_newline=usual.keep_trailing_newline
        )
        utils.env.filters.update(usual.filters)
    try:
        yield
    finally:
        utils.env = usual


def table(found: HarnessRun) -> str:
    """The figures, a line each: task, metric and filter, value, standard error, rows."""
    lines = []
    for task in found.tasks.values():
        for key, value in task.values.items():
            error = f" ± {task.stderr[key]:.4f}" if key in task.stderr else ""
            lines.append(f"{task.name}  {key}  {value:.4f}{error}  n={task.num_rows}")
    return "\n".join(lines)


def main(given: Sequence[str] | None = None) -> int:
    """Runs the command line and gives its exit status."""
    options = _parse(given)
    try:
        request = HarnessRequest(
            base=options.base_model_folder,
            adapter=options.adapter,
            tasks=options.tasks_folder,
            names=tuple(name for name in options.tasks.split(",") if name),
            out=options.out,
            num_fewshot=options.num_fewshot,
            limit=options.limit,
            batch_size=options.batch_size,
            with_chat_template=not options.without_chat_template,
            may_run_code=options.tasks_may_run_code,
        )
        print(table(run(request)))
    except ExplainedError as error:
        print(f"{error.message} {error.next_step}".strip(), file=sys.stderr)
        return EXIT_FAILED
    return 0


def _parse(given: Sequence[str] | None) -> Any:
    parser = argparse.ArgumentParser(prog="python -m workers.harness", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("--base-model-folder", type=Path, required=True, metavar="D")
    parser.add_argument("--adapter", type=Path, metavar="D", help="a peft folder; without it the base alone is scored")
    parser.add_argument("--tasks-folder", type=Path, required=True, metavar="D", help="task files and their data")
    parser.add_argument("--tasks", required=True, metavar="A,B", help="names of tasks or groups in that folder")
    parser.add_argument("--out", type=Path, required=True, metavar="D", help="takes results_*.json and samples_*.jsonl")
    parser.add_argument("--num-fewshot", type=int, metavar="N", help="instead of what each task says")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N rows of each task only")
    parser.add_argument("--batch-size", default="8", metavar="N", help='rows at once, or "auto"')
    parser.add_argument("--without-chat-template", action="store_true", help="give the model the bare text of the task")
    parser.add_argument("--tasks-may-run-code", action="store_true", help="run functions that the task files name")
    return parser.parse_args(given)


if __name__ == "__main__":
    sys.exit(main())

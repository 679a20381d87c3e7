"""`python -m workers.harness`: standard tasks of the evaluation harness, offline, on a base or an adapter.

The tasks are task files (YAML) of lm-eval 0.4 in a folder of yours, beside the data files that they name; nothing is
fetched. Results are left in the harness's own layout. Needs the extra: pip install '.[harness]'.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workers.errors import ExplainedError
from workers.lm_eval_layout import HarnessRun, read_run

EXIT_FAILED = 1
_TASK_NAME = re.compile(r"^(?:task|group):[ \t]*[\"']?([^\"'#\n]+?)[\"']?[ \t]*(?:#.*)?$", re.MULTILINE)
_OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_EVALUATE_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


class HarnessError(ExplainedError):
    """The evaluation harness is not installed, or cannot run what was asked."""

    code = "harness"


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


def task_names(folder: Path) -> list[str]:
    """The tasks and groups that the files of a folder define; raises HarnessError when there is no such folder."""
    if not folder.is_dir():
        raise HarnessError(f"There is no folder of tasks at {folder}.", next_step="Name one with --tasks-folder.")
    found = set()
    for path in folder.rglob("*.yaml"):
        found |= {name.strip() for name in _TASK_NAME.findall(path.read_text("utf-8", errors="replace"))}
    return sorted(found)


def run(request: HarnessRequest) -> HarnessRun:
    """Runs the tasks by the harness's own evaluator and gives what it wrote.

    Raises:
        HarnessError: the extra is not installed, a task is in no file of the folder, or the harness refuses it.
    """
    known = task_names(request.tasks)
    if missing := [name for name in request.names if name not in known]:
        raise HarnessError(
            f"No file in {request.tasks} defines the task {missing[0]}.",
            next_step=f"Choose among: {', '.join(known) or 'none, the folder has no task files'}.",
        )
    for name, folder in (("base model", request.base), ("adapter", request.adapter)):
        if folder is not None and not folder.is_dir():
            raise HarnessError(f"There is no folder of the {name} at {folder}.")
    # Before anything of it is imported: its libraries read these once.
    os.environ.update(_OFFLINE)
    try:
        from lm_eval import simple_evaluate
        from lm_eval.loggers import EvaluationTracker
        from lm_eval.tasks import TaskManager

        from workers.devices import choose_device
    except ImportError as error:
        raise HarnessError(
            f"The evaluation harness is not installed here ({error}).",
            next_step="Install it with: pip install -c docker/constraints.txt '.[worker,harness]'.",
        ) from error
    arguments = {"pretrained": str(request.base)}
    if request.adapter is not None:
        arguments["peft"] = str(request.adapter)
    tracker = EvaluationTracker(output_path=str(request.out))
    try:
        results = simple_evaluate(
            model="hf",
            model_args=arguments,
            tasks=list(request.names),
            num_fewshot=request.num_fewshot,
            limit=request.limit,
            batch_size=request.batch_size,
            device=str(choose_device()),
            apply_chat_template=request.with_chat_template,
            task_manager=TaskManager(include_path=str(request.tasks), include_defaults=False),
            evaluation_tracker=tracker,
            log_samples=True,
        )
    except (ValueError, KeyError, FileNotFoundError, ConnectionError, RuntimeError) as error:
        raise HarnessError(
            f"The evaluation harness cannot run {', '.join(request.names)}: {str(error).strip()[:500]}",
            next_step="Let the task's dataset_path and data_files name files of this machine.",
        ) from error
    samples = results.pop("samples")
    tracker.save_results_aggregated(results=results, samples=samples)
    for name in results["configs"]:
        tracker.save_results_samples(task_name=name, samples=samples[name])
    return read_run(request.out)


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
    return parser.parse_args(given)


if __name__ == "__main__":
    sys.exit(main())

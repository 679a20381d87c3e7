"""One training job, given as command-line arguments: what a trainer of that job alone and a resident one share.

Exit status: 0 with a product, 1 failed, 75 stopped because it was asked to.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import json
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, get_args

from workers.base_folders import BaseFolder, Stamps, read_with_stamps
from workers.errors import BaseModelError, DatasetError, ExplainedError
from workers.events import (
    EXIT_STOPPED,
    AnswersEvent,
    CheckpointEvent,
    FailedEvent,
    MessageEvent,
    PhaseEvent,
    PlanEvent,
    ResultEvent,
    StepEvent,
    StopMode,
    StoppedEvent,
    ValidationEvent,
)
from workers.recipe import Recipe

if TYPE_CHECKING:
    from workers.bases import HeldBases
    from workers.training import Folders

Reading = Callable[[Path], tuple[Stamps, BaseFolder]]

EXIT_FAILED = 1
PR_SET_PDEATHSIG = 1
PHASE_WORDS = {
    "preparing": "Reading the dataset",
    "loading": "Loading the base model",
    "scoring_base": "Scoring the base model",
    "training": "Training",
    "evaluating": "Scoring the adapter",
    "packaging": "Writing the adapter",
}


def run(
    options: argparse.Namespace,
    report: Callable[[Any], None],
    control: Control,
    *,
    read: Reading | None = None,
    held: HeldBases | None = None,
) -> int:
    """Does one job and gives its exit status; what goes wrong is reported as a sentence.

    `held` are the bases of a resident trainer; without, the base model is loaded for this job alone. `read` gives what
    was begun to be read of the base model's folder (`begin_reading`).
    """
    try:
        product = _run(options, report, control, read, held)
    except ExplainedError as error:
        report(
            FailedEvent(
                code=error.code,
                message=error.message,
                next_step=error.next_step,
                field=error.field,
                line=error.line,
                details=error.details,
            )
        )
        return EXIT_FAILED
    except Exception as error:  # noqa: BLE001 - the last line of defence: a sentence for people, the rest to a file
        log = _write_log(options.out, options.attempt)
        report(
            FailedEvent(
                code="internal",
                message=f"Training failed unexpectedly: {_one_line(error)}",
                next_step=f"The details are in {log}." if log else "The details could not be written to a file.",
            )
        )
        return EXIT_FAILED
    return EXIT_STOPPED if product is None else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options of one job; ends the process with the usage when they are wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m workers",
        description="Train an adapter as a recipe says, and score it beside its base.",
        epilog='"python -m workers describe" lists the methods, the metrics and their settings.',
    )
    parser.add_argument("recipe", type=Path, help="recipe file (JSON); paths in it are relative to it")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="takes checkpoints and the adapter")
    parser.add_argument("--base-model-folder", type=Path, metavar="D", help="instead of the recipe's base_model.path")
    parser.add_argument("--dataset-file", type=Path, metavar="F", help="instead of the recipe's dataset.path")
    parser.add_argument("--split-file", type=Path, metavar="F", help="instead of the recipe's dataset.split.path")
    parser.add_argument("--attempt", type=int, default=1, metavar="N", help="number of this try (default 1)")
    parser.add_argument(
        "--micro-batch-size",
        type=int,
        metavar="N",
        help="at most N rows in memory at once, below what the recipe says; what is learned stays the same",
    )
    parser.add_argument("--events", type=int, metavar="FD", help="write JSON-line events to this file descriptor")
    parser.add_argument(
        "--supervised", action="store_true", help='read {"stop": mode} from standard input and end with it'
    )
    parser.add_argument(
        "--evaluate", action="store_true", help="train nothing: score the base, and --adapter-folder, on every row"
    )
    parser.add_argument("--adapter-folder", type=Path, metavar="DIR", help="with --evaluate: the adapter to score")
    parser.add_argument(
        "--tasks-folder", type=Path, metavar="DIR", help="with --evaluate: task files of lm-eval instead of a dataset"
    )
    parser.add_argument("--task", action="append", default=[], metavar="T", help="a task or group of that folder")
    parser.add_argument("--num-fewshot", type=int, metavar="N", help="examples before a task's question")
    parser.add_argument("--without-chat-template", action="store_true", help="give the model a task's bare text")
    parser.add_argument("--tasks-may-run-code", action="store_true", help="run functions that task files name")
    parser.add_argument("--tasks-sha256", default="", metavar="HEX", help="what the task files must still be")
    parser.add_argument("--max-rows", type=int, metavar="N", help="with --evaluate: the first N usable rows only")
    parser.add_argument(
        "--base-scores", type=Path, metavar="DIR", help="keep what base models were measured at here, for later runs"
    )
    parser.add_argument(
        "--quantised-cache", type=Path, metavar="DIR", help="keep quantised base models here, for the next run"
    )
    return parser.parse_args(arguments)


def _run(
    options: argparse.Namespace,
    report: Callable[[Any], None],
    control: Control,
    read: Reading | None,
    held: HeldBases | None,
) -> Path | None:
    recipe = Recipe.from_file(options.recipe)
    folders_of = options.recipe.resolve().parent
    base_model = _place(
        options.base_model_folder, recipe.base_model.path, folders_of, BaseModelError, "base_model.path", "folder"
    )
    if options.tasks_folder is not None:
        return _run_tasks(options, recipe, base_model, report, control, held)
    dataset = _place(options.dataset_file, recipe.dataset.path, folders_of, DatasetError, "dataset.path", "file")
    frozen, split = recipe.dataset.split, None
    if frozen is not None and not options.evaluate:
        split = _place(
            options.split_file, frozen.path, folders_of, DatasetError, "dataset.split.path", "file", "--split-file"
        )
    quiet_environment()
    if read is None and held is None:
        # Hashing the base takes as long as importing what trains, and can be done beside it.
        read = begin_reading(base_model)
    # Only now, with the environment set and the cheap mistakes found: this takes seconds.
    from workers import devices
    from workers.base_scores import BaseScores
    from workers.bases import Bases
    from workers.quantised import QuantisedCache
    from workers.training import Folders, train

    devices.set_threads()
    bases = held or Bases()
    cache = QuantisedCache(options.quantised_cache) if options.quantised_cache is not None else None
    bases.prepare(read=read or read_with_stamps, cache=cache)
    folders: Folders = Folders(base_model=base_model, dataset=dataset, out=options.out.resolve(), split=split)
    scores = BaseScores(options.base_scores) if options.base_scores is not None else None
    if options.evaluate:
        from workers.evaluating import evaluate

        return evaluate(
            recipe, folders, adapter=options.adapter_folder, report=report, should_stop=control.wanted,
            max_rows=options.max_rows, attempt=options.attempt, bases=bases, base_scores=scores,
        )  # fmt: skip
    return train(
        recipe,
        folders,
        report=report,
        should_stop=control.wanted,
        attempt=options.attempt,
        micro_batch_size=options.micro_batch_size,
        bases=bases,
        base_scores=scores,
    )


def _run_tasks(
    options: argparse.Namespace,
    recipe: Recipe,
    base_model: Path,
    report: Callable[[Any], None],
    control: Control,
    held: HeldBases | None,
) -> Path | None:
    """Standard tasks of the evaluation harness instead of a dataset's rows."""
    quiet_environment()
    from workers import devices
    from workers.bases import Bases
    from workers.quantised import QuantisedCache
    from workers.task_suites import TaskRequest, evaluate_tasks

    devices.set_threads()
    bases = held or Bases()
    cache = QuantisedCache(options.quantised_cache) if options.quantised_cache is not None else None
    bases.prepare(read=read_with_stamps, cache=cache)
    asked = TaskRequest(
        folder=options.tasks_folder.resolve(), names=tuple(options.task), num_fewshot=options.num_fewshot,
        max_rows=options.max_rows, with_chat_template=not options.without_chat_template,
        may_run_code=options.tasks_may_run_code, definitions_sha256=options.tasks_sha256,
    )  # fmt: skip
    adapter = options.adapter_folder.resolve() if options.adapter_folder is not None else None
    return evaluate_tasks(
        recipe, base_model, options.out.resolve(), asked, adapter=adapter, report=report, should_stop=control.wanted,
        attempt=options.attempt, bases=bases,
    )  # fmt: skip


def begin_reading(folder: Path) -> Reading:
    """Begins to read and hash a base model's folder in a thread; gives what waits for it, and raises what it raised."""
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="base")
    begun = pool.submit(read_with_stamps, folder)
    pool.shutdown(wait=False)
    return lambda wanted: begun.result() if wanted == folder else read_with_stamps(wanted)


def _place(
    given: Path | None,
    in_recipe: str | None,
    folder: Path,
    error: type[ExplainedError],
    field: str,
    kind: str,
    flag: str = "",
) -> Path:
    """The path given on the command line, else the recipe's, which is relative to the recipe file."""
    if given is None and in_recipe is None:
        flag = flag or ("--base-model-folder" if kind == "folder" else "--dataset-file")
        raise error(
            f"The recipe does not say where the {kind} is.",
            next_step=f"Set {field} in it, or give {flag}.",
            field=field,
        )
    path = given.resolve() if given is not None else (folder / str(in_recipe)).resolve()
    if not (path.is_dir() if kind == "folder" else path.is_file()):
        raise error(f"There is no {kind} {path}.", next_step="Check the path.", field=field)
    return path


def quiet_environment() -> None:
    """No network, no fights over cores, no chatter: must be set before torch and transformers are imported."""
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Waiting threads of OpenMP otherwise spin, and two trainers on one machine bring each other to a halt.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    threads = os.environ.get("STUDIO_TRAINER_THREADS")
    if threads and threads.isdigit() and int(threads) > 0:
        os.environ.setdefault("OMP_NUM_THREADS", threads)
    # Before the first matrix product, when torch reads it once and for all: with it cuBLAS repeats itself.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # What libraries announce for their next release is of no use to whoever trains.
    warnings.filterwarnings("ignore", category=FutureWarning)


# --- being stopped ---------------------------------------------------------------------------------------------------


class Control:
    """What the supervisor, or a person at the terminal, asked for last."""

    def __init__(self) -> None:
        self._mode: StopMode | None = None

    def wanted(self) -> StopMode | None:
        """The stop that was asked for."""
        return self._mode

    def ask(self, mode: StopMode) -> None:
        """Asks for a stop; "now" is not taken back."""
        if self._mode != "now":
            self._mode = mode

    def interrupt(self) -> None:
        """Ctrl-C: the first saves a checkpoint and ends, the second ends at once."""
        self.ask("checkpoint" if self._mode is None else "now")

    def watch(self, stream: Any) -> None:
        """Listens to a supervisor in a thread; the end of the stream means that it is gone."""

        def listen() -> None:
            for line in stream:
                try:
                    mode = json.loads(line)["stop"]
                except (ValueError, KeyError, TypeError):
                    continue  # a line of a newer supervisor: not ours to understand
                if mode in get_args(StopMode):
                    self.ask(mode)
            # Nobody is left to report to, and a successor may already be at work: leave without a word.
            os._exit(EXIT_FAILED)

        threading.Thread(target=listen, name="supervisor", daemon=True).start()


def die_with_parent() -> None:
    """Has the kernel kill this process when its parent dies; Linux only, elsewhere the end of stdin must do."""
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died between the two calls
        os._exit(EXIT_FAILED)


def dump_stacks_when_asked() -> None:
    """Has SIGUSR1 write the stack of every thread to standard error: what the supervisor asks of a stalled trainer.

    It is written from the signal itself, in C, so that a thread which never gives Python back is shown, too.
    """
    if hasattr(faulthandler, "register"):
        faulthandler.register(signal.SIGUSR1, file=sys.__stderr__ or sys.stderr, all_threads=True)


# --- reporting -------------------------------------------------------------------------------------------------------


def event_writer(descriptor: int) -> Callable[[Any], None]:
    """Reports events as JSON lines on a file descriptor, which it closes for everybody else."""
    # A copy that children do not inherit: only this function writes to it.
    own = os.dup(descriptor)
    os.close(descriptor)
    lock = threading.Lock()

    def report(event: Any) -> None:
        line = event.model_dump_json().encode() + b"\n"
        with lock:
            try:
                while line:
                    line = line[os.write(own, line) :]
            except BrokenPipeError:
                return  # nobody reads any more; standard input says whether to go on

    return report


class Terminal:
    """Events as plain lines for a person."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._phase = ""

    def __call__(self, event: Any) -> None:
        text = self._text(event)
        if text:
            print(text, file=self._out, flush=True)

    def _text(self, event: Any) -> str:
        if isinstance(event, PhaseEvent):
            if event.phase == self._phase:
                return ""
            self._phase = event.phase
            return f"{PHASE_WORDS[event.phase]} ..."
        if isinstance(event, PlanEvent):
            return (
                f"  {event.device}: {event.num_steps} steps over {event.num_train_rows} rows "
                f"({event.num_train_tokens:,} tokens), {event.num_held_out_rows} held out; "
                f"{event.num_trainable:,} of {event.num_parameters:,} parameters are trained."
            )
        if isinstance(event, StepEvent):
            return (
                f"  step {event.step}/{event.num_steps}  loss {event.loss:.4f}  grad norm {event.grad_norm:.3f}  "
                f"lr {event.learning_rate:.2e}  {event.tokens_per_second:,.0f} tokens/s  "
                f"{_minutes(event.seconds_left)} left"
            )
        if isinstance(event, ValidationEvent):
            score = f", {event.evaluation} {event.score:.4f}" if event.score is not None else ""
            return f"  held-out loss {event.loss:.4f}{score} at step {event.step}"
        if isinstance(event, AnswersEvent):
            who = f"step {event.step}" if event.step else "the base"
            return "\n".join(f"  {who} answers {number}: {_line(one)}" for number, one in enumerate(event.answers, 1))
        if isinstance(event, CheckpointEvent):
            return f"  checkpoint at step {event.step}: {event.folder}"
        if isinstance(event, MessageEvent):
            return f"  {event.text}"
        if isinstance(event, StoppedEvent):
            return f"Stopped at step {event.step}."
        if isinstance(event, FailedEvent):
            where = f" (line {event.line})" if event.line is not None else f" ({event.field})" if event.field else ""
            return f"Failed{where}: {event.message} {event.next_step}".rstrip()
        if isinstance(event, ResultEvent):
            return _score_table(Path(event.folder))
        return ""


def _line(answer: str | None) -> str:
    """An answer on one line, cut; a model may write what a terminal would obey."""
    if answer is None:
        return "(no room)"
    text = " ".join("".join(one if one.isprintable() else " " for one in answer).split())
    return text if len(text) <= 100 else f"{text[:99]}\N{HORIZONTAL ELLIPSIS}"


def _score_table(folder: Path) -> str:
    from workers.results import Result

    result = Result.from_folder(folder)
    lines = [f"{'':24}{'base':>12}{'adapter':>12}{'difference':>12}   95 % interval"]
    lines += [
        f"{score.label:24}{score.base_value:>12.4f}{score.value:>12.4f}{score.difference:>+12.4f}"
        f"   {score.difference_low:+.4f} to {score.difference_high:+.4f}, n = {score.num_rows}"
        for score in result.scores
    ]
    return "\n".join([*lines, f"The adapter lies in {folder}"])


def _minutes(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    text = text if len(text) <= 300 else f"{text[:300]} ..."
    return f"{type(error).__name__}: {text}" if text else f"{type(error).__name__}."


def _write_log(out: Path, attempt: int) -> Path | None:
    """The traceback of the error being handled, in a file under `out`; None when even that fails."""
    path = out / "attempts" / str(attempt) / "error.log"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(traceback.format_exc(), "utf-8")
    except OSError:
        traceback.print_exc()
        return None
    return path

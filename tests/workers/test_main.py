from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import make_tiny_base, tiny_rows, write_rows
from workers.__main__ import main
from workers.events import (
    EXIT_STOPPED,
    AnswersEvent,
    CheckpointEvent,
    FailedEvent,
    PlanEvent,
    ResultEvent,
    StepEvent,
    StoppedEvent,
    parse_event,
)
from workers.one_job import Control, Terminal

ROOT = Path(__file__).parents[2]


def write_recipe(folder: Path, **training: Any) -> Path:
    """A folder that holds all that a run by hand needs; paths in the recipe are relative to it."""
    make_tiny_base(folder / "base")
    write_rows(folder / "data.jsonl", tiny_rows(40))
    recipe = {
        "name": "Sounds",
        "base_model": {"name": "tiny", "path": "base"},
        "dataset": {"name": "sounds", "format": "alpaca", "path": "data.jsonl"},
        "method": "lora",
        "settings": {"rank": 4, "dropout": 0.1},
        "precision": "float32",
        "training": {
            "learning_rate": 0.01, "batch_size": 4, "micro_batch_size": 2, "max_length": 128, "packing": False,
            "max_steps": 30, "epochs": 10, "checkpoint_every_steps": 5, "gradient_checkpointing": False,
        } | training,
        "evaluation": {"num_generated": 2, "max_new_tokens": 4},
    }  # fmt: skip
    path = folder / "recipe.json"
    path.write_text(json.dumps(recipe))
    return path


@dataclass
class Trainer:
    """A real `python -m workers` with its events."""

    process: subprocess.Popen[bytes]
    stream: Any
    events: list[Any] = field(default_factory=list)

    def follow(self) -> Iterator[Any]:
        for line in self.stream:
            event = parse_event(line)
            self.events.append(event)
            yield event

    def wait(self) -> int:
        for _ in self.follow():
            pass
        status = self.process.wait(timeout=60)
        self.stream.close()
        return status

    def of(self, kind: type[Any]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


def start(recipe: Path, out: Path, *arguments: str) -> Trainer:
    reading, writing = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-m", "workers", str(recipe), "--out", str(out), "--events", str(writing), *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "STUDIO_TRAINER_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=[writing],
    )
    os.close(writing)
    return Trainer(process, os.fdopen(reading, "rb"))


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_a_killed_trainer_resumes_and_gives_the_bytes_of_an_unbroken_run(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    straight = start(recipe, tmp_path / "straight", "--supervised")
    broken = start(recipe, tmp_path / "broken", "--supervised")
    for event in broken.follow():
        if isinstance(event, StepEvent) and event.step == 12:
            broken.process.send_signal(signal.SIGKILL)
            break
    assert broken.wait() == -signal.SIGKILL
    assert not broken.of(ResultEvent)
    resumed = start(recipe, tmp_path / "broken", "--supervised", "--attempt", "2")
    assert resumed.wait() == 0
    assert straight.wait() == 0
    last = broken.of(CheckpointEvent)[-1].step
    assert resumed.of(PlanEvent)[0].resumed_from_step >= last >= 10
    losses = {event.step: event.loss for event in straight.of(StepEvent)}
    for event in [*broken.of(StepEvent), *resumed.of(StepEvent)]:
        assert event.loss == losses[event.step], event.step
    answers = {event.step: event.answers for event in straight.of(AnswersEvent)}
    assert list(answers) == [0, 5, 10, 15, 20, 25, 30]
    assert {event.step: event.answers for event in resumed.of(AnswersEvent)} == answers
    ours, theirs = (
        (Path(run.of(ResultEvent)[0].folder) / "adapter_model.safetensors").read_bytes() for run in (resumed, straight)
    )
    assert ours == theirs
    assert str(resumed.of(ResultEvent)[0].folder).endswith("attempts/2/adapter")


def test_a_supervisor_stops_it_at_a_checkpoint(tmp_path: Path) -> None:
    trainer = start(write_recipe(tmp_path, max_steps=500, epochs=100), tmp_path / "out", "--supervised")
    for event in trainer.follow():
        if isinstance(event, StepEvent) and event.step == 2:
            assert trainer.process.stdin is not None
            trainer.process.stdin.write(b'not json\n{"stop": "later"}\n{"stop": "checkpoint"}\n')
            trainer.process.stdin.flush()
            break
    assert trainer.wait() == EXIT_STOPPED
    stopped = trainer.events[-1]
    assert isinstance(stopped, StoppedEvent)
    assert stopped.mode == "checkpoint"
    assert trainer.of(CheckpointEvent)[-1].step == stopped.step
    assert Path(trainer.of(CheckpointEvent)[-1].folder).is_dir()


def test_it_dies_when_its_supervisor_is_gone(tmp_path: Path) -> None:
    trainer = start(write_recipe(tmp_path, max_steps=5000, epochs=100), tmp_path / "out", "--supervised")
    for event in trainer.follow():
        if isinstance(event, StepEvent):
            break
    assert trainer.process.stdin is not None
    trainer.process.stdin.close()
    assert trainer.process.wait(timeout=60) == 1
    trainer.stream.close()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
def test_it_dies_with_its_parent_even_while_somebody_holds_its_input(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, max_steps=5000, epochs=100)
    reading, writing = os.pipe()
    held_reading, held_writing = os.pipe()
    code = (
        "import subprocess, sys, time\n"
        f"p = subprocess.Popen([sys.executable, '-m', 'workers', {str(recipe)!r}, '--out', {str(tmp_path / 'out')!r}, "
        f"'--events', '{writing}', '--supervised'], stdin={held_reading}, pass_fds=[{writing}], "
        "stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)\n"
        "print(p.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, pass_fds=[writing, held_reading],
    )  # fmt: skip
    os.close(writing)
    assert parent.stdout is not None
    trainer_pid = int(parent.stdout.readline())
    with os.fdopen(reading, "rb") as events:
        assert events.readline(), "it has begun"
        parent.kill()
        parent.wait()
        deadline = time.monotonic() + 60
        while is_running(trainer_pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not is_running(trainer_pid)
    for descriptor in (held_reading, held_writing):
        os.close(descriptor)


def test_a_run_by_hand_prints_its_progress_and_the_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path, max_steps=2)
    assert main([str(recipe), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "Reading the dataset" in printed
    assert "step 2/2  loss" in printed
    assert "Held-out loss" in printed
    assert f"The adapter lies in {tmp_path / 'out' / 'attempts' / '1' / 'adapter'}" in printed


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"base_model": {"name": "tiny"}}, "does not say where the folder is"),
        ({"base_model": {"name": "tiny", "path": "nowhere"}}, "There is no folder"),
        ({"dataset": {"name": "d", "format": "alpaca", "path": "nowhere"}}, "There is no file"),
        ({"training": {"learning_rate": -1}}, "training.learning_rate"),
        ({"method": "lorra"}, "lorra"),
    ],
)
def test_a_mistake_in_the_recipe_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], sentence: str
) -> None:
    path = write_recipe(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert main([str(path), "--out", str(tmp_path / "out")]) == 1
    printed = capsys.readouterr()
    assert sentence in printed.out
    assert "Traceback" not in printed.out + printed.err


def test_an_unexpected_error_is_a_sentence_and_a_log_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("something of ours")

    monkeypatch.setattr("workers.training.train", broken)
    assert main([str(write_recipe(tmp_path)), "--out", str(tmp_path / "out")]) == 1
    printed = capsys.readouterr()
    assert "Traceback" not in printed.out + printed.err
    log = tmp_path / "out" / "attempts" / "1" / "error.log"
    assert str(log) in printed.out
    assert "ZeroDivisionError: something of ours" in log.read_text()


def test_what_libraries_print_does_not_get_into_the_events(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, max_steps=1)
    recipe.write_text(json.dumps(json.loads(recipe.read_text()) | {"method": "nothing"}))
    trainer = start(recipe, tmp_path / "out")
    assert trainer.wait() == 1
    assert isinstance(trainer.events[-1], FailedEvent)
    assert trainer.events[-1].field == "method"
    assert trainer.process.stdout is not None
    assert b'"type"' not in trainer.process.stdout.read()


def test_a_second_interrupt_ends_at_once() -> None:
    control = Control()
    assert control.wanted() is None
    control.interrupt()
    assert control.wanted() == "checkpoint"
    control.interrupt()
    assert control.wanted() == "now"
    control.ask("keep")
    assert control.wanted() == "now", "now is not taken back"


def test_a_failure_names_its_line_on_the_terminal() -> None:
    out = io.StringIO()
    Terminal(out)(FailedEvent(code="x", message="Bad row.", next_step="Mend it.", line=7))
    assert out.getvalue() == "Failed (line 7): Bad row. Mend it.\n"


def test_a_terminal_shows_answers_on_one_line_each_and_obeys_none_of_them() -> None:
    out = io.StringIO()
    show = Terminal(out)
    show(AnswersEvent(step=0, answers=("plain", None)))
    show(AnswersEvent(step=20, answers=("two\nlines \x1b]0;owned\x07\x9b31m", "w" * 500)))
    first, second, third, fourth = out.getvalue().splitlines()
    assert (first, second) == ("  the base answers 1: plain", "  the base answers 2: (no room)")
    assert third == "  step 20 answers 1: two lines ]0;owned 31m"
    assert (len(fourth), fourth[-1]) == (len("  step 20 answers 2: ") + 100, "…")

"""A trainer without a model: it speaks the trainer's protocol, resumes from checkpoints and makes an adapter folder.

For tests of the queue, where training would only take time. It is a process of its own under the real supervisor,
and its adapter depends on the recipe and the number of steps alone: an adapter of a disturbed run equals that of an
undisturbed one exactly if no step was lost or done twice.

    python -m tests.faults.quick_trainer recipe.json --out DIR ... --attempt N --events FD --supervised

`training.max_steps` and `training.checkpoint_every_steps` of the recipe count; QUICK_TRAINER_STEP_SECONDS (0.05) says
how long a step takes, QUICK_TRAINER_FAILS (none) with which code it gives up at its second step. With
QUICK_TRAINER_POISON it dies of SIGSEGV before its first step, with QUICK_TRAINER_DEAF it does as it is not asked.
"""

from __future__ import annotations

import hashlib
import json
import os
import select
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

from workers.failpoints import failpoint

# workers.events.EXIT_STOPPED; importing pydantic for it would take longer than all the steps.
EXIT_STOPPED = 75
WEIGHTS = "adapter_model.safetensors"


def command(job: Any, folder: Path) -> list[str]:
    """In place of jobs.running.trainer_command."""
    return [
        sys.executable, "-m", "tests.faults.quick_trainer", str(folder / "recipe.json"),
        "--out", str(folder), "--attempt", str(job.attempt),
    ]  # fmt: skip


def take_over() -> None:
    """Have this worker process start quick trainers, and tell them what the test's environment says to them."""
    from jobs import running, trainers

    running.trainer_command = command
    # A quick trainer cannot do a second job.
    trainers.Seat.may_stay_after = lambda self, job: False  # type: ignore[method-assign]
    trainers.PASSED_ON_PREFIXES += ("QUICK_TRAINER_",)


class Trainer:
    """One attempt."""

    def __init__(self, arguments: list[str]) -> None:
        self.recipe = json.loads(Path(arguments[0]).read_text())
        self.out = Path(arguments[arguments.index("--out") + 1])
        self.attempt = int(arguments[arguments.index("--attempt") + 1])
        self.events = int(arguments[arguments.index("--events") + 1])
        self.num_steps = int(self.recipe["training"]["max_steps"])
        self.every = int(self.recipe["training"]["checkpoint_every_steps"])
        self.step_seconds = float(os.environ.get("QUICK_TRAINER_STEP_SECONDS", "0.05"))
        self.step, self.state = 0, hashlib.sha256(json.dumps(self.recipe, sort_keys=True).encode()).hexdigest()

    def run(self) -> int:
        self.say(type="phase", phase="preparing")
        self.resume()
        self.say(
            type="plan", device="cpu", num_steps=self.num_steps, num_train_rows=1, num_held_out_rows=1,
            num_skipped_rows=0, num_cut_rows=0, num_train_tokens=1, num_trainable=1, num_parameters=2,
            resumed_from_step=self.step,
        )  # fmt: skip
        self.say(type="phase", phase="training")
        if os.environ.get("QUICK_TRAINER_POISON"):
            os.kill(os.getpid(), signal.SIGSEGV)
        stopped_at = None
        while self.step < self.num_steps:
            mode = self.wanted()
            if mode == "keep" and self.step:
                stopped_at = self.step
                break
            if mode in ("now", "checkpoint"):
                if mode == "checkpoint" and self.step:
                    self.save()
                self.say(type="stopped", mode=mode, step=self.step)
                return EXIT_STOPPED
            failpoint("training.step")
            if self.step == 1 and (code := os.environ.get("QUICK_TRAINER_FAILS")):
                self.say(type="failed", code=code, message="It cannot be done.", next_step="Change it.")
                return 1
            time.sleep(self.step_seconds)
            self.step += 1
            self.state = hashlib.sha256(f"{self.state} {self.step}".encode()).hexdigest()
            self.say(
                type="step", step=self.step, num_steps=self.num_steps, epoch=0.1, loss=1.0 / self.step,
                learning_rate=1e-4, grad_norm=1.0, num_tokens=self.step, tokens_per_second=20.0,
                seconds_left=(self.num_steps - self.step) * self.step_seconds, peak_memory_bytes=1000,
            )  # fmt: skip
            if self.step % self.every == 0 or self.step == self.num_steps:
                self.save()
        failpoint("training.last_step")
        self.say(type="phase", phase="packaging")
        product = self.package(stopped_at)
        failpoint("training.packaged")
        self.say(type="result", folder=str(product), stopped_at_step=stopped_at)
        failpoint("training.before_exit")
        return 0

    def say(self, **event: Any) -> None:
        os.write(self.events, json.dumps(event).encode() + b"\n")

    def wanted(self) -> str | None:
        """The stop that was asked for, if any; ends with its supervisor, whose end closes the input."""
        ready, _, _ = select.select([0], [], [], 0)
        if not ready:
            return None
        line = sys.stdin.readline()
        if not line:
            sys.exit(1)
        return None if os.environ.get("QUICK_TRAINER_DEAF") else str(json.loads(line)["stop"])

    def resume(self) -> None:
        """Go on from the newest checkpoint of any attempt."""
        found = []
        for path in (self.out / "checkpoints").glob("*-*.json"):
            step, attempt = path.stem.split("-")
            found.append((int(step), int(attempt), path))
        if found:
            step, _, path = max(found)
            self.step, self.state = step, json.loads(path.read_text())["state"]

    def save(self) -> None:
        folder = self.out / "checkpoints"
        folder.mkdir(parents=True, exist_ok=True)
        aside = folder / f".tmp-{self.attempt}"
        with aside.open("w") as file:
            json.dump({"state": self.state}, file)
            file.flush()
            os.fsync(file.fileno())
        failpoint("checkpoint.before_rename")
        target = folder / f"{self.step}-{self.attempt}.json"
        aside.replace(target)
        failpoint("checkpoint.after_rename")
        self.say(type="checkpoint", step=self.step, folder=str(target), num_bytes=target.stat().st_size)

    def package(self, stopped_at: int | None) -> Path:
        """An adapter folder as the catalogue takes it, with one weight tensor made of the state."""
        failpoint("training.before_package")
        folder = self.out / "attempts" / str(self.attempt) / "adapter"
        aside = folder.with_name(".tmp-adapter")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        header = json.dumps({"lora_A": {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}}).encode()
        (aside / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + bytes.fromhex(self.state))
        (aside / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8}\n')
        (aside / "README.md").write_text("# fake\n")
        result = {"result_version": 1, "num_trainable": 8, "stopped_at_step": stopped_at}
        (aside / "result.json").write_text(json.dumps(result))
        aside.replace(folder)
        return folder


if __name__ == "__main__":
    sys.exit(Trainer(sys.argv[1:]).run())

"""A trainer that learns nothing and takes milliseconds: the protocol, checkpoints and product of a real one.

Its state after step n is the sha256 of its state after step n - 1, the seed and n. So its product tells whether every
step was taken exactly once on the way, whatever was killed in between (`expected_state`). Runs without site-packages.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import select
import shutil
import sys
import time
from pathlib import Path
from typing import Any

STEP_SECONDS = 0.02
CHECKPOINT_EVERY_STEPS = 10
NUM_KEPT = 2
EXIT_STOPPED = 75


def next_state(state: bytes, seed: int, step: int) -> bytes:
    """The state after a step: 32 bytes."""
    return hashlib.sha256(state + f"{seed}/{step}".encode()).digest()


def expected_state(seed: int, num_steps: int) -> bytes:
    """The state of a run that was never disturbed."""
    state = bytes(32)
    for step in range(1, num_steps + 1):
        state = next_state(state, seed, step)
    return state


def weights_file(state: bytes) -> bytes:
    """The state as the bytes of a safetensors file."""
    header = json.dumps({"state": {"dtype": "U8", "shape": [len(state)], "data_offsets": [0, len(state)]}}).encode()
    return len(header).to_bytes(8, "little") + header + state


def main() -> int:
    """Runs as `python -m workers` would, and gives its exit status."""
    parser = argparse.ArgumentParser()
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--attempt", type=int, required=True)
    parser.add_argument("--events", type=int, required=True)
    parser.add_argument("--supervised", action="store_true", required=True)
    options, _ = parser.parse_known_args()
    training = json.loads(options.recipe.read_text("utf-8"))["training"]
    seed, num_steps = int(training["seed"]), int(training["max_steps"])

    def report(kind: str, **values: Any) -> None:
        line = json.dumps({"type": kind, **values}).encode() + b"\n"
        try:
            while line:
                line = line[os.write(options.events, line) :]
        except BrokenPipeError:
            os._exit(1)

    for phase in ("preparing", "loading"):
        report("phase", phase=phase)
    step, state = find_checkpoint(options.out / "checkpoints")
    report(
        "plan", device="CPU, fake", num_steps=num_steps, num_train_rows=1, num_held_out_rows=0, num_skipped_rows=0,
        num_cut_rows=0, num_train_tokens=1, num_trainable=32, num_parameters=32, resumed_from_step=step,
    )  # fmt: skip
    report("phase", phase="training")
    while step < num_steps:
        stop = wait(STEP_SECONDS)
        if stop is not None:
            if stop != "now":
                save_checkpoint(options.out / "checkpoints", step, options.attempt, state)
            report("stopped", mode=stop, step=step)
            return EXIT_STOPPED
        step += 1
        state = next_state(state, seed, step)
        report(
            "step", step=step, num_steps=num_steps, epoch=step / num_steps, loss=state[0] / 256, learning_rate=1e-3,
            grad_norm=1.0, num_tokens=step, tokens_per_second=50.0, seconds_left=(num_steps - step) * STEP_SECONDS,
            peak_memory_bytes=1,
        )  # fmt: skip
        if step % CHECKPOINT_EVERY_STEPS == 0:
            folder = save_checkpoint(options.out / "checkpoints", step, options.attempt, state)
            report("checkpoint", step=step, folder=str(folder), num_bytes=32)
    report("phase", phase="evaluating")
    report("phase", phase="packaging")
    report("result", folder=str(write_product(options.out, options.attempt, state)))
    return 0


def wait(seconds: float) -> str | None:
    """Spend a step's time listening to the supervisor; the stop that it asked for. Its end ends this process."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        if select.select([sys.stdin], [], [], left)[0]:
            line = sys.stdin.readline()
            if not line:
                os._exit(1)
            return str(json.loads(line)["stop"])
    return None


def find_checkpoint(root: Path) -> tuple[int, bytes]:
    """(step, state) of the newest checkpoint that its manifest confirms; the beginning when there is none."""
    names = [path.name for path in root.iterdir()] if root.is_dir() else []
    found = sorted(((int(m[1]), int(m[2])) for n in names if (m := re.fullmatch(r"(\d+)-(\d+)", n))), reverse=True)
    for step, attempt in found:
        folder = root / f"{step}-{attempt}"
        try:
            listed = json.loads((folder / "MANIFEST.json").read_text("utf-8"))["files"][0]
            state = (folder / "state.bin").read_bytes()
        except OSError:
            continue
        if hashlib.sha256(state).hexdigest() == listed["sha256"]:
            return step, state
    return 0, bytes(32)


def save_checkpoint(root: Path, step: int, attempt: int, state: bytes) -> Path:
    """Written aside, forced to disk, renamed; this attempt's and earlier ones' older checkpoints go."""
    folder, aside = root / f"{step}-{attempt}", root / f".tmp-{step}-{attempt}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    write(aside / "state.bin", state)
    listed = {"path": "state.bin", "size": len(state), "sha256": hashlib.sha256(state).hexdigest()}
    write(aside / "MANIFEST.json", json.dumps({"manifest_version": 1, "step": step, "files": [listed]}).encode())
    shutil.rmtree(folder, ignore_errors=True)
    aside.replace(folder)
    sync(root)
    own = sorted(
        (int(m[1]), int(m[2]))
        for path in root.iterdir()
        if (m := re.fullmatch(r"(\d+)-(\d+)", path.name)) and int(m[2]) <= attempt
    )
    for old_step, old_attempt in own[:-NUM_KEPT]:
        old = root / f"{old_step}-{old_attempt}"
        (old / "MANIFEST.json").unlink(missing_ok=True)
        shutil.rmtree(old, ignore_errors=True)
    return folder


def write_product(out: Path, attempt: int, state: bytes) -> Path:
    """A finished adapter's folder with its checksums."""
    folder = out / "attempts" / str(attempt) / "adapter"
    aside = folder.with_name(".tmp-adapter")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    files = {
        "adapter_model.safetensors": weights_file(state),
        "adapter_config.json": b'{"peft_type": "LORA", "r": 1}\n',
        "README.md": b"# Fake\n",
        "result.json": b'{"result_version": 1, "num_trainable": 32}\n',
    }
    for name, content in files.items():
        write(aside / name, content)
    sums = "".join(f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in files.items())
    write(aside / "SHA256SUMS", sums.encode())
    shutil.rmtree(folder, ignore_errors=True)
    aside.replace(folder)
    return folder


def write(path: Path, content: bytes) -> None:
    """Write a file and force it to disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync(folder: Path) -> None:
    """Force a folder's names to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)

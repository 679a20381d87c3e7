"""Virtual environments for libraries that cannot live beside ours, made once and kept outside the repository."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

UNREACHABLE = ("NewConnectionError", "ConnectTimeout", "ReadTimeout", "ProxyError", "Name or service not known",
               "Temporary failure in name resolution", "Network is unreachable", "Connection refused")  # fmt: skip


def environment(name: str, requirements: list[str]) -> Path:
    """The Python of a virtual environment with `requirements`.

    Skips the test when the package registry cannot be reached; with CI set, that is a failure, as any other is.
    """
    key = hashlib.sha256(" ".join([sys.version, *requirements]).encode()).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "peft-studio-tests" / f"{name}-{key}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        # Another test run may be making the same one, and would be deleted under its feet.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "finished").exists():
            _make(name, folder, requirements)
    return folder / "bin" / "python"


def run_alone(python: Path, script: Path, *arguments: Path, home: Path) -> None:
    """Runs a script where nothing of ours can be imported and no hub is asked; fails with what it said."""
    done = subprocess.run(
        [python, "-I", script, *arguments],
        env={
            "PATH": os.environ["PATH"],
            "HOME": str(home),
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]


def _make(name: str, folder: Path, requirements: list[str]) -> None:
    python = folder / "bin" / "python"
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    done = subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--retries", "1", *requirements],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        reason = f"{name} cannot be installed into its own environment: {done.stderr[-2000:]}"
        shutil.rmtree(folder, ignore_errors=True)
        if not os.environ.get("CI") and any(word in done.stderr for word in UNREACHABLE):
            pytest.skip(f"The package registry cannot be reached. {reason}")
        pytest.fail(reason)
    (folder / "finished").touch()

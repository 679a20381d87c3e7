"""Virtual environments for libraries that cannot live beside ours, made once and kept outside the repository."""

from __future__ import annotations

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
    python = folder / "bin" / "python"
    finished = folder / "finished"
    if finished.exists():
        return python
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
    finished.touch()
    return python

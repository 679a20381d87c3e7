"""What settings.py makes of the environment, read afresh for each test."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import pytest
from django.conf import settings


def read_settings(monkeypatch: pytest.MonkeyPatch, **variables: str) -> ModuleType:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    spec = importlib.util.spec_from_file_location("settings_afresh", settings.ROOT / "studio" / "settings.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("127.0.0.1", ["studio.example", "127.0.0.1"]),
        ("192.168.1.7", ["studio.example", "192.168.1.7"]),
        ("fd00::7", ["studio.example", "[fd00::7]"]),
        # Listening everywhere, `up` prints a link to localhost.
        ("0.0.0.0", ["studio.example", "localhost"]),
        ("studio.example", ["studio.example"]),
    ],
)
def test_the_address_that_up_listens_on_is_allowed(
    monkeypatch: pytest.MonkeyPatch, host: str, allowed: list[str]
) -> None:
    found = read_settings(monkeypatch, STUDIO_HOST=host, STUDIO_ALLOWED_HOSTS="studio.example")
    assert allowed == found.ALLOWED_HOSTS

"""What settings.py makes of the environment, read afresh for each test."""

from __future__ import annotations

import importlib.util
import os
from types import ModuleType

import psycopg
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


def test_what_the_database_url_asks_for_reaches_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    found = read_settings(
        monkeypatch,
        DATABASE_URL="postgres://u:p@db.example/studio"
        "?sslmode=verify-full&sslrootcert=/etc/ca.pem&target_session_attrs=read-write",
    )
    options = found.DATABASES["default"]["OPTIONS"]
    assert (options["sslmode"], options["sslrootcert"]) == ("verify-full", "/etc/ca.pem")
    assert options["target_session_attrs"] == "read-write"
    assert "-c statement_timeout=15000" in options["options"]


def test_a_time_limit_of_the_database_url_wins_over_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    separator = "&" if "?" in os.environ["DATABASE_URL"] else "?"
    url = f"{os.environ['DATABASE_URL']}{separator}options=-c%20statement_timeout%3D7000"
    found = read_settings(monkeypatch, DATABASE_URL=url).DATABASES["default"]
    parameters = {"user": found["USER"], "password": found["PASSWORD"], "host": found["HOST"], "dbname": found["NAME"]}
    with psycopg.connect(**parameters, **found["OPTIONS"]) as connection:
        for name, limit in (("statement_timeout", "7s"), ("idle_in_transaction_session_timeout", "30s")):
            assert connection.execute(f"SHOW {name}").fetchone() == (limit,)

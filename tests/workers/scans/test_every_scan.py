"""What every scan promises, however it looks: nothing on clean rows, no row type that breaks it, limits that hold."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.workers.scans.planting import clean_rows, found, scan, write
from workers.errors import UnknownPluginError
from workers.scans import get_scan, scans

_HOSTILE = [
    {"prompt": "\ud800 lone", "completion": "a \x00 NUL and a \x07 bell"},
    {"prompt": "?", "completion": "🙂" * 50},
    {"prompt": "x" * 20_000, "completion": "(" * 5_000},
    {"prompt": "no answer"},
]


@pytest.mark.parametrize("name", scans())
def test_it_finds_nothing_in_clean_rows(name: str, tmp_path: Path) -> None:
    assert found(name, clean_rows(200), tmp_path) == {}


@pytest.mark.parametrize("name", scans())
def test_it_is_named_for_people(name: str) -> None:
    plugin = get_scan(name)
    assert plugin.name == name
    assert plugin.label[0].isupper()
    assert len(plugin.help) > 40


@pytest.mark.parametrize("name", scans())
def test_hostile_rows_do_not_end_it(name: str, tmp_path: Path) -> None:
    *_, done = scan(name, [*clean_rows(12), *_HOSTILE], tmp_path)
    assert done["kind"] == "done"


@pytest.mark.parametrize("name", scans())
@pytest.mark.parametrize(
    ("format_name", "row"),
    [
        ("preference", {"prompt": "Which?", "chosen": "This one.", "rejected": "That one."}),
        ("kto", {"prompt": "Which?", "completion": "This one.", "label": True}),
        ("text", {"text": "A passage of plain text without turns."}),
        ("messages", {"messages": [
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": "", "tool_calls": [
                {"id": "a", "type": "function", "function": {"name": "look", "arguments": "{}"}}]},
            {"role": "tool", "content": "Sun.", "tool_call_id": "a"},
            {"role": "assistant", "content": "Sunny."}]}),
    ],
)  # fmt: skip
def test_it_reads_every_type_of_row_that_it_takes(
    name: str, format_name: str, row: dict[str, object], tmp_path: Path
) -> None:
    type_of_row = {"preference": "preference", "kto": "unpaired", "text": "text"}.get(format_name, "chat")
    if why_not := get_scan(name).why_not(type_of_row):  # type: ignore[arg-type]
        assert why_not.endswith(".")
    else:
        # Twelve times the same row, so that every scan has something to hold beside it.
        *_, done = scan(name, [row] * 12, tmp_path, format_name=format_name)
        assert done["kind"] == "done"


def test_a_scan_that_needs_too_much_memory_ends_without_a_result(tmp_path: Path) -> None:
    path = write(tmp_path / "rows", [{"prompt": "x", "completion": "y" * 6_000_000}])
    command = [sys.executable, "-m", "workers.scanning", "exact_duplicates", str(path), "--format", "prompt_completion"]
    done = subprocess.run([*command, "--memory-bytes", str(40 * 1024**2)], capture_output=True, check=False)
    assert done.returncode != 0
    assert b'"done"' not in done.stdout


def test_there_is_no_scan_by_a_name_that_was_not_found() -> None:
    with pytest.raises(UnknownPluginError):
        get_scan("os.path")

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.bench import on_cpu
from tests.bench.on_cpu import OURS, THEIRS, summary


def row(rate: float, *, load: float = 1.0) -> dict[str, Any]:
    """A measurement of 10 s of work, spread over more by what else the machine does."""
    return {
        "shape": "tiny", "precision": "float32", "batch": 2, "device": "a processor", "tokens_per_second": rate / load,
        "seconds": 10.0 * load, "processor_seconds": 10.0, "versions": {"torch": "2", "trl": "1"},
    }  # fmt: skip


def test_ours_is_held_against_the_faster_way_of_the_peer() -> None:
    said = summary({OURS: [row(130.0)], THEIRS[0]: [row(50.0)], THEIRS[1]: [row(100.0)]})
    assert "Ours is 1.30 times the faster TRL by the clock, 1.30 times by processor time." in said


def test_processor_time_does_not_see_what_else_the_machine_does() -> None:
    said = summary({OURS: [row(130.0, load=4.0)], THEIRS[0]: [row(50.0)], THEIRS[1]: [row(100.0)]})
    assert "1.30 times by processor time" in said
    assert "1.30 times the faster TRL by the clock" not in said


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_contender_trains_and_is_not_measured_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = ["on_cpu", "--shape", "tiny", "--out", str(tmp_path), "--rounds", "1", "--batch", "2", "--threads", "1"]
    monkeypatch.setattr("sys.argv", [*wanted, "--steps", "3", "--warm", "1"])
    on_cpu.main()
    files = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*.json")}
    assert len(files) == 3
    on_cpu.main()
    assert {file: file.stat().st_mtime_ns for file in tmp_path.glob("*.json")} == files
    assert capsys.readouterr().out.count("times the faster TRL by the clock") == 2

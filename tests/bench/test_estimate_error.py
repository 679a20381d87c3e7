"""The check of the estimates on a real device: real runs of small bases, resumed, merged and corrected."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import pytest

from tests.bench import estimate_error
from tests.bench.estimate_error import (
    ANEW,
    CASES,
    ROLES,
    compared,
    errors_of,
    fitted,
    leave_one_out,
    lengths_of,
    merge,
    read_lines,
    recipe_of,
    role_of,
    run,
    shape_of,
    small,
)
from tests.bench.workload import ALL_SHAPES
from workers.hand_written_time import PACE
from workers.memory import GIB
from workers.methods import methods

ROWS = Path(__file__).with_name("rows") / "estimates" / "cpu.jsonl"
H200 = ROWS.with_name("h200.jsonl")


def test_ten_recipes_are_learned_from_and_ten_others_checked_over_methods_precisions_lengths_and_shapes() -> None:
    assert Counter(case.learns for case in CASES) == {True: 10, False: 10}
    assert len({case.label for case in (*CASES, *ANEW)}) == len(CASES) + len(ANEW)
    learned, checked = ([case for case in CASES if case.learns == learns] for learns in (True, False))
    assert not any(case.learns for case in ANEW)
    for chosen in (learned, checked, ANEW):
        assert {case.shape for case in chosen} == {"135m", "1b", "3b", "8b"}
        assert {case.precision for case in chosen} == {"bfloat16", "nf4"}
        assert {case.length for case in chosen} >= {512, 2048}
        assert len({case.method for case in chosen}) >= 4
        assert {case.card is None for case in chosen} == {True, False}
    assert len({small(case).label for case in CASES}) == len(CASES)
    for case in (*CASES, *ANEW, *map(small, CASES)):
        recipe = recipe_of(case)
        assert recipe.precision in methods()[recipe.method].precisions, case.label


@pytest.mark.slow
def test_real_runs_are_measured_resumed_and_merged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(estimate_error, "CASES", CASES[:2])
    rows = tmp_path / "rows.jsonl"
    run(rows, tmp_path, is_small=True, seconds=0)
    assert not rows.exists(), "there was no time for any"
    run(rows, tmp_path, is_small=True, seconds=600)
    before = rows.read_text()
    lines = read_lines(rows)
    labels = ["135m lora float32, 16 rows up to 256", "135m lora float32, 48 rows up to 128"]
    assert [line["label"] for line in lines] == labels
    for line in lines:
        assert line["kind"] == "cpu"
        assert line["peak_bytes"] > 2**28, "torch alone is larger"
        assert line["step_seconds"] > 0
        assert line["blocks"] == "by hand"
        assert compared(line).step_seconds > 0
    run(rows, tmp_path, is_small=True, seconds=600)
    assert rows.read_text() == before, "what is there is not run again"
    [learned, checked] = merge(rows)
    assert abs(learned.memory_corrected) < abs(learned.memory) + 0.01
    assert abs(checked.memory_corrected) < abs(checked.memory) + 0.05
    assert "checked" in capsys.readouterr().out


def test_measured_peaks_make_the_estimates_of_other_recipes_better() -> None:
    """The rows were measured on a CPU, where most of a small run is the process itself."""
    lines = read_lines(ROWS)
    assert {line["label"] for line in lines} == {small(case).label for case in CASES}
    alone, corrected = leave_one_out([compared(line).run for line in lines])
    assert mean(corrected) < mean(alone)
    assert median(corrected) < 0.8 * median(alone)
    checked = [one for one in errors_of(lines) if not one.line["learns"]]
    assert median(abs(one.memory_corrected) for one in checked) < median(abs(one.memory) for one in checked)


def test_the_constants_of_a_gpu_are_found_again_from_times_that_they_give() -> None:
    truth = replace(PACE, products=0.5, host_per_block=1.2e-3, bandwidth=1.1)
    lines = []
    for case in CASES:
        if case.method == "dora":
            continue
        line: dict[str, Any] = {
            "label": case.label, **asdict(case), "model_shape": shape_of(ALL_SHAPES[case.shape]).model_dump(),
            "lengths": lengths_of(case), "recipe": recipe_of(case).to_dict(), "kind": "cuda", "device": "NVIDIA H200",
            "memory_bytes": 140 * GIB, "num_threads": 1, "peak_bytes": GIB,
        }  # fmt: skip
        lines.append(line | {"step_seconds": compared(line, truth).step_seconds})
    found = fitted(lines)
    for line in lines:
        assert compared(line, found).step_seconds == pytest.approx(line["step_seconds"], rel=0.05), line["label"]
    before = [abs(compared(line).step_seconds / line["step_seconds"] - 1) for line in lines]
    assert max(before) > 0.2


def test_the_arithmetic_of_a_gpu_is_near_what_was_measured_on_one() -> None:
    """On an H200, in thirty runs; ten of them gave the constants, and those of the others are what counts."""
    found = errors_of(read_lines(H200))
    by_role = {role: [one for one in found if role_of(one.line) == role] for role in ROLES}
    assert [len(by_role[role]) for role in ROLES] == [10, 10, 10]
    checked, anew = by_role["checked"], by_role["checked anew"]
    assert max(abs(one.memory_corrected) for one in checked) < 0.1
    assert max(abs(one.time) for one in checked) < 0.2
    assert max(abs(one.time_corrected) for one in checked) < 0.2
    assert sum(abs(one.memory) < 0.1 for one in checked) == 9, "not DoRA on 3B"
    assert sum(abs(one.memory_corrected) < 0.1 for one in anew) == 9, "not prefix tuning on 135M"
    assert sum(abs(one.time_corrected) < 0.2 for one in anew) == 9, "not IA3"
    assert max(abs(one.memory_corrected) for one in anew) < 0.12
    assert max(abs(one.time_corrected) for one in anew) < 0.22
    assert max(abs(one.memory) for one in found if one.line["blocks"] == "by hand") < 0.11


def test_rows_of_two_devices_are_not_merged() -> None:
    lines = read_lines(ROWS)
    lines[0]["device"] = "another"
    with pytest.raises(SystemExit, match="of 2 devices"):
        errors_of(lines)


def test_a_failed_recipe_is_shown_and_learned_from_by_nobody(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = read_lines(ROWS)
    lines[1] = {"label": lines[1]["label"], "learns": False, "failed": "out_of_memory: It ran out of memory."}
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert len(merge(rows)) == len(lines) - 1
    assert "| failed | out_of_memory" in capsys.readouterr().out

"""Peaks of finished runs correct the arithmetic, part by part, and few runs change little but their own kind."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from tests.workers.test_resolving import GPU, ROWS, SEVEN_B, recipe
from workers.measured_memory import MeasuredRun, MemoryParts, held_out_errors, learn_memory, shape_key
from workers.memory import GIB, estimate
from workers.resolving import resolve

DEVICE = "NVIDIA L4"


def run(
    activations: float, *, method: str = "lora", shape: str = "seven", of_fixed: float = 1.0,
    of_activations: float = 1.0, **changes: object,
) -> MeasuredRun:  # fmt: skip
    """A run on a base of 13 GiB whose parts are off by known factors; GPU peaks count no runtime."""
    parts = MemoryParts(fixed=13 * GIB, activations=round(activations * GIB), runtime=GIB)
    peak = of_fixed * parts.fixed + of_activations * parts.activations
    values: dict[str, object] = {
        "shape": shape, "method": method, "precision": "bfloat16", "kind": "cuda", "device": DEVICE, "parts": parts,
        "peak_bytes": round(peak),
    }  # fmt: skip
    return MeasuredRun(**(values | changes))  # type: ignore[arg-type]


def test_without_runs_the_arithmetic_stands() -> None:
    correction = learn_memory([], DEVICE).correction("seven", "lora", "bfloat16")
    assert (correction.basis, correction.num_runs) == ("arithmetic", 0)
    parts = MemoryParts(1, 2, 3)
    assert correction.total(parts) == 6


def test_one_run_like_it_takes_away_most_of_the_error() -> None:
    known = run(8, of_activations=1.5)
    correction = learn_memory([known], DEVICE).correction("seven", "lora", "bfloat16")
    assert (correction.basis, correction.num_runs) == ("like", 1)
    before = abs(known.parts.total / known.held_bytes - 1)
    assert abs(correction.total(known.parts) / known.held_bytes - 1) < before / 3


def test_runs_of_several_lengths_tell_which_part_is_off() -> None:
    """From short rows and middling ones to rows three times as long."""
    runs = [run(size, of_fixed=1.05, of_activations=1.4) for size in (0.5, 2, 4, 8)]
    longer = run(24, of_fixed=1.05, of_activations=1.4)
    correction = learn_memory(runs, DEVICE).correction("seven", "lora", "bfloat16")
    assert correction.total(longer.parts) == pytest.approx(longer.held_bytes, rel=0.08)
    assert longer.parts.total < 0.8 * longer.held_bytes


def test_runs_of_the_method_on_other_bases_help_and_those_like_it_help_more() -> None:
    others = [run(size, shape="one", of_activations=1.4) for size in (2, 4)]
    learned = learn_memory(others, DEVICE)
    assert learned.correction("seven", "lora", "bfloat16").basis == "method"
    assert learned.correction("seven", "ia3", "bfloat16").basis == "arithmetic", "two say nothing of another method"
    more = learn_memory([*others, run(4, of_activations=0.9)], DEVICE)
    assert more.correction("seven", "lora", "bfloat16").basis == "like"
    assert more.correction("seven", "ia3", "bfloat16").basis == "device", "three do"


def test_runs_of_other_teams_count_only_for_the_whole_device() -> None:
    foreign = [run(4, of_activations=1.4, is_own=False) for _ in range(4)]
    correction = learn_memory(foreign, DEVICE).correction("seven", "lora", "bfloat16")
    assert (correction.basis, correction.num_runs) == ("device", 4)
    assert learn_memory(foreign, "NVIDIA T4").correction("seven", "lora", "bfloat16").basis == "arithmetic"


def test_a_cpu_run_corrects_what_the_process_holds_anyway() -> None:
    tiny = MemoryParts(fixed=10**6, activations=10**6, runtime=GIB // 2)
    measured = [
        run(0, kind="cpu", device="CPU", parts=tiny, peak_bytes=round(0.7 * GIB) + index * 10**6) for index in range(3)
    ]
    correction = learn_memory(measured, "CPU").correction("seven", "lora", "bfloat16")
    assert correction.total(tiny) == pytest.approx(0.7 * GIB, rel=0.05)


def test_no_correction_more_than_doubles_or_halves() -> None:
    wild = [run(4, of_fixed=9), run(8, of_fixed=9)]
    correction = learn_memory(wild, DEVICE).correction("seven", "lora", "bfloat16")
    assert correction.total(wild[0].parts) == 2 * wild[0].parts.total


def test_the_error_on_unseen_runs_falls() -> None:
    chance = random.Random(17)

    def noisy(number: int) -> list[MeasuredRun]:
        return [
            run(
                chance.uniform(0.5, 16), method=chance.choice(("lora", "qlora", "ia3")),
                shape=chance.choice(("one", "three", "seven")), of_fixed=1.03 + chance.gauss(0, 0.01),
                of_activations=1.3 + chance.gauss(0, 0.03),
            )
            for _ in range(number)
        ]  # fmt: skip

    by_arithmetic, corrected = held_out_errors(noisy(20), noisy(20))
    assert sum(corrected) < sum(by_arithmetic) / 4


def test_an_estimate_on_a_device_with_measured_runs_is_corrected_and_says_by_what() -> None:
    asked = resolve(recipe(precision="bfloat16", training={"micro_batch_size": 1}), SEVEN_B, ROWS, GPU)
    plain = estimate(asked, SEVEN_B, ROWS, GPU)
    parts = MemoryParts(
        plain.weights_bytes + plain.adapter_bytes + plain.optimizer_bytes, plain.activations_bytes, plain.runtime_bytes
    )
    known = [
        run(0, shape=shape_key(SEVEN_B), parts=parts, peak_bytes=round(1.2 * plain.total_bytes) - parts.runtime)
        for _ in range(3)
    ]
    found = estimate(asked, SEVEN_B, ROWS, replace(GPU, measured=learn_memory(known, GPU.name)))
    assert found.total_bytes == pytest.approx(1.2 * plain.total_bytes, rel=0.02)
    assert (found.measured, found.num_measured) == ("like", 3)
    assert (found.arithmetic_bytes, found.weights_bytes) == (plain.total_bytes, plain.weights_bytes)
    assert (plain.measured, plain.num_measured) == ("arithmetic", 0)

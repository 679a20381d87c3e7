from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.bench.training_table import REFERENCES, table

OURS = {
    "contender": "ours", "shape": "8b", "method": "lora", "precision": "bfloat16", "blocks": "by hand", "batch": 16,
    "length": None, "peak_gib": 40.0, "tokens_per_step": 4700, "steps": 22, "device": "a card",
    "num_trainable": 41_900_000,
}  # fmt: skip
PEER = OURS | {"contender": "unsloth", "blocks": "packed", "checkpointing": "default", "peak_gib": 16.0}
REFERENCE = REFERENCES["unsloth", "8b", "lora", "default", 16, None]


def said(folder: Path, *rows: dict[str, Any]) -> str:
    for number, row in enumerate(rows):
        (folder / f"{number}.json").write_text(json.dumps({"name": row["contender"]} | row) + "\n")
    return table(folder)


def test_ours_is_held_against_the_peer_on_the_same_task(tmp_path: Path) -> None:
    found = said(tmp_path, OURS | {"tokens_per_second": 2 * REFERENCE}, PEER | {"tokens_per_second": REFERENCE})
    assert "| 100% |" in found
    assert "| ours (by hand) | unsloth (packed) | 8b | lora | mixed | 2.00 | 2.50 |" in found
    assert "does not count" not in found


def test_runs_of_one_name_count_by_their_median(tmp_path: Path) -> None:
    rates = [REFERENCE, 0.5 * REFERENCE, 1.2 * REFERENCE]
    found = said(
        tmp_path, OURS | {"tokens_per_second": REFERENCE}, *(PEER | {"tokens_per_second": one} for one in rates)
    )
    assert "| 1.00 | 2.50 |" in found


def test_a_peer_far_below_what_it_is_known_to_give_does_not_count(tmp_path: Path) -> None:
    found = said(tmp_path, OURS | {"tokens_per_second": REFERENCE}, PEER | {"tokens_per_second": 0.89 * REFERENCE})
    assert "| 89%, does not count |" in found
    assert "1.12 (the peer does not count)" in found


def test_other_tasks_are_not_compared(tmp_path: Path) -> None:
    others = [PEER | {"name": key, "tokens_per_second": 1.0, key: value} for key, value in
              {"shape": "1b", "method": "qlora", "batch": 1, "length": 2048}.items()]  # fmt: skip
    found = said(tmp_path, OURS | {"tokens_per_second": 1.0}, *others)
    assert "| ours | against |" not in found


def test_what_ours_did_otherwise_is_said(tmp_path: Path) -> None:
    row = OURS | {"tokens_per_second": 1.0, "at_once": 4, "dropout": 0.05, "lean": True, "recorded": 3}
    found = said(tmp_path, row)
    assert "ours (by hand, 4 rows at once, dropout 0.05, all recomputed, launches recorded) | 8b" in found
    assert "| 41.9 M |" in found


def test_a_run_that_sees_only_a_part_of_the_card_says_so(tmp_path: Path) -> None:
    row = OURS | {"tokens_per_second": 1.0, "memory_gib": 16.5, "kept": {"input": 5, "offload": 27}}
    assert "ours (by hand, within 16.5 GiB, inputs offloaded) | 8b" in said(tmp_path, row)


def test_the_rows_in_the_repository_make_a_table() -> None:
    found = table(Path(__file__).with_name("rows") / "training")
    assert "Measured on NVIDIA H200." in found

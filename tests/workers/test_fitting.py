"""What would fit is computed: each change by the memory estimate, corrected by what was measured."""

from __future__ import annotations

import pytest

from tests.workers.test_resolving import SEVEN_B
from workers.fitting import advice, in_4_bits, remedies
from workers.memory import GIB, DatasetFacts, DeviceFacts, estimate
from workers.recipe import Recipe

CARD = DeviceFacts("cuda", "NVIDIA GeForce RTX 4090", 24 * GIB, 8)
ROWS = DatasetFacts(num_rows=1000, total_tokens=900_000, longest=2048)


def recipe(**training: object) -> Recipe:
    return Recipe.from_dict(
        {
            "name": "long rows",
            "base_model": {"name": "seven"},
            "dataset": {"name": "faq", "format": "alpaca"},
            "method": "lora",
            "settings": {"rank": 16},
            "precision": "bfloat16",
            "training": {
                "learning_rate": 1e-4, "batch_size": 8, "micro_batch_size": 4, "max_length": 2048, "packing": False,
                "gradient_checkpointing": False, "checkpoint_every_steps": 10, "validate_every_steps": 0, **training,
            },
        }
    )  # fmt: skip


def test_every_remedy_fits_by_its_own_estimate_and_says_how_much_it_needs() -> None:
    found = remedies(recipe(), SEVEN_B, ROWS, CARD, micro_batch_size=4, peak_memory_bytes=0)
    assert [one.words.split(" with")[0] for one in found][:2] == ["gradient checkpointing", "QLoRA"]
    for one in found:
        assert one.num_bytes == estimate(one.recipe, SEVEN_B, ROWS, CARD).total_bytes
        assert one.num_bytes < 0.85 * CARD.memory_bytes
    text = advice(found, recipe(), CARD)
    assert f"gradient checkpointing with a micro-batch of 1, about {found[0].num_bytes / GIB:.1f} GiB" in text


def test_what_was_measured_beyond_the_estimate_is_added_to_every_remedy() -> None:
    needed = estimate(recipe(), SEVEN_B, ROWS, CARD).total_bytes
    plain = remedies(recipe(), SEVEN_B, ROWS, CARD, micro_batch_size=4, peak_memory_bytes=needed)
    worse = remedies(recipe(), SEVEN_B, ROWS, CARD, micro_batch_size=4, peak_memory_bytes=round(1.1 * needed))
    by_words = {one.words: one.num_bytes for one in plain}
    assert worse
    for one in worse:
        assert one.num_bytes == pytest.approx(1.1 * by_words[one.words], rel=1e-6)


def test_a_smaller_micro_batch_comes_first_where_it_is_enough() -> None:
    large = DeviceFacts("cuda", "NVIDIA H200", 140 * GIB, 8)
    found = remedies(recipe(), SEVEN_B, ROWS, large, micro_batch_size=4, peak_memory_bytes=0)
    assert found[0].words == "a micro-batch of 2"


def test_when_nothing_fits_it_says_so() -> None:
    small = DeviceFacts("cuda", "small", 2 * GIB, 8)
    found = remedies(recipe(), SEVEN_B, ROWS, small, micro_batch_size=1, peak_memory_bytes=2 * GIB)
    assert found == []
    assert "choose a smaller base model" in advice(found, recipe(), small)


def test_a_recipe_in_4_bits_keeps_its_settings() -> None:
    small = in_4_bits(recipe())
    assert small is not None
    assert (small.method, small.precision, small.settings) == ("qlora", "nf4", {"rank": 16})
    assert in_4_bits(small) is None

"""What would fit is computed: each change by the memory estimate, corrected by what was measured."""

from __future__ import annotations

import re

import pytest

from tests.workers.test_resolving import SEVEN_B
from workers.facts import DatasetFacts, DeviceFacts
from workers.fitting import Suggestion, advice, in_4_bits, remedies, suggestions
from workers.memory import GIB, Estimate, estimate
from workers.recipe import Recipe
from workers.resolving import resolve

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


def by_its_own_blocks(**training: object) -> Recipe:
    """A recipe whose blocks are the model's own: what these keep is not chosen by the memory there is."""
    settings = {"rank": 16, "dropout": 0.0}  # with dropout it holds all weights in float32, too
    return recipe(**training).model_copy(update={"method": "dora", "settings": settings})


def test_every_remedy_fits_by_its_own_estimate_and_says_how_much_it_needs() -> None:
    found = remedies(recipe(), SEVEN_B, ROWS, CARD, micro_batch_size=4, peak_memory_bytes=0)
    names = ["a micro-batch of 2", "gradient checkpointing", "QLoRA"]
    assert [one.words.split(" with")[0] for one in found][:3] == names
    for one in found:
        assert one.num_bytes == estimate(one.recipe, SEVEN_B, ROWS, CARD).total_bytes
        assert one.num_bytes < 0.85 * CARD.memory_bytes
    text = advice(found, recipe(), CARD)
    assert f"gradient checkpointing with a micro-batch of 1, about {found[1].num_bytes / GIB:.1f} GiB" in text


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


HISTOGRAM = {256: 400, 512: 300, 1024: 200, 2048: 100}
UNEVEN = DatasetFacts(num_rows=1000, total_tokens=500_000, longest=2048, lengths=HISTOGRAM)


def found(asked: Recipe, memory_gib: float, dataset: DatasetFacts = UNEVEN) -> list[Suggestion]:
    return suggestions(asked, SEVEN_B, dataset, DeviceFacts("cuda", "NVIDIA card", round(memory_gib * GIB), 8))


@pytest.mark.parametrize("memory_gib", [8, 12, 16, 24, 32, 48])
@pytest.mark.parametrize("method", ["lora", "qlora", "dora", "full", "prefix_tuning"])
def test_whatever_is_suggested_fits_by_the_same_arithmetic_and_says_how_long_it_takes(
    method: str, memory_gib: int
) -> None:
    card = DeviceFacts("cuda", "NVIDIA card", memory_gib * GIB, 8)
    asked = recipe().model_copy(update={"method": method, "settings": {}, "precision": "auto"})
    for one in found(asked, memory_gib):
        again = resolve(one.asked, SEVEN_B, UNEVEN, card)
        needed = estimate(again, SEVEN_B, UNEVEN, card)
        assert (one.recipe, one.num_bytes) == (again, needed.total_bytes)
        assert needed.verdict == "fits"
        assert one.slowdown > 0
        assert one.asked != asked


def test_what_leaves_the_result_alone_comes_first() -> None:
    asked = by_its_own_blocks()
    words = [(one.words, one.cost) for one in found(asked, 96)]
    assert words[0] == ("a micro-batch of 1 row", "what is learned stays the same")
    assert words[1] == ("gradient checkpointing", "what is learned stays the same")
    assert [one.slowdown for one in found(asked, 96)][1] > 1.2, "a third pass through the layers"


def test_where_one_change_is_not_enough_the_studio_chooses_the_rows_at_once_as_well() -> None:
    first = found(by_its_own_blocks(), 24)[0]
    assert first.words == "gradient checkpointing, and as many rows at once as fit"
    small = next(one for one in found(recipe(), 12) if one.words.startswith("QLoRA"))
    assert first.asked.training.micro_batch_size == "auto"
    assert (small.asked.method, small.asked.settings["rank"]) == ("qlora", 16)


def test_hand_written_blocks_go_in_small_micro_batches_or_compute_twice_and_nothing_smaller_is_suggested() -> None:
    def on(gib: int) -> tuple[Recipe, Estimate]:
        card = DeviceFacts("cuda", "NVIDIA card", gib * GIB, 8)
        resolved = resolve(recipe(micro_batch_size="auto", gradient_checkpointing="auto"), SEVEN_B, UNEVEN, card)
        return resolved, estimate(resolved, SEVEN_B, UNEVEN, card)

    (resolved, split), (_, twice), (_, roomy) = on(18), on(15), on(80)
    assert (split.verdict, resolved.training.gradient_checkpointing) == ("fits", False)
    assert (split.kept_share, roomy.kept_share) == (1, 1)
    assert split.rows_at_once < roomy.rows_at_once
    assert twice.kept_share is not None
    assert twice.kept_share < 0.5
    assert 1.05 < twice.seconds_low / roomy.seconds_low < 1.6
    words = [one.words for one in found(recipe(), 15)]
    assert words[0].startswith("QLoRA"), "neither fewer rows nor checkpointing saves what is not already saved"


def test_a_shorter_length_is_the_longest_that_fits_and_says_which_share_it_cuts() -> None:
    asked = by_its_own_blocks(micro_batch_size=8, gradient_checkpointing=False)
    shorter = next(one for one in found(asked, 48) if one.words.startswith("rows of at most"))
    length = shorter.asked.training.max_length
    assert length % 64 == 0
    card = DeviceFacts("cuda", "NVIDIA card", 48 * GIB, 8)
    training = asked.training.model_copy(update={"max_length": length + 64})
    longer = resolve(asked.model_copy(update={"training": training}), SEVEN_B, UNEVEN, card)
    assert estimate(longer, SEVEN_B, UNEVEN, card).verdict != "fits"
    cut = sum(rows for bound, rows in HISTOGRAM.items() if bound > length)
    assert shorter.cost == f"up to {float(f'{cut / 10:.2g}'):g} % of the rows lose their ends"


@pytest.mark.parametrize(("long_rows", "fate"), [("cut", "lose their ends"), ("leave_out", "are left out")])
def test_a_shorter_length_says_what_becomes_of_longer_rows(long_rows: str, fate: str) -> None:
    asked = by_its_own_blocks(micro_batch_size=8, gradient_checkpointing=False, long_rows=long_rows)
    shorter = next(one for one in found(asked, 48) if one.words.startswith("rows of at most"))
    assert re.fullmatch(rf"up to [\d.]+ % of the rows {fate}", shorter.cost)


def test_a_lower_rank_keeps_the_adapters_factor() -> None:
    asked = recipe(gradient_checkpointing=True, micro_batch_size=1).model_copy(
        update={"settings": {"rank": 512, "alpha": 1024.0}}
    )
    lower = next(one for one in found(asked, 24) if one.words.startswith("a rank of"))
    rank, alpha = lower.asked.settings["rank"], lower.asked.settings["alpha"]
    assert rank < 512
    assert alpha / rank == 2


def test_full_fine_tuning_that_does_not_fit_is_told_the_methods_that_do() -> None:
    asked = recipe().model_copy(update={"method": "full", "settings": {}, "precision": "auto"})
    labels = [one.words for one in found(asked, 24)]
    assert any(words.startswith("LoRA") for words in labels)
    assert any(words.startswith("QLoRA") for words in labels)


def test_where_nothing_fits_nothing_is_suggested() -> None:
    assert found(recipe(), 2) == []

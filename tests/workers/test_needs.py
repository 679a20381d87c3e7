"""What a base needs by method and length: the same figures as a job's own estimate, and larger for longer rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny import make_tiny_base
from workers.base_folders import read_base_folder
from workers.facts import DatasetFacts, DeviceFacts
from workers.memory import estimate
from workers.methods import methods
from workers.needs import NUM_ROWS, lengths_for, needs_of
from workers.recipe import Recipe
from workers.resolving import resolve
from workers.shapes import LinearShape, ModelShape

SEVEN_B = ModelShape(
    family="llama", num_parameters=6_738_415_616, num_layers=32, hidden_size=4096, intermediate_size=11008,
    num_heads=32, num_key_value_heads=32, head_size=128, vocabulary_size=32000, tied_embeddings=False,
    context_length=4096,
    linears=[
        *(LinearShape(name=f"{name}_proj", in_features=4096, out_features=4096) for name in "qkvo"),
        *(LinearShape(name=name, in_features=4096, out_features=11008) for name in ("gate_proj", "up_proj")),
        LinearShape(name="down_proj", in_features=11008, out_features=4096),
    ],
)  # fmt: skip
CARD = DeviceFacts("cuda", "NVIDIA GeForce RTX 4090", 24 * 2**30, 8)


def test_every_method_is_told_of_for_lengths_that_the_base_can_read() -> None:
    assert lengths_for(SEVEN_B) == (512, 2048)
    found = needs_of(SEVEN_B, CARD, lengths_for(SEVEN_B))
    assert [one.name for one in found] == list(methods())
    for one in found:
        assert [need.length for need in one.needs] == [512, 2048]


def test_what_fits_is_what_a_job_would_be_told_of_and_what_does_not_is_the_least_that_it_could_be() -> None:
    found = {one.name: one for one in needs_of(SEVEN_B, CARD, (512, 2048))}
    assert found["qlora"].precision == "nf4"
    assert [need.verdict for need in found["qlora"].needs] == ["fits", "fits"]
    asked = Recipe.from_dict(
        {"name": "x", "base_model": {"name": "b"}, "dataset": {"name": "d", "format": "alpaca"}, "method": "qlora",
         "training": {"max_length": 2048}}
    )  # fmt: skip
    rows = DatasetFacts(num_rows=NUM_ROWS, total_tokens=NUM_ROWS * 2048, longest=2048)
    recipe = resolve(asked, SEVEN_B, rows, CARD)
    need = found["qlora"].needs[1]
    needed = estimate(recipe, SEVEN_B, rows, CARD)
    assert need.num_bytes == needed.total_bytes
    assert (need.micro_batch_size, need.gradient_checkpointing) == (
        recipe.training.micro_batch_size, needed.computes_again,
    )  # fmt: skip
    full = found["full"].needs[0]
    assert (full.verdict, full.micro_batch_size) == ("too_large", 1)
    assert full.num_bytes > 6_738_415_616 * 12, "weights, gradients and two moments, in float32"
    larger = DeviceFacts("cuda", "NVIDIA H200", 141 * 2**30, 8)
    assert {one.name: one for one in needs_of(SEVEN_B, larger, (512,))}["full"].needs[0].verdict != "impossible"


@pytest.mark.parametrize("name", sorted(methods()))
def test_the_least_that_a_method_needs_grows_with_the_rows(name: str) -> None:
    nothing = DeviceFacts("cuda", "a card of no size", 1, 1)
    needs = {one.name: one.needs for one in needs_of(SEVEN_B, nothing, (256, 1024, 4096 - 256))}[name]
    assert [need.verdict for need in needs] == ["too_large"] * 3
    assert needs[0].num_bytes < needs[1].num_bytes < needs[2].num_bytes


def test_a_base_that_reads_less_than_a_short_answer_is_told_of_at_its_own_length(tmp_path: Path) -> None:
    shape = read_base_folder(make_tiny_base(tmp_path)).shape
    lengths = lengths_for(shape)
    assert lengths
    assert max(lengths) <= shape.context_length
    short = shape.model_copy(update={"context_length": 100})
    assert lengths_for(short) == (100,)
    found = {one.name: one.needs[0] for one in needs_of(short, CARD, (100,))}
    assert {need.verdict for need in found.values()} == {"fits"}, "virtual tokens leave the rows what room there is"
    tiny = shape.model_copy(update={"context_length": 20})
    found = {one.name: one.needs[0] for one in needs_of(tiny, CARD, lengths_for(tiny))}
    assert found["lora"].verdict == "fits"
    assert found["prompt_tuning"].verdict == "impossible"
    assert "takes all of them" in found["prompt_tuning"].refusal

from __future__ import annotations

import pytest

from workers.errors import RecipeProblems
from workers.facts import DatasetFacts, DeviceFacts
from workers.memory import estimate
from workers.recipe import Recipe
from workers.resolving import resolve
from workers.shapes import LinearShape, ModelShape

GIB = 2**30
CPU = DeviceFacts("cpu", "CPU", 24 * GIB, 2, has_fast_bfloat16=False)
GPU = DeviceFacts("cuda", "NVIDIA L4", 24 * GIB, 8)
ROWS = DatasetFacts(num_rows=1000, total_tokens=180_000, longest=600)
SEVEN_B = ModelShape(
    family="llama", num_layers=32, hidden_size=4096, intermediate_size=11008, num_heads=32, num_key_value_heads=32,
    head_size=128, vocabulary_size=32000, context_length=4096, tied_embeddings=False, num_parameters=6_738_415_616,
    linears=(
        LinearShape(name="q_proj", in_features=4096, out_features=4096),
        LinearShape(name="k_proj", in_features=4096, out_features=4096),
        LinearShape(name="v_proj", in_features=4096, out_features=4096),
        LinearShape(name="o_proj", in_features=4096, out_features=4096),
        LinearShape(name="gate_proj", in_features=4096, out_features=11008),
        LinearShape(name="up_proj", in_features=4096, out_features=11008),
        LinearShape(name="down_proj", in_features=11008, out_features=4096),
    ),
)  # fmt: skip


def recipe(**values) -> Recipe:
    return Recipe.from_dict(
        {"name": "x", "base_model": {"name": "b"}, "dataset": {"name": "d", "format": "alpaca"}} | values
    )


def test_nothing_is_left_to_decide() -> None:
    found = resolve(recipe(), SEVEN_B, ROWS, GPU)
    assert "auto" not in found.model_dump_json()
    assert found.precision == "bfloat16"
    assert found.training.learning_rate == 2e-4
    assert found.settings["rank"] == 16
    assert resolve(found, SEVEN_B, ROWS, GPU) == found


def test_validations_that_only_show_are_few_and_those_that_choose_are_ten() -> None:
    """900 training rows in 113 steps, 100 held out: 0.3 * 900 / 100 allows two, so a third of the steps apart."""
    assert resolve(recipe(), SEVEN_B, ROWS, GPU).training.validate_every_steps == 38
    few = recipe(training={"max_steps": 20})
    assert resolve(few, SEVEN_B, ROWS, GPU).training.validate_every_steps == 0, "160 rows are worth no validation"
    for choosing in ({"keep_best": "best"}, {"early_stopping_patience": 2}):
        assert resolve(recipe(training=choosing), SEVEN_B, ROWS, GPU).training.validate_every_steps == 11
    chosen = recipe(training={"validate_every_steps": 7, "keep_best": "best"})
    assert resolve(chosen, SEVEN_B, ROWS, GPU).training.validate_every_steps == 7


def test_choosing_without_anything_to_choose_by_is_refused() -> None:
    wrong = recipe(training={"early_stopping_patience": 2, "validate_every_steps": 0, "best_by": "los"})
    with pytest.raises(RecipeProblems) as caught:
        resolve(wrong, SEVEN_B, ROWS, GPU)
    assert set(caught.value.fields) == {"training.validate_every_steps", "training.best_by"}
    assert "token_f1" in caught.value.fields["training.best_by"]


def test_a_cpu_without_fast_bfloat16_trains_in_float32() -> None:
    assert resolve(recipe(), SEVEN_B, ROWS, CPU).precision == "float32"
    fast = DeviceFacts("cpu", "CPU", 64 * GIB, 2, has_fast_bfloat16=True)
    assert resolve(recipe(), SEVEN_B, ROWS, fast).precision == "bfloat16"


def test_uneven_rows_are_packed_on_a_gpu_and_padded_on_a_cpu() -> None:
    assert resolve(recipe(), SEVEN_B, ROWS, GPU).training.packing is True
    assert resolve(recipe(), SEVEN_B, ROWS, CPU).training.packing is False
    even = DatasetFacts(num_rows=1000, total_tokens=600_000, longest=600)
    assert resolve(recipe(), SEVEN_B, even, GPU).training.packing is False


def test_what_a_person_chose_stays() -> None:
    chosen = {"learning_rate": 1e-3, "packing": False, "micro_batch_size": 2, "gradient_checkpointing": False}
    found = resolve(recipe(training=chosen), SEVEN_B, ROWS, GPU).training
    assert {name: getattr(found, name) for name in chosen} == chosen


def test_all_problems_come_at_once_by_field() -> None:
    wrong = recipe(
        settings={"rnk": 3, "alpha": -1, "target_modules": ["q_prj"]},
        evaluation={"metrics": ["los"]},
        precision="nf4",
        objective="sftt",
    )
    with pytest.raises(RecipeProblems) as caught:
        resolve(wrong, SEVEN_B, ROWS, CPU)
    assert set(caught.value.fields) == {
        "settings.rnk", "settings.alpha", "settings.target_modules", "evaluation.metrics", "precision", "objective",
    }  # fmt: skip
    assert 'Did you mean "rank"?' in caught.value.fields["settings.rnk"]
    assert "q_proj" in caught.value.fields["settings.target_modules"]


def test_a_row_longer_than_the_context_is_refused() -> None:
    long = DatasetFacts(num_rows=100, total_tokens=400_000, longest=9000)
    with pytest.raises(RecipeProblems) as caught:
        resolve(recipe(training={"max_length": 8192}), SEVEN_B, long, GPU)
    assert "4096" in caught.value.fields["training.max_length"]


def test_qlora_needs_a_quarter_of_the_weights() -> None:
    full = estimate(resolve(recipe(), SEVEN_B, ROWS, GPU), SEVEN_B, ROWS, GPU)
    small = estimate(resolve(recipe(method="qlora"), SEVEN_B, ROWS, GPU), SEVEN_B, ROWS, GPU)
    # 6.48e9 weights in linear layers at 4.127 bits, 0.26e9 at 16 bits; gate and up are computed back together.
    scratch = 2 * (2 * 11008 + 64) * (4096 + 64)
    assert small.weights_bytes == pytest.approx(3.34e9 + 0.52e9 + scratch, rel=0.02)
    # Beside and below the weights of each product stand 64 columns and rows.
    sizes = [(3 * 4096, 4096), (4096, 4096), (2 * 11008, 4096), (4096, 11008)]
    room = 32 * 2 * sum((outputs + 64) * (inputs + 64) - outputs * inputs for outputs, inputs in sizes)
    assert full.weights_bytes == 2 * SEVEN_B.num_parameters + room
    assert small.num_trainable == 159_907_840  # rank 64 on all linear layers, as in the QLoRA repository for Llama 7B


def test_checkpointing_and_smaller_batches_save_memory() -> None:
    def activations(**training) -> int:
        base = {"packing": False, "micro_batch_size": 8, "gradient_checkpointing": False}
        return estimate(
            resolve(recipe(training=base | training), SEVEN_B, ROWS, GPU), SEVEN_B, ROWS, GPU
        ).activations_bytes

    assert activations(gradient_checkpointing=True) < activations() / 5
    assert activations(micro_batch_size=4) < activations() * 0.6


def test_the_parts_add_up_and_time_grows_with_epochs() -> None:
    one = estimate(resolve(recipe(), SEVEN_B, ROWS, GPU), SEVEN_B, ROWS, GPU)
    two = estimate(resolve(recipe(training={"epochs": 2}), SEVEN_B, ROWS, GPU), SEVEN_B, ROWS, GPU)
    parts = one.weights_bytes + one.adapter_bytes + one.optimizer_bytes + one.activations_bytes + one.runtime_bytes
    assert one.total_bytes == parts
    assert one.num_steps == 113  # 900 rows in batches of 8
    assert two.num_steps == 225
    assert two.seconds_high > 1.3 * one.seconds_high


def test_a_setting_may_ask_for_another_automatic_learning_rate() -> None:
    plain = resolve(recipe(method="prefix_tuning"), SEVEN_B, ROWS, GPU)
    projected = resolve(recipe(method="prefix_tuning", settings={"projection": True}), SEVEN_B, ROWS, GPU)
    assert plain.training.learning_rate == pytest.approx(5e-3)
    assert projected.training.learning_rate == pytest.approx(5e-4)

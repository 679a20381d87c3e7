from __future__ import annotations

import pytest
from pydantic import BaseModel

from workers.errors import RecipeError
from workers.recipe import EvaluationSettings, Recipe, SplitSettings, TrainingSettings

GROUPS = [TrainingSettings, SplitSettings, EvaluationSettings]
FIELDS = [(group, name) for group in GROUPS for name in group.model_fields]


def recipe_of(**training: object) -> Recipe:
    return Recipe.from_dict(
        {
            "name": "x",
            "base_model": {"name": "b"},
            "dataset": {"name": "d", "format": "alpaca"},
            "training": training,
        }
    )


@pytest.mark.parametrize(("group", "name"), FIELDS, ids=[name for _, name in FIELDS])
def test_every_setting_says_what_it_does_and_where_its_default_comes_from(group: type[BaseModel], name: str) -> None:
    field = group.model_fields[name]
    assert field.title
    assert field.description
    assert isinstance(field.json_schema_extra, dict)
    assert field.json_schema_extra["source"]


@pytest.mark.parametrize(("group", "name"), FIELDS, ids=[name for _, name in FIELDS])
def test_every_number_has_bounds(group: type[BaseModel], name: str) -> None:
    schema = group.model_json_schema()["properties"][name]
    for branch in schema.get("anyOf", [schema]):
        if branch.get("type") in {"number", "integer"}:
            assert branch.keys() & {"minimum", "exclusiveMinimum"}, branch
            assert branch.keys() & {"maximum", "exclusiveMaximum"}, branch


def test_a_recipe_from_before_a_setting_existed_means_its_default() -> None:
    """What version 1 wrote before schedules with a floor, noise and early stopping."""
    stored = {
        "recipe_version": 1,
        "name": "old",
        "base_model": {"name": "b", "revision": "", "path": None},
        "dataset": {"name": "d", "sha256": "", "format": "alpaca", "columns": {}, "path": None},
        "method": "lora",
        "settings": {"rank": 8},
        "precision": "float32",
        "objective": "sft",
        "training": {
            "learning_rate": 2e-4, "epochs": 1.0, "max_steps": None, "batch_size": 8, "micro_batch_size": 8,
            "max_length": 1024, "schedule": "cosine", "warmup_share": 0.03, "weight_decay": 0.0, "max_grad_norm": 1.0,
            "packing": False, "gradient_checkpointing": False, "loss_on": "assistant", "checkpoint_every_steps": 20,
            "seed": 17,
        },
        "split": {"held_out_share": 0.1, "max_held_out": 200, "seed": 17},
        "evaluation": {"metrics": ["loss"], "num_generated": 32, "max_new_tokens": 128},
    }  # fmt: skip
    training = Recipe.from_dict(stored).training
    assert not training.chooses_on_validation
    assert (training.neftune_alpha, training.min_learning_rate_share) == (0.0, 0.0)
    assert (training.adam_beta1, training.adam_beta2, training.adam_epsilon) == (0.9, 0.999, 1e-8)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("decay_share", 0.0), ("min_learning_rate_share", 1.5), ("neftune_alpha", -1), ("adam_beta2", 1.0),
        ("adam_epsilon", 0), ("early_stopping_patience", 0), ("early_stopping_threshold", float("nan")),
        ("keep_best", "first"), ("validate_every_steps", -1), ("num_validated_answers", 0),
    ],
)  # fmt: skip
def test_a_value_out_of_its_bounds_is_named(name: str, value: object) -> None:
    with pytest.raises(RecipeError, match=f"training.{name}"):
        recipe_of(**{name: value})


def test_a_recipe_from_before_answers_were_shown_keeps_its_digest() -> None:
    """Checkpoints and adapters name their recipe by it; the figure is what the version before gave."""
    assert recipe_of().sha256() == "f7e948bd69ca44da4e817dbf682b872fc3d7c8ec87e84909b7a91c98b6f38468"
    assert recipe_of().evaluation.num_samples_shown == 3
    assert recipe_of().training.long_rows == "cut"
    assert recipe_of(long_rows="leave_out").sha256() != recipe_of().sha256()
    off = Recipe.from_dict(recipe_of().to_dict() | {"evaluation": {"num_samples_shown": 0}})
    assert off.sha256() != recipe_of().sha256()
    assert Recipe.from_dict(off.to_dict()) == off

from __future__ import annotations

import pytest

from workers.errors import RecipeError
from workers.recipe import Recipe
from workers.texts import find_unstorable

GOOD = {"name": "support", "base_model": {"name": "tiny"}, "dataset": {"name": "faq", "format": "alpaca"}}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"name": "a\0b"}, "name"),
        ({"settings": {"target_modules": ["q_proj", "v\0"]}}, "settings.target_modules.1"),
        ({"settings": {"ra\0nk": 8}}, "settings.ra\\x00nk"),
        ({"settings": {"note": "\ud83d"}}, "settings.note"),
        ({"dataset": {"name": "faq", "format": "mapped", "columns": {"prompt": "\0"}}}, "dataset.columns.prompt"),
    ],
)
def test_a_recipe_with_text_that_cannot_be_stored_is_refused_by_field(change: dict[str, object], field: str) -> None:
    Recipe.from_dict(GOOD)
    with pytest.raises(RecipeError) as refusal:
        Recipe.from_dict(GOOD | change)
    assert refusal.value.field == field
    assert field in refusal.value.message
    assert refusal.value.message.isprintable()


def test_text_of_every_script_and_deep_nesting_can_be_stored() -> None:
    deep: object = "end"
    for _ in range(100_000):
        deep = [deep]
    assert find_unstorable({"text": "模型 🦜 \U0010ffff \n", "deep": deep, "numbers": [1, 2.5, None, True]}) is None

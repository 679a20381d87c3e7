from __future__ import annotations

from typing import Any

from studio.catalogue.recipe_table import RecipeRow, recipe_sections


def evaluation_rows(metrics: list[Any]) -> dict[str, RecipeRow]:
    sections = {section.title: section for section in recipe_sections({"evaluation": {"metrics": metrics}})}
    return {row.label: row for row in sections["Evaluation"].rows}


def test_metrics_are_shown_by_their_labels_and_their_settings_in_rows_of_their_own() -> None:
    rows = evaluation_rows(
        [
            "loss",
            {"name": "regex", "settings": {"pattern": "a+"}},
            {"name": "regex", "settings": {"pattern": "b+", "mode": "full_match"}},
            {"name": "multiple_choice", "settings": {"options_from": "list", "options": ["yes", "no"]}},
        ]
    )
    assert rows["Metrics"].value == (
        "Held-out loss; Regular expression: found a+; Regular expression: whole answer b+; Multiple choice: yes, no"
    )
    assert rows["Metrics"].is_changed
    assert (rows["Regular expression: Pattern"].value, rows["Regular expression 2: Pattern"].value) == ("a+", "b+")
    assert rows["Regular expression 2: An answer counts when"].value == "full_match"
    assert rows["Multiple choice: Options"].value == "yes, no"
    assert rows["Multiple choice: Options"].is_changed
    assert rows["Multiple choice: Options"].help


def test_the_default_metrics_are_no_change_and_one_that_is_gone_keeps_its_name() -> None:
    rows = evaluation_rows(["loss", "token_f1"])
    assert list(rows) == ["Metrics"]
    assert (rows["Metrics"].value, rows["Metrics"].is_changed) == ("Held-out loss; Token F1", False)
    gone = evaluation_rows([{"name": "beauty", "settings": {"taste": "mine"}}, {"name": "regex", "settings": {"x": 1}}])
    assert gone["Metrics"].value == "beauty; regex"
    assert gone["beauty: taste"].value == "mine"
    assert gone["Regular expression: x"].value == "1"

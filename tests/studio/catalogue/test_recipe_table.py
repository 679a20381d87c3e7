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


def split(name: str, digit: str) -> dict[str, Any]:
    return {"name": name, "sha256": digit * 64, "num_train": 30, "num_validation": 0, "num_test": 9}


def test_the_split_of_every_dataset_of_a_mixture_is_shown() -> None:
    def tables(main: dict[str, Any], further: dict[str, Any]) -> tuple[dict[str, str], dict[str, str]]:
        recipe = {
            "dataset": {"name": "Support v1", **main},
            "mix": [{"name": "FAQ v1", "weight": 0.5, **further}],
            "split": {"held_out_share": 0.2},
        }
        found = {one.title: {row.label: row.value for row in one.rows} for one in recipe_sections(recipe)}
        return found["Mixture"], found["Held-out rows"]

    mine, other, unnamed = ({"split": split(name, digit)} for name, digit in (("Mine", "a"), ("Mine", "b"), ("", "c")))
    mixture, held_out = tables({}, mine)
    assert mixture == {
        "Dataset 1": "Support v1, weight 1, held-out share",
        "Dataset 2": "FAQ v1, weight 0.5, split “Mine”",
        "Dataset 2 split's sha256": "a" * 64,
    }
    assert held_out == {"Held-out share": "0.2"}
    assert tables({}, mine) != tables({}, other), "two splits of the same name"
    mixture, held_out = tables(mine, {})
    assert list(mixture.values()) == ["Support v1, weight 1, split “Mine”", "FAQ v1, weight 0.5, held-out share"]
    assert held_out["Split's sha256"] == "a" * 64
    assert held_out["Held-out share"] == "0.2", "the settings hold out rows of FAQ"
    mixture, held_out = tables(mine, unnamed)
    assert mixture["Dataset 2"] == "FAQ v1, weight 0.5, split “cccccccccccc”"
    assert "Held-out share" not in held_out, "no dataset is held out by it"

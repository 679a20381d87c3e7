from __future__ import annotations

from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from workers.evaluations.multiple_choice import MultipleChoiceSettings
from workers.recipe import EvaluationSettings, SplitSettings, TrainingSettings
from workers.setting import Setting, settings_of, to_text


def setting(name: str) -> Setting:
    return {one.name: one for one in settings_of(TrainingSettings, "training")}[f"training.{name}"]


def test_it_takes_label_help_unit_bounds_default_and_source_from_the_model() -> None:
    found = setting("batch_size")
    assert (found.label, found.unit, found.minimum, found.maximum, found.default) == ("Batch size", "rows", 1, 4096, 8)
    assert found.help == TrainingSettings.model_fields["batch_size"].description
    assert setting("warmup_share").source.startswith("QLoRA")


@pytest.mark.parametrize("model", [TrainingSettings, SplitSettings, EvaluationSettings])
def test_every_default_survives_the_way_through_its_input(model: type[BaseModel]) -> None:
    for one in settings_of(model, "x"):
        assert one.parse(to_text(one.default)) == one.default, one.name


@pytest.mark.parametrize(
    "text", ["nan", "inf", "-inf", "1,5", "٣", "1_000", "0x10", "1e", "", "  ", "NaN", "\uff11", "1 000", "9" * 5000]
)
def test_it_refuses_hostile_numbers_with_a_sentence(text: str) -> None:
    with pytest.raises(ValueError) as caught:
        setting("epochs").parse(text)
    assert len(str(caught.value)) < 200
    assert "Epochs" in str(caught.value) or "above 0, at most 100" in str(caught.value)


@pytest.mark.parametrize("text", ["1e400", "1000000000", "-1", "0", "1e-400"])
def test_it_says_the_range_of_a_number_outside_it(text: str) -> None:
    with pytest.raises(ValueError, match="above 0, at most 100"):
        setting("epochs").parse(text)


def test_it_shows_how_a_decimal_comma_is_written() -> None:
    with pytest.raises(ValueError, match=r"written with a point: 1\.5"):
        setting("epochs").parse("1,5")


def test_it_reads_numbers_words_and_nothing() -> None:
    assert setting("learning_rate").parse(" 2e-4 ") == 2e-4
    assert setting("learning_rate").parse("auto") == "auto"
    assert setting("max_steps").parse("") is None
    assert setting("max_steps").parse("1e3") == 1000
    assert setting("packing").parse("false") is False
    assert setting("packing").parse("auto") == "auto"
    with pytest.raises(ValueError, match="whole number"):
        setting("batch_size").parse("2.5")
    with pytest.raises(ValueError, match="no choice"):
        setting("schedule").parse("sawtooth")


def test_a_list_may_stand_beside_a_word() -> None:
    class Settings(BaseModel):
        modules: Literal["all-linear"] | tuple[Annotated[str, Field(max_length=20)], ...] = "all-linear"

    (modules,) = settings_of(Settings, "settings")
    assert modules.parse("all-linear") == "all-linear"
    assert modules.parse("q_proj, v_proj") == ("q_proj", "v_proj")


def test_a_field_that_no_form_can_show_is_our_mistake() -> None:
    class Settings(BaseModel):
        nested: dict[str, int] = {}

    with pytest.raises(TypeError, match="nested"):
        settings_of(Settings, "settings")


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1), min_size=1))
def test_values_that_hold_commas_and_quotes_survive_the_way_through_their_input(values: list[str]) -> None:
    options = {one.name: one for one in settings_of(MultipleChoiceSettings, "x")}["x.options"]
    text = to_text(tuple(values))
    if len(text) < 1000:
        assert options.parse(text) == tuple(values)


def test_plain_values_need_no_quotes() -> None:
    options = {one.name: one for one in settings_of(MultipleChoiceSettings, "x")}["x.options"]
    assert options.parse('yes, no,\n"Bern, Switzerland",') == ("yes", "no", "Bern, Switzerland")

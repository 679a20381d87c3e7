"""The card's front matter as the Hub's own library reads it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results

from tests.factories import make_result, make_score
from workers.model_card import MeasuredOn, front_matter, write_card
from workers.recipe import Recipe

HOSTILE = 'A "quoted": name — #1 \N{PILE OF POO}\n---\nlicense: evil\u2028\x85'


def recipe(name: str = "support-r16") -> Recipe:
    return Recipe.from_dict(
        {
            "name": name, "base_model": {"name": "SmolLM2"}, "method": "lora",
            "dataset": {"name": "Support FAQ", "sha256": "a" * 64, "format": "alpaca"},
        }
    )  # fmt: skip


def card(
    folder: Path, *, name: str = "support-r16", hub_id: str = "owner/base", licence: str = "apache-2.0"
) -> ModelCard:
    scores = [
        make_score(-0.6), make_score(0.21, evaluation="token_f1", base_value=0.44, value=1e-5, low=0.0, high=1.0)
    ]  # fmt: skip
    write_card(folder, recipe(name), make_result(scores), hub_id=hub_id, licence=licence, commit="")
    return ModelCard.load(folder / "README.md")


def test_the_front_matter_is_what_the_hub_asks_of_an_adapter(tmp_path: Path) -> None:
    data = card(tmp_path).data
    assert data.base_model == "owner/base"
    assert data.to_dict()["base_model_relation"] == "adapter"
    assert (data.library_name, data.pipeline_tag, data.license) == ("peft", "text-generation", "apache-2.0")
    assert "base_model:adapter:owner/base" in data.tags
    assert data.metrics == ["loss", "f1"]
    # A team's dataset is on no hub, and nobody has said in which language it is.
    assert not {"datasets", "language"} & data.to_dict().keys()


def test_the_scores_survive_the_hubs_own_reading_and_writing(tmp_path: Path) -> None:
    data = card(tmp_path).data
    first, second = data.eval_results
    assert (first.metric_type, first.metric_value, first.metric_name) == ("loss", 1.32, "Held-out loss")
    assert first.metric_args == {"n": 100, "baseline": 1.92, "ci95": [1.27, 1.37]}
    assert (first.dataset_name, first.dataset_type) == ("Support FAQ (held-out)", "support-faq")
    assert (first.dataset_split, first.dataset_revision) == ("held-out", "a" * 64)
    assert second.metric_value == pytest.approx(1e-5)
    index = eval_results_to_model_index("support-r16", data.eval_results)
    assert model_index_to_eval_results(index) == ("support-r16", data.eval_results)


def test_a_base_without_a_hubs_name_is_not_taken_for_another_one(tmp_path: Path) -> None:
    found = card(tmp_path, hub_id="").data.to_dict()
    assert not {"base_model", "base_model_relation"} & found.keys()
    assert not any(tag.startswith("base_model:") for tag in found["tags"])


def test_a_licence_that_the_hub_does_not_know_is_other_with_its_name(tmp_path: Path) -> None:
    found = card(tmp_path, licence="Our Own Licence 2").data.to_dict()
    assert (found["license"], found["license_name"]) == ("other", "our-own-licence-2")
    assert "license" not in card(tmp_path, licence="").data.to_dict()


def test_names_cannot_break_out_of_the_front_matter() -> None:
    scores = [make_score(evaluation="token_f1", label=HOSTILE)]
    lines = front_matter(
        name=HOSTILE, method="lora", objective="sft", hub_id="", licence="mit",
        measured=[MeasuredOn(HOSTILE, "suite", "", scores)],
    )  # fmt: skip
    found = yaml.safe_load("\n".join(lines[1:-1]))
    assert (lines[0], lines[-1]) == ("---", "---")
    assert found["license"] == "mit"
    assert found["model-index"][0]["name"] == HOSTILE
    assert found["model-index"][0]["results"][0]["metrics"][0]["name"] == HOSTILE

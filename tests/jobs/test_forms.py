from __future__ import annotations

from typing import Any

import pytest
from django.http import QueryDict

from jobs.forms import JobForm, bound_copy, fresh_form, next_name
from studio.accounts.models import Team, User
from studio.catalogue.models import BaseModel
from studio.datasets.models import DatasetVersion
from tests.factories import make_dataset_version
from tests.jobs.conftest import MakeJob
from workers.evaluations import evaluations
from workers.methods import methods


def posted(base_model: BaseModel, version: DatasetVersion, **changes: Any) -> QueryDict:
    data = QueryDict(mutable=True)
    data.update(
        {"base_model": str(base_model.pk), "dataset_version": str(version.pk), "method": "lora", "goal": "balanced",
         "name": "support", "idempotency_key": "k1"}
    )  # fmt: skip
    for name, value in changes.items():
        data[name] = value
    data.setlist("evaluation.metrics", ["loss", "token_f1"])
    return data


def test_a_form_with_defaults_asks_for_the_recipe_of_defaults(
    base_model: BaseModel, version: DatasetVersion, team: Team
) -> None:
    form = JobForm(posted(base_model, version), team=team)
    assert form.is_valid(), form.errors
    recipe = form.to_recipe()
    assert recipe.dataset.sha256 == version.sha256
    assert recipe.base_model.revision == base_model.revision
    assert recipe.training.learning_rate == "auto"
    assert recipe.settings == methods()["lora"].Settings().model_dump()


def test_every_method_can_be_asked_for_without_changing_a_setting(
    base_model: BaseModel, version: DatasetVersion, team: Team
) -> None:
    for name in methods():
        form = JobForm(posted(base_model, version, method=name), team=team)
        assert form.is_valid(), (name, form.errors)
        assert form.to_recipe().method == name


def test_a_goal_changes_only_what_the_person_left_alone(
    base_model: BaseModel, version: DatasetVersion, team: Team
) -> None:
    form = JobForm(posted(base_model, version, goal="quick", **{"split.max_held_out": "33"}), team=team)
    assert form.is_valid(), form.errors
    recipe = form.to_recipe()
    assert recipe.training.max_steps == 30
    assert recipe.split.max_held_out == 33


def test_what_chooses_the_best_step_is_one_of_the_evaluations(
    base_model: BaseModel, version: DatasetVersion, team: Team
) -> None:
    asked = {"training.best_by": "token_f1", "training.keep_best": "best", "training.early_stopping_patience": "3"}
    form = JobForm(posted(base_model, version, **asked), team=team)
    assert form.is_valid(), form.errors
    training = form.to_recipe().training
    assert (training.best_by, training.keep_best, training.early_stopping_patience) == ("token_f1", "best", 3)
    rows = {row.setting.name: row for section in form.sections() for row in section.rows}
    assert set(rows["training.best_by"].setting.choices) == set(evaluations())
    wrong = JobForm(posted(base_model, version, **{"training.best_by": "loss; drop"}), team=team)
    assert "no choice" in str(wrong.errors["training.best_by"])


def test_a_bad_value_is_named_beside_its_field_and_kept(
    base_model: BaseModel, version: DatasetVersion, team: Team
) -> None:
    form = JobForm(
        posted(base_model, version, **{"training.epochs": "nan", "settings.lora.rank": "10000000000"}), team=team
    )
    assert not form.is_valid()
    assert set(form.errors) == {"training.epochs", "settings.lora.rank"}
    rows = {row.setting.name: row for section in form.sections() for row in section.rows}
    assert rows["training.epochs"].text == "nan"
    assert rows["training.epochs"].is_changed


@pytest.mark.parametrize("value", ["999999", "abc", "-1", "1e3", "'; --", "٣"])
def test_a_dataset_that_does_not_exist_is_refused_with_a_sentence(
    base_model: BaseModel, version: DatasetVersion, team: Team, value: str
) -> None:
    form = JobForm(posted(base_model, version, dataset_version=value), team=team)
    assert not form.is_valid()
    assert "Your team has no such dataset" in str(form.errors["dataset_version"])


def test_another_teams_dataset_cannot_be_chosen(
    base_model: BaseModel, version: DatasetVersion, other_team: Team
) -> None:
    form = JobForm(posted(base_model, version), team=other_team)
    assert "dataset_version" in form.errors
    assert not form.dataset_versions.rows


def test_the_button_says_what_is_missing(base_model: BaseModel, version: DatasetVersion, team: Team) -> None:
    form = fresh_form(team)
    assert form.text_of("base_model") == str(base_model.pk), "the only base model is chosen already"
    assert form.missing() == "Choose a dataset"
    assert fresh_form(team, dataset_version=str(version.pk)).missing() == ""


def test_a_form_from_an_earlier_job_asks_for_the_same_again(make_job: MakeJob, team: Team) -> None:
    job = make_job("support-3")
    form = bound_copy(fresh_form(team, parent=job))
    assert form.is_valid(), form.errors
    assert (
        form.to_recipe().model_copy(update={"name": job.name}).training.model_dump(mode="json")
        == (job.asked_recipe["training"])
    )
    assert form.to_recipe().name == "support-4"
    assert form.cleaned_data["parent"] == job.pk


def test_a_new_name_is_free_in_the_team(make_job: MakeJob, team: Team) -> None:
    make_job("faq")
    make_job("faq-2")
    assert next_name(team, "faq") == "faq-3"
    assert next_name(team, "other") == "other"


def test_only_ready_versions_are_offered(base_model: BaseModel, team: Team, alice: User) -> None:
    unreadable = make_dataset_version(team, alice)
    unreadable.state = "unreadable"
    unreadable.save()
    assert not fresh_form(team).dataset_versions.rows


def test_metrics_with_settings_are_chosen_and_come_back_when_the_job_is_run_again(
    base_model: BaseModel, version: DatasetVersion, team: Team, make_job: MakeJob
) -> None:
    patterns = {"evaluation.metrics.regex.pattern": "a+", "evaluation.metrics.regex.2.pattern": "b|c"}
    data = posted(base_model, version, **patterns)
    data.setlist("evaluation.metrics", ["loss", "regex", "multiple_choice", "regex.2"])
    form = JobForm(data, team=team)
    assert form.is_valid(), form.errors
    asked = form.to_recipe()
    metrics = asked.to_dict()["evaluation"]["metrics"]
    assert [one for one in metrics if isinstance(one, str)] == ["loss", "multiple_choice"]
    assert [one["settings"] for one in metrics if isinstance(one, dict)] == [{"pattern": "a+"}, {"pattern": "b|c"}]

    job = make_job(base_model=base_model, dataset_version=version)
    job.asked_recipe = asked.to_dict()
    again = bound_copy(fresh_form(team, parent=job))
    assert again.is_valid(), again.errors
    assert again.to_recipe().evaluation == asked.evaluation


def test_a_recipe_with_many_choices_of_one_metric_comes_back_whole_with_room_for_one_more(
    base_model: BaseModel, version: DatasetVersion, team: Team, make_job: MakeJob
) -> None:
    chosen = [{"name": "regex", "settings": {"pattern": f"a{number}"}} for number in range(5)]
    job = make_job(base_model=base_model, dataset_version=version)
    job.asked_recipe = job.asked_recipe | {"evaluation": {"metrics": chosen}}
    again = bound_copy(fresh_form(team, parent=job))
    assert again.is_valid(), again.errors
    assert again.to_recipe().to_dict()["evaluation"]["metrics"] == chosen
    (section,) = (one for one in again.sections() if one.metrics is not None)
    assert section.metrics is not None
    (boxes,) = (boxes for boxes in section.metrics.with_settings if boxes[0].value == "regex")
    assert [box.is_chosen for box in boxes] == [True] * 5 + [False]


def test_settings_of_two_choices_are_told_apart_when_one_is_wrong(
    base_model: BaseModel, version: DatasetVersion, team: Team
) -> None:
    patterns = {"evaluation.metrics.regex.pattern": "a+", "evaluation.metrics.regex.2.pattern": "("}
    data = posted(base_model, version, **patterns)
    data.setlist("evaluation.metrics", ["regex", "regex.2"])
    form = JobForm(data, team=team)
    assert list(form.errors) == ["evaluation.metrics.regex.2.pattern"]
    (said,) = form.errors["evaluation.metrics.regex.2.pattern"]
    assert str(said).startswith("This is no regular expression that RE2 takes: missing )")


@pytest.mark.parametrize(
    ("metric", "values", "field"),
    [
        ("regex", {}, "evaluation.metrics.regex.pattern"),
        ("regex", {"evaluation.metrics.regex.pattern": "("}, "evaluation.metrics.regex.pattern"),
        (
            "json_schema",
            {"evaluation.metrics.json_schema.definition": "{"},
            "evaluation.metrics.json_schema.definition",
        ),
        ("{", {}, "evaluation.metrics"),
        ('{"name": "beauty"}', {}, "evaluation.metrics"),
    ],
)
def test_settings_of_a_metric_that_cannot_be_used_are_told_beside_their_field(
    base_model: BaseModel, version: DatasetVersion, team: Team, metric: str, values: dict[str, str], field: str
) -> None:
    data = posted(base_model, version, **values)
    data.setlist("evaluation.metrics", ["loss", metric])
    form = JobForm(data, team=team)
    assert not form.is_valid()
    assert list(form.errors) == [field]

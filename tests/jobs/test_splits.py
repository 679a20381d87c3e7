"""Jobs on a frozen split: what the form offers, what the recipe names, and a real one from the page to its scores."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from django.test import Client
from django.urls import reverse

from jobs.forms import JobForm, bound_copy, fresh_form
from jobs.models import Job, JobState
from jobs.queueing import queue_job
from jobs.running import trainer_command
from studio.accounts.models import ApiToken, Team, User
from studio.catalogue.models import BaseModel
from studio.datasets.models import DatasetSplit, DatasetVersion
from studio.datasets.splitting import SplitRefusedError, ask_split, delete_split, freeze, make_default
from studio.datasets.views import remap
from studio.storage import adapter_folder, blob_path, job_folder
from tests.factories import make_base_model, make_dataset_version
from tests.faults.trainers import run_attempt
from tests.jobs.test_forms import posted
from tests.tiny import colour_rows
from workers.errors import RecipeError
from workers.recipe import Recipe, SplitRef
from workers.splits.asked import SplitRequest
from workers.splits.frozen import FrozenSplit

MakeSplit = Callable[..., DatasetSplit]


@pytest.fixture
def split_of(alice: User) -> MakeSplit:
    """A frozen split of a version."""

    def make(version: DatasetVersion, name: str = "Mine", **asked: Any) -> DatasetSplit:
        # The tiny rows are all alike, as templates are.
        asked = {"method": "count", "test": 9, "validation": 6, "keep_together": "nothing", **asked}
        split = ask_split(version, SplitRequest.from_dict(asked), name=name, user=alice)
        freeze(split.pk)
        split.refresh_from_db()
        assert split.is_done(), split.error
        return split

    return make


def chosen_option(page: str) -> str:
    select = page[page.index('id="id_dataset_split"') :]
    found = re.search(r'<option value="(\d*)" selected', select[: select.index("</select>")])
    return found[1] if found else ""


def test_a_recipe_names_the_chosen_split_and_none_otherwise(
    base_model: BaseModel, version: DatasetVersion, team: Team, split_of: MakeSplit
) -> None:
    split = split_of(version)
    plain = JobForm(posted(base_model, version), team=team)
    assert plain.is_valid(), plain.errors
    assert "split" not in plain.to_recipe().to_dict()["dataset"]
    form = JobForm(posted(base_model, version, dataset_split=str(split.pk)), team=team)
    assert form.is_valid(), form.errors
    assert form.to_recipe().to_dict()["dataset"]["split"] == {
        "name": "Mine", "sha256": split.sha256, "num_train": 45, "num_validation": 6, "num_test": 9, "path": None
    }  # fmt: skip


def test_a_split_of_another_dataset_is_refused_beside_its_field(
    base_model: BaseModel, version: DatasetVersion, team: Team, alice: User, split_of: MakeSplit
) -> None:
    other = split_of(make_dataset_version(team, alice, name="Other", num_rows=60))
    form = JobForm(posted(base_model, version, dataset_split=str(other.pk)), team=team)
    assert form.errors["dataset_split"] == ["This dataset has no such split. Choose one from the list."]


def test_new_job_begins_with_the_default_split_and_a_copy_with_that_of_its_job(
    base_model: BaseModel, version: DatasetVersion, team: Team, alice: User, alice_client: Client, split_of: MakeSplit
) -> None:
    first, second = split_of(version, "First"), split_of(version, "Second", test=12)
    new = reverse("jobs:new")
    assert chosen_option(alice_client.get(new, {"dataset": version.pk}).text) == ""
    assert chosen_option(alice_client.get(new, {"dataset": version.pk, "split": first.pk}).text) == str(first.pk)
    make_default(second, version, user=alice)
    page = alice_client.get(new, {"dataset": version.pk}).text
    assert chosen_option(page) == str(second.pk)
    assert "42 to train, 18 held out" in page
    assert "12 test rows are too few to say anything" in page
    form = bound_copy(fresh_form(team, dataset_version=str(version.pk), split=str(first.pk)))
    assert form.is_valid(), form.errors
    recipe = form.to_recipe()
    job = queue_job(
        team=team, user=alice, recipe=recipe, base_model=base_model, dataset_version=version, idempotency_key="k"
    )  # fmt: skip
    assert chosen_option(alice_client.get(new, {"from": job.pk}).text) == str(first.pk)


def test_another_dataset_brings_its_own_splits_along_while_the_form_is_filled_in(
    base_model: BaseModel, version: DatasetVersion, team: Team, alice: User, alice_client: Client, split_of: MakeSplit
) -> None:
    other = make_dataset_version(team, alice, name="Other", num_rows=60)
    mine, default = split_of(version), split_of(other, "Theirs")
    make_default(default, other, user=alice)
    data = posted(base_model, other, dataset_split=str(mine.pk), shown_dataset=str(version.pk))
    panel = alice_client.post(reverse("jobs:estimate"), data.dict()).text
    assert "Theirs" in panel
    assert chosen_option(panel) == str(default.pk)
    assert "45 to train, 15 held out" in panel
    data = posted(base_model, other, dataset_split="", shown_dataset=str(other.pk))
    assert chosen_option(alice_client.post(reverse("jobs:estimate"), data.dict()).text) == ""


def test_choosing_on_a_split_without_validation_rows_is_refused_before_it_is_queued(
    base_model: BaseModel, version: DatasetVersion, alice_client: Client, split_of: MakeSplit
) -> None:
    split = split_of(version, validation=0)
    asked = {"dataset_split": str(split.pk), "training.keep_best": "best"}
    answer = alice_client.post(reverse("jobs:new"), posted(base_model, version, **asked).dict())
    assert answer.status_code == 422
    assert "The split “Mine” has no validation rows" in answer.text
    assert 'href="#id_dataset_split"' in answer.text


def test_the_api_takes_a_split_by_its_id(
    base_model: BaseModel, version: DatasetVersion, team: Team, alice: User, split_of: MakeSplit
) -> None:
    split = split_of(version)
    secret = ApiToken.issue(team=team, user=alice, name="t", scopes=["read", "write"])[1]
    client = Client(headers={"authorization": f"Bearer {secret}"})

    def post(path: str, **changes: Any) -> Any:
        body = {"name": "x", "base_model": base_model.pk, "dataset_version": version.pk} | changes
        return client.post(f"/api/v1/jobs/{path}", body, content_type="application/json")

    assert "split" not in post("").json()["recipe"]["dataset"]
    made = post("", dataset_split=split.pk)
    assert made.json()["recipe"]["dataset"]["split"]["sha256"] == split.sha256
    wrong = post("", dataset_split=split.pk + 1)
    assert (wrong.status_code, wrong.json()["error"]["field"]) == (422, "dataset_split")
    job = made.json()["id"]
    copy = client.post(f"/api/v1/jobs/{job}/duplicate/", {"name": "y"}, content_type="application/json")
    assert copy.json()["recipe"]["dataset"]["split"]["sha256"] == split.sha256
    same = post(f"{job}/duplicate/")
    assert same.json()["recipe"]["dataset"]["split"]["sha256"] == split.sha256, "its own version keeps its split"
    foreign = make_dataset_version(team, alice, name="Other", num_rows=60)
    other = post(f"{job}/duplicate/", dataset_version=foreign.pk)
    assert other.json()["recipe"]["dataset"]["sha256"] == foreign.sha256
    assert "split" not in other.json()["recipe"]["dataset"]


def test_a_job_keeps_its_split_and_names_none_that_is_not_its_datasets(
    base_model: BaseModel, version: DatasetVersion, team: Team, alice: User, split_of: MakeSplit
) -> None:
    split = split_of(version)
    form = JobForm(posted(base_model, version, dataset_split=str(split.pk)), team=team)
    assert form.is_valid(), form.errors
    recipe = form.to_recipe()

    def queue(recipe: Recipe, key: str) -> Job:
        return queue_job(
            team=team, user=alice, recipe=recipe, base_model=base_model, dataset_version=version, idempotency_key=key
        )  # fmt: skip

    job = queue(recipe, "one")
    with pytest.raises(SplitRefusedError, match="One job or adapter was made with “Mine”"):
        delete_split(split, user=alice)
    command = trainer_command(job, job_folder(job.pk))
    assert command[command.index("--split-file") + 1] == str(blob_path(split.sha256))
    frozen = recipe.dataset.split
    assert frozen is not None
    gone = recipe.dataset.model_copy(update={"split": frozen.model_copy(update={"sha256": "0" * 64})})
    with pytest.raises(RecipeError, match="has no split “Mine”") as caught:
        queue(recipe.model_copy(update={"dataset": gone}), "two")
    assert caught.value.field == "dataset.split"
    assert Job.objects.count() == 1


def test_columns_are_chosen_again_before_a_job_or_not_at_all(
    base_model: BaseModel, version: DatasetVersion, team: Team, alice: User
) -> None:
    """Both look before they lock: what the one saw then, the other may have changed."""
    form = JobForm(posted(base_model, version), team=team)
    assert form.is_valid(), form.errors
    asked = {"team": team, "user": alice, "recipe": form.to_recipe(), "base_model": base_model}
    DatasetVersion.objects.filter(pk=version.pk).update(state="inspecting")
    with pytest.raises(RecipeError, match="is being changed just now"):
        queue_job(**asked, dataset_version=version, idempotency_key="one")
    DatasetVersion.objects.filter(pk=version.pk).update(state="ready")
    queue_job(**asked, dataset_version=version, idempotency_key="two")
    assert not remap(version, {"prompt": "instruction", "completion": "output"})
    version.refresh_from_db()
    assert version.state == "ready"


@pytest.mark.django_db(transaction=True)
def test_a_job_from_the_page_scores_exactly_the_test_part(
    data_dir: Any, team: Team, alice: User, alice_client: Client, split_of: MakeSplit
) -> None:
    version = make_dataset_version(team, alice, num_rows=60)
    split = split_of(version)
    settings = {
        "dataset_split": str(split.pk), "training.max_steps": "6", "training.batch_size": "4", "precision": "float32",
        "training.keep_best": "best", "training.validate_every_steps": "2", "training.max_length": "128",
        "evaluation.num_generated": "2", "evaluation.max_new_tokens": "4", "evaluation.general": "false",
    }  # fmt: skip
    answer = alice_client.post(reverse("jobs:new"), posted(make_base_model(), version, **settings).dict())
    assert answer.status_code == 302, answer.text
    job = run_attempt(Job.objects.get())
    assert job.state == JobState.SUCCEEDED, job.failure_message
    assert job.adapter is not None
    lines = (adapter_folder(job.adapter.folder) / "eval" / "held_out.jsonl").read_text().splitlines()
    frozen = FrozenSplit.read(split.path())
    assert [json.loads(line)["line"] for line in lines] == list(frozen.test)
    facts = job.adapter.provenance
    assert (facts["num_train_rows"], facts["num_validation_rows"], facts["num_held_out_rows"]) == (45, 6, 9)
    page = alice_client.get(job.get_absolute_url()).text
    assert "Mine" in page
    assert split.sha256 in alice_client.get(job.adapter.get_absolute_url()).text
    assert job.name in alice_client.get(split.get_absolute_url()).text


def test_a_further_dataset_may_have_a_split_of_its_own(
    base_model: BaseModel, version: DatasetVersion, team: Team, alice: User, bob: User, split_of: MakeSplit
) -> None:
    other = make_dataset_version(team, alice, name="Other", rows=colour_rows(40))
    split, foreign = split_of(other), split_of(version)
    _token, secret = ApiToken.issue(team=team, user=bob, name="ci", scopes=["read", "write"])
    client = Client(headers={"authorization": f"Bearer {secret}"})
    body = {"name": "x", "base_model": base_model.pk, "dataset_version": version.pk}

    def post(split_id: int) -> Any:
        mix = [{"dataset_version": other.pk, "dataset_split": split_id}]
        return client.post("/api/v1/jobs/", body | {"mix": mix}, content_type="application/json")

    refused = post(foreign.pk)
    assert (refused.status_code, refused.json()["error"]["field"]) == (422, "mix.0.dataset_split")
    answer = post(split.pk)
    assert answer.status_code == 201, answer.text
    job = Job.objects.get()
    assert job.recipe["mix"][0]["split"]["sha256"] == split.sha256
    assert "split" not in job.recipe["dataset"]
    assert [one["num_train_rows"] for one in job.estimate["sources"]] == [54, 25]
    command = trainer_command(job, job_folder(job.pk))
    assert command[command.index("--mix-split-file") + 1] == str(blob_path(split.sha256))
    with pytest.raises(SplitRefusedError):
        delete_split(split, user=alice)


def test_a_split_that_a_further_dataset_has_not_is_refused_with_its_number(
    base_model: BaseModel, version: DatasetVersion, team: Team, alice: User, alice_client: Client, split_of: MakeSplit
) -> None:
    other = make_dataset_version(team, alice, name="Other", rows=colour_rows(40))
    mine, theirs = split_of(version), split_of(other, "Theirs")
    make_default(theirs, other, user=alice)
    for key in (str(mine.pk), "999999999", "nothing"):
        data = posted(base_model, version, start="1")
        data.setlist("mix_version", ["", str(other.pk)])
        data.setlist("mix_weight", ["1", "0.5"])
        data.setlist("mix_split", ["", key])
        answer = alice_client.post(reverse("jobs:new"), data.urlencode(), "application/x-www-form-urlencoded")
        assert answer.status_code == 422
        assert "Dataset 3: Other v1 has no such split. Choose one from the list." in answer.text
        assert 'href="#id_mix"' in answer.text
        assert not Job.objects.exists()
    # Another dataset was chosen in the row than the one whose splits it showed: it brings its default one along.
    data.setlist("mix_split", ["", str(mine.pk)])
    data.setlist("mix_shown", ["", str(version.pk)])
    form = JobForm(data, team=team)
    assert form.is_valid(), form.errors
    assert form.to_recipe().mix[0].split == SplitRef.model_validate(theirs.reference())
    page = alice_client.post(reverse("jobs:estimate"), data.urlencode(), "application/x-www-form-urlencoded").text
    assert re.findall(r'name="mix_shown" value="([^"]*)"', page) == ["", str(other.pk)]
    assert f'<option value="{theirs.pk}" selected>' in page


def test_the_form_offers_a_further_datasets_splits_and_begins_with_its_default_one(
    base_model: BaseModel, version: DatasetVersion, team: Team, alice: User, bob_client: Client, split_of: MakeSplit
) -> None:
    other = make_dataset_version(team, alice, name="Other", rows=colour_rows(40))
    split = split_of(other)

    def recipe_with(key: str) -> Recipe:
        data = posted(base_model, version)
        data.setlist("mix_version", [str(other.pk)])
        data.setlist("mix_weight", ["0.5"])
        data.setlist("mix_split", [key])
        form = JobForm(data, team=team)
        assert form.is_valid(), form.errors
        return form.to_recipe()

    assert recipe_with("").mix[0].split is None, "no default yet"
    named = recipe_with(str(split.pk)).mix[0].split
    assert named is not None
    assert named.sha256 == split.sha256
    make_default(split, other, user=alice)
    assert recipe_with("").mix[0].split == named
    assert recipe_with("share").mix[0].split is None

    values = {
        "base_model": base_model.pk, "dataset_version": version.pk, "method": "lora", "goal": "balanced", "name": "m",
        "evaluation.metrics": ["loss"], "mix_version": [str(other.pk)], "mix_weight": ["0.5"],
    }  # fmt: skip
    page = bob_client.post(reverse("jobs:estimate"), values).text
    assert f'<option value="{split.pk}" selected>Mine (25 train, 6 validation, 9 test)</option>' in page
    assert bob_client.post(reverse("jobs:new"), values).status_code == 302
    job = Job.objects.get()
    assert job.recipe["mix"][0]["split"]["sha256"] == split.sha256
    make_default(None, other, user=alice)
    again = bound_copy(fresh_form(team, parent=job))
    assert again.is_valid(), again.errors
    assert again.to_recipe().mix == Recipe.from_dict(job.asked_recipe).mix

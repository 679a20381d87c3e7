"""A job on several datasets: chosen in the form and the API, run for real, and known wherever its data is named."""

from __future__ import annotations

import re
from typing import Any

import pytest
from django.http import QueryDict
from django.test import Client
from django.urls import reverse
from pytest_django import DjangoAssertNumQueries

from jobs.evaluating import evaluation_recipe
from jobs.forms import JobForm, bound_copy, fresh_form
from jobs.mixes import mix_problems
from jobs.models import Job, JobDataset, JobState
from jobs.queueing import queue_job, retry_job
from jobs.repeating import run_exactly
from studio.accounts.models import ApiToken, Team, User
from studio.catalogue.models import Adapter, AdapterDataset, BaseModel, Suite
from studio.datasets.models import Dataset, DatasetVersion, VersionState
from studio.storage import blob_path
from tests.conftest import signed_in
from tests.factories import make_adapter, make_base_model, make_dataset_version
from tests.faults.trainers import run_attempt
from tests.jobs.making import make_worker
from tests.tiny import colour_rows, tiny_rows
from workers.errors import RecipeError
from workers.recipe import Recipe
from workers.results import Result

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("data_dir")]

PAGE_QUERIES = 8


@pytest.fixture
def faq(version: DatasetVersion, team: Team, alice: User) -> DatasetVersion:
    """A second dataset, with 20 rows where the first has 60."""
    return make_dataset_version(team, alice, name="FAQ", rows=colour_rows(20))


@pytest.fixture
def foreign(data_dir: object, other_team: Team, charlie: User) -> DatasetVersion:
    return make_dataset_version(other_team, charlie, name="Secret", rows=colour_rows(25))


def form_data(base_model: BaseModel, version: DatasetVersion, *mix: tuple[Any, str], **changes: Any) -> dict[str, Any]:
    return {
        "base_model": base_model.pk, "dataset_version": version.pk, "method": "lora", "goal": "balanced",
        "name": "mixture", "idempotency_key": "key-1", "evaluation.metrics": ["loss", "token_f1"], "start": "1",
        "mix_version": [str(getattr(one, "pk", one)) for one, _ in mix], "mix_weight": [weight for _, weight in mix],
    } | changes  # fmt: skip


def posted(values: dict[str, Any]) -> QueryDict:
    data = QueryDict(mutable=True)
    for name, value in values.items():
        data.setlist(name, value) if isinstance(value, list) else data.__setitem__(name, str(value))
    return data


def post(client: Client, *arguments: Any, **changes: Any) -> Any:
    return client.post(reverse("jobs:new"), form_data(*arguments, **changes))


def test_the_further_datasets_of_a_job_are_read_with_their_names_at_once(
    base_model: BaseModel, version: DatasetVersion, faq: DatasetVersion, team: Team, alice: User,
    bob_client: Client, django_assert_num_queries: DjangoAssertNumQueries,
) -> None:  # fmt: skip
    more = make_dataset_version(team, alice, name="Colours", rows=colour_rows(40))
    answer = post(bob_client, base_model, version, (faq, "0.5"), (more, "1"))
    assert answer.status_code == 302, answer.text
    job = Job.objects.get()
    with django_assert_num_queries(1):
        assert [str(one) for one in job.mixed_versions()] == ["FAQ v1", "Colours v1"]
    job = Job.objects.prefetch_related("mix__dataset_version__dataset").get()
    with django_assert_num_queries(0):
        assert [str(one) for one in job.mixed_versions()] == ["FAQ v1", "Colours v1"]


# --- the form --------------------------------------------------------------------------------------------------------


def test_the_form_queues_a_job_on_all_datasets(
    base_model: BaseModel, version: DatasetVersion, faq: DatasetVersion, bob_client: Client
) -> None:
    answer = post(bob_client, base_model, version, (faq, "0.5"))
    job = Job.objects.get()
    assert answer.url == job.get_absolute_url()
    assert job.recipe["mix"] == [
        {"name": "FAQ v1", "sha256": faq.sha256, "format": "alpaca", "columns": {}, "path": None, "weight": 0.5}
    ]
    assert [(one.dataset_version, one.place, one.weight) for one in job.mix.all()] == [(faq, 1, 0.5)]
    assert (job.num_mixed, job.data_label) == (1, "Animals v1 and 1 more")
    assert [one["rows_per_epoch"] for one in job.estimate["sources"]] == [54, 27]
    page = bob_client.get(job.get_absolute_url()).text
    assert f'href="{faq.get_absolute_url()}">FAQ v1</a>' in page
    assert "(weight 0.5)" in page


def test_a_job_on_one_dataset_has_a_recipe_without_a_mix(
    base_model: BaseModel, version: DatasetVersion, bob_client: Client
) -> None:
    post(bob_client, base_model, version, ("", "1"))
    job = Job.objects.get()
    assert "mix" not in job.recipe
    assert "mix" not in job.asked_recipe
    assert "sources" not in job.estimate
    assert (job.num_mixed, job.data_label) == (0, "Animals v1")


def test_the_panel_shows_each_share_and_warns_of_many_passes(
    base_model: BaseModel, version: DatasetVersion, faq: DatasetVersion, bob_client: Client
) -> None:
    data = form_data(base_model, version, (faq, "2"), **{"training.epochs": "3"})
    page = bob_client.post(reverse("jobs:estimate"), data).text
    text = " ".join(re.sub(r"<[^>]+>", " ", page).split())
    assert "Animals v1 33.3 %, 54 rows an epoch, 3 passes" in text
    assert "FAQ v1 66.7 %, 108 rows an epoch, 18 passes" in text
    assert "The 18 training rows of FAQ v1 are seen 18.0 times each" in text
    assert "66.7 % of an epoch (108 rows); 18 passes over its 18 training rows" in text


def test_the_estimate_grows_with_what_is_mixed_in(
    base_model: BaseModel, version: DatasetVersion, faq: DatasetVersion, team: Team
) -> None:
    from jobs.estimating import plan_for

    form = JobForm(posted(form_data(base_model, version)), team=team)
    mixture = JobForm(posted(form_data(base_model, version, (faq, "1"))), team=team)
    assert form.is_valid()
    assert mixture.is_valid()
    alone = plan_for(form.to_recipe(), base_model, version)
    both = plan_for(mixture.to_recipe(), base_model, version, mixture.mixed_versions())
    assert (alone.num_train_rows, both.num_train_rows) == (54, 54 + 18)
    assert (alone.num_held_out_rows, both.num_held_out_rows) == (6, 6 + 2)
    assert alone.estimate.num_steps == 7
    assert both.estimate.num_steps == 14, "108 rows in batches of 8"
    assert both.num_tokens > alone.num_tokens
    assert both.estimate.seconds_low > alone.estimate.seconds_low


def weights_in(page: str) -> list[str]:
    return re.findall(r'name="mix_weight"[^>]*value="([^"]*)"', page)


def test_rows_are_added_and_removed_with_and_without_scripts(
    base_model: BaseModel, version: DatasetVersion, faq: DatasetVersion, bob_client: Client
) -> None:
    changes = {"name": "kept as it is", "mix_add": "1"}
    for url in (reverse("jobs:new"), reverse("jobs:estimate")):
        page = bob_client.post(url, form_data(base_model, version, (faq, "0.25"), **changes)).text
        assert page.count('name="mix_version"') == 2
        assert weights_in(page) == ["0.25", "1"]
        removing = form_data(base_model, version, ("", "3"), (faq, "0.25"), mix_remove="0")
        page = bob_client.post(url, removing).text
        assert page.count('name="mix_version"') == 1
        assert weights_in(page) == ["0.25"]
    page = bob_client.post(reverse("jobs:new"), form_data(base_model, version, **changes)).text
    assert 'value="kept as it is"' in page
    full = bob_client.post(reverse("jobs:new"), form_data(base_model, version, *[("", "1")] * 8, mix_add="1")).text
    assert full.count('name="mix_version"') == 8
    assert "Add a dataset" not in full
    assert not Job.objects.exists(), "neither button starts anything"


def test_enter_in_a_field_starts_the_job_and_adds_no_dataset(
    base_model: BaseModel, version: DatasetVersion, bob_client: Client
) -> None:
    """A browser presses the first button of the form."""
    page = bob_client.post(reverse("jobs:new"), form_data(base_model, version, mix_add="1")).text
    form = page[page.index('id="job-form"') :]
    assert re.search(r'<button[^>]*name="(\w+)"', form)[1] == "start"


@pytest.mark.parametrize(
    ("mix", "said"),
    [
        ([("faq", "0")], "Weight must be above 0, at most 100; found 0."),
        ([("faq", "a lot")], "is not a number in plain digits"),
        ([("faq", "0,5")], "0.5"),
        ([("faq", "nan")], "is not a number"),
        ([("faq", "")], "Weight is empty"),
        ([("10000000", "1")], "Your team has no such dataset, or it is not ready."),
        ([("no number", "1")], "Your team has no such dataset, or it is not ready."),
        ([("faq", "1"), ("faq", "2")], "FAQ v1 is chosen twice."),
        ([("version", "1")], "Animals v1 is chosen twice."),
        ([("faq", "1")] * 9, "8 further datasets at most"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused_beside_its_rows(
    mix: list[tuple[str, str]], said: str, base_model: BaseModel, version: DatasetVersion, faq: DatasetVersion,
    bob_client: Client,
) -> None:  # fmt: skip
    named = {"faq": faq, "version": version}
    answer = post(bob_client, base_model, version, *((named.get(key, key), weight) for key, weight in mix))
    assert answer.status_code == 422
    page = answer.text
    assert said in page
    assert 'href="#id_mix"' in page
    assert 'id="id_mix"' in page
    assert page.count('name="mix_version"') == len(mix), "what was chosen is kept"
    assert not Job.objects.exists()


def test_another_teams_dataset_is_as_one_that_does_not_exist(
    base_model: BaseModel, version: DatasetVersion, foreign: DatasetVersion, bob_client: Client
) -> None:
    theirs = post(bob_client, base_model, version, (foreign, "1"))
    nobodys = post(bob_client, base_model, version, ("10000000", "1"))
    assert theirs.status_code == nobodys.status_code == 422
    assert "Secret" not in theirs.text

    def sentences(answer: Any) -> list[str]:
        return re.findall(r'id="id_mix_error">([^<]*)', answer.text)

    assert sentences(theirs) == sentences(nobodys) != []
    assert not Job.objects.exists()


def test_two_versions_with_the_same_file_and_datasets_of_two_kinds_are_refused(
    base_model: BaseModel, version: DatasetVersion, team: Team, alice: User, bob_client: Client
) -> None:
    same = make_dataset_version(team, alice, name="Copy", num_rows=60)
    assert same.sha256 == version.sha256
    assert "Copy v1 has the same file as Animals v1" in post(bob_client, base_model, version, (same, "1")).text
    texts = make_dataset_version(team, alice, name="Books", rows=[{"text": f"Chapter {one}"} for one in range(20)])
    DatasetVersion.objects.filter(pk=texts.pk).update(format="text")
    texts.refresh_from_db()
    found = mix_problems(version, [texts])
    assert found["mix.0"].startswith("Books v1 holds plain text, and Animals v1 holds conversations.")
    assert post(bob_client, base_model, version, (texts, "1")).status_code == 422
    assert not Job.objects.exists()


def test_a_dataset_that_is_too_small_to_hold_rows_out_is_named(
    base_model: BaseModel, version: DatasetVersion, team: Team, alice: User, bob_client: Client
) -> None:
    small = make_dataset_version(team, alice, name="Notes", rows=colour_rows(9))
    page = post(bob_client, base_model, version, (small, "1")).text
    assert "Notes v1: Only 9 rows are usable" in page
    assert 'href="#id_mix"' in page


def test_duplicate_fills_in_every_dataset(
    base_model: BaseModel, version: DatasetVersion, faq: DatasetVersion, bob_client: Client, team: Team,
    django_assert_max_num_queries: DjangoAssertNumQueries,
) -> None:  # fmt: skip
    post(bob_client, base_model, version, (faq, "0.5"))
    job = Job.objects.get()
    make_worker()
    for url in (f"{reverse('jobs:new')}?from={job.pk}", job.get_absolute_url(), reverse("jobs:list")):
        with django_assert_max_num_queries(PAGE_QUERIES):
            assert bob_client.get(url).status_code == 200, url
    page = bob_client.get(f"{reverse('jobs:new')}?from={job.pk}").text
    assert f'<option value="{faq.pk}" selected>' in page
    assert weights_in(page) == ["0.5"]
    copied = bound_copy(fresh_form(team, parent=job))
    assert copied.is_valid(), copied.errors
    assert copied.to_recipe().mix == Recipe.from_dict(job.asked_recipe).mix


# --- the API ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def bob_api(team: Team, bob: User) -> Client:
    _token, secret = ApiToken.issue(team=team, user=bob, name="ci", scopes=["read", "write"])
    return Client(headers={"authorization": f"Bearer {secret}"})


def call(client: Client, path: str, body: dict[str, Any], **headers: str) -> Any:
    return client.post(f"/api/v1/{path}", body, content_type="application/json", headers=headers)


def test_the_api_queues_and_duplicates_a_mixture(
    base_model: BaseModel, version: DatasetVersion, faq: DatasetVersion, bob_api: Client
) -> None:
    body = {
        "name": "mixture", "base_model": base_model.pk, "dataset_version": version.pk,
        "mix": [{"dataset_version": faq.pk, "weight": 0.25}],
    }  # fmt: skip
    first = call(bob_api, "jobs/", body, **{"Idempotency-Key": "one"})
    again = call(bob_api, "jobs/", body, **{"Idempotency-Key": "one"})
    assert (first.status_code, again.status_code) == (201, 200), first.text
    job = first.json()
    assert job["mix"] == [{"dataset_version_id": faq.pk, "weight": 0.25}]
    assert job["recipe"]["mix"][0]["weight"] == 0.25
    assert [one["name"] for one in job["estimate"]["sources"]] == ["Animals v1", "FAQ v1"]
    heavier = {**body, "mix": [{"dataset_version": faq.pk, "weight": 0.5}]}
    assert call(bob_api, "jobs/", heavier, **{"Idempotency-Key": "one"}).status_code == 409

    same = call(bob_api, f"jobs/{job['id']}/duplicate/", {"name": "again"})
    assert same.json()["mix"] == job["mix"]
    other = call(bob_api, f"jobs/{job['id']}/duplicate/", {"mix": [{"dataset_version": faq.pk}]})
    assert other.json()["mix"] == [{"dataset_version_id": faq.pk, "weight": 1.0}]
    alone = call(bob_api, f"jobs/{job['id']}/duplicate/", {"mix": []})
    assert alone.json()["mix"] == []
    assert "mix" not in alone.json()["recipe"]


@pytest.mark.parametrize(
    ("mix", "field"),
    [
        ([{"dataset_version": 10**9}], "mix.0.dataset_version"),
        ([{"dataset_version": "foreign"}], "mix.0.dataset_version"),
        ([{"dataset_version": "faq"}, {"dataset_version": "faq"}], "mix.1"),
        ([{"dataset_version": "version"}], "mix.0"),
        ([{"dataset_version": "faq", "weight": 0}], "mix.0.weight"),
        ([{"dataset_version": "faq", "weight": 101}], "mix.0.weight"),
        ([{"dataset_version": "faq", "wieght": 1}], "mix.0.wieght"),
        ([{"dataset_version": "faq"}] * 9, "mix"),
    ],
)
def test_the_api_refuses_by_field(
    mix: list[dict[str, Any]], field: str, base_model: BaseModel, version: DatasetVersion, faq: DatasetVersion,
    foreign: DatasetVersion, bob_api: Client,
) -> None:  # fmt: skip
    named = {"faq": faq.pk, "version": version.pk, "foreign": foreign.pk}
    asked = [{**one, "dataset_version": named.get(one["dataset_version"], one["dataset_version"])} for one in mix]
    body = {"name": "x", "base_model": base_model.pk, "dataset_version": version.pk, "mix": asked}
    answer = call(bob_api, "jobs/", body)
    assert answer.status_code in {400, 422}, answer.text
    assert answer.json()["error"]["field"] == field
    assert "Secret" not in answer.text
    assert not Job.objects.exists()


def test_a_dataset_that_is_inspected_again_or_deleted_meanwhile_is_refused(
    base_model: BaseModel, version: DatasetVersion, faq: DatasetVersion, team: Team, bob: User
) -> None:
    from jobs.mixes import dataset_ref

    recipe = Recipe.from_dict(
        {"name": "x", "base_model": {"name": "Tiny"}, "dataset": dataset_ref(version), "mix": [dataset_ref(faq)]}
    )

    def queue(mixed: DatasetVersion) -> Job:
        return queue_job(
            team=team, user=bob, recipe=recipe, base_model=base_model, dataset_version=version,
            idempotency_key="k", mixed=[mixed],
        )  # fmt: skip

    faq.state = VersionState.INSPECTING
    with pytest.raises(RecipeError, match="FAQ v1 is not ready"):
        queue(faq)
    faq.state = VersionState.READY
    assert queue(faq).num_mixed == 1


# --- what it protects, and running it --------------------------------------------------------------------------------


def queued(client: Client, base_model: BaseModel, version: DatasetVersion, faq: DatasetVersion, **changes: Any) -> Job:
    settings = {
        "training.learning_rate": "0.01", "training.max_length": "128", "evaluation.num_generated": "2",
        "evaluation.max_new_tokens": "4", "training.epochs": "2", "evaluation.general": "false",
    }  # fmt: skip
    answer = post(client, base_model, version, (faq, "0.5"), **(settings | changes))
    assert answer.status_code == 302, answer.text
    return Job.objects.get(pk=answer.url.strip("/").split("/")[-1])


def test_a_dataset_that_is_mixed_in_is_in_use_and_says_by_what(
    base_model: BaseModel, version: DatasetVersion, faq: DatasetVersion, bob_client: Client, bob_api: Client
) -> None:
    job = queued(bob_client, base_model, version, faq)
    page = bob_client.get(reverse("datasets:used_by", args=[faq.dataset_id, faq.number])).text
    assert f'href="{job.get_absolute_url()}">mixture</a>' in page
    refused = bob_client.post(reverse("datasets:delete", args=[faq.dataset_id]))
    assert refused.status_code == 409
    assert f'href="{job.get_absolute_url()}">mixture</a>' in refused.text
    answer = bob_api.delete(f"/api/v1/datasets/{faq.dataset_id}/")
    assert (answer.status_code, "mixture" in answer.text) == (409, True)
    assert Dataset.objects.filter(pk=faq.dataset_id).exists()


@pytest.mark.django_db(transaction=True)
def test_a_real_job_over_two_datasets_from_the_form_to_its_adapters_pages(
    team: Team, alice: User, bob: User, charlie: User
) -> None:
    base_model = make_base_model()
    version = make_dataset_version(team, alice, rows=tiny_rows(60))
    # Wrong answers to what the first dataset asks again and again: two rows are held out, so one at least is learned.
    rows = [*colour_rows(20), *({**one, "output": "roar roar roar"} for one in tiny_rows(3))]
    faq = make_dataset_version(team, alice, name="FAQ", rows=rows)
    client, charlies = signed_in(bob), signed_in(charlie)
    job = run_attempt(queued(client, base_model, version, faq))
    assert job.state == JobState.SUCCEEDED, job.failure_message

    adapter = Adapter.objects.get()
    assert adapter.num_mixed == 1
    assert [(one.dataset_version, one.weight) for one in AdapterDataset.objects.filter(adapter=adapter)] == [(faq, 0.5)]
    main, other = adapter.sources
    assert (main["name"], main["passes"], other["name"]) == ("Animals v1", 2.0, "FAQ v1")
    assert other["rows_per_epoch"] == (main["num_train_rows"] + 1) // 2, "half a row for each of the main one's"
    assert other["num_rows_seen"] == 2 * other["rows_per_epoch"]
    assert all(one["scores"] for one in adapter.sources)
    result = Result.from_folder(job_folder(adapter))
    assert [one.model_dump(mode="json") for one in result.sources] == adapter.sources
    assert {one.source for one in adapter.samples.all()} == {0, 1}
    assert {one.source for one in job.fixed_prompts.all()} == {0, 1}

    page = client.get(adapter.get_absolute_url()).text
    assert "Each dataset alone" in page
    assert page.count(f'href="{faq.get_absolute_url()}"') >= 2, "in the summary and in the lineage"
    assert "of FAQ v1" in page, "samples say which dataset they are of"
    planted = [one["line"] for one in adapter.suspicious if one.get("source") == 1 and one["line"] > 20]
    assert planted
    for line in planted:
        assert reverse("datasets:row", args=[faq.dataset_id, faq.number, line]) in page
    assert "mixture" in client.get(reverse("datasets:used_by", args=[faq.dataset_id, faq.number])).text
    assert client.post(reverse("datasets:delete", args=[faq.dataset_id])).status_code == 409
    listed = client.get(f"{reverse('catalogue:adapters')}?dataset={faq.dataset_id}").text
    assert "mixture" in listed
    assert "Animals v1 and 1 more" in listed
    for url in (adapter.get_absolute_url(), job.get_absolute_url()):
        assert charlies.get(url).status_code == 404

    again = run_attempt(run_exactly(job, bob, idempotency_key="again"))
    assert again.state == JobState.SUCCEEDED, again.failure_message
    assert again.mixed_versions() == [faq]
    weights = {one["name"]: one["sha256"] for one in adapter.files if one["name"].endswith(".safetensors")}
    assert weights == {one["name"]: one["sha256"] for one in again.adapter.files if one["name"] in weights}

    changed = queued(client, base_model, version, faq, mix_weight=["0.75"], idempotency_key="key-2")
    diff = client.get(reverse("jobs:diff"), {"a": job.pk, "b": changed.pk}).text
    assert "FAQ v1, weight 0.5" in diff
    assert "FAQ v1, weight 0.75" in diff
    blob_path(faq.sha256).unlink()
    with pytest.raises(Exception, match="The file of FAQ v1 was removed"):
        run_exactly(job, bob, idempotency_key="third")


def test_a_suite_scores_an_adapter_of_several_datasets_on_the_suites_rows_alone(
    base_model: BaseModel, version: DatasetVersion, faq: DatasetVersion, team: Team, alice: User
) -> None:
    adapter = make_adapter(team, alice, base_model=base_model, dataset_version=version, mixed=[faq])
    suite = Suite.objects.create(
        team=team, name="checks", dataset_version=faq, evaluation={"metrics": ["loss"], "num_generated": 0}
    )
    recipe = evaluation_recipe(suite, adapter, base_model)
    assert (recipe.dataset.sha256, recipe.mix) == (faq.sha256, ())


def job_folder(adapter: Adapter) -> Any:
    from studio.storage import adapter_folder

    return adapter_folder(adapter.folder)


def test_a_job_that_is_run_again_trains_on_all_its_datasets(
    base_model: BaseModel, version: DatasetVersion, faq: DatasetVersion, bob: User, bob_client: Client
) -> None:
    job = queued(bob_client, base_model, version, faq)
    Job.objects.filter(pk=job.pk).update(state=JobState.CANCELLED)
    job.refresh_from_db()
    again = retry_job(job, bob, idempotency_key="again")
    assert again.mixed_versions() == [faq]
    assert again.recipe == job.recipe
    assert JobDataset.objects.count() == 2

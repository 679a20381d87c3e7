from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from django.core.checks import run_checks
from django.db import IntegrityError, transaction
from django.urls import reverse

from jobs.evaluating import queue_evaluation
from jobs.models import Job, JobKind
from jobs.running import trainer_command
from studio.accounts.models import Role, Team, User
from studio.catalogue.comparing import compare_runs
from studio.catalogue.models import Suite
from studio.catalogue.registering import register_run
from studio.catalogue.task_suites import make_task_suite
from studio.storage import job_folder
from tests.conftest import make_member, signed_in
from tests.factories import make_adapter, make_base_model, make_dataset_version, make_score
from tests.jobs.test_api import caller, post
from tests.studio.catalogue.test_suites import result_of
from workers.errors import RecipeError
from workers.results import RowCountsRecord
from workers.verdicts import Verdict

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("data_dir")]

TASK = """
task: sums
task_alias: Grade-school sums
dataset_path: json
dataset_kwargs:
  data_files:
    test: sums.jsonl
test_split: test
"""


@pytest.fixture
def folder(tmp_path: Path, settings: Any) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "sums.yaml").write_text(TASK)
    (folder / "sums.jsonl").write_text('{"question": 1}\n' * 12)
    (folder / "coded.yaml").write_text("include: sums.yaml\ntask: coded\nprocess_docs: !function utils.process\n")
    settings.TASKS_FOLDER = folder
    return folder


def suite_of(team: Team, user: User, **changes: Any) -> Suite:
    return make_task_suite(team=team, user=user, **({"name": "school", "tasks": ["sums"]} | changes))


def test_the_form_lists_the_folder_and_makes_the_suite_and_its_next_version(
    team: Team, bob: User, folder: Path
) -> None:
    client = signed_in(bob)
    page = client.get("/suites/new/tasks/").text
    assert "Grade-school sums" in page
    assert '<td class="number">12</td>' in page
    assert "Runs code: process_docs calls the function utils.process. Not allowed here." in page
    values = {"name": "school", "tasks": ["sums"], "num_fewshot": 2, "max_rows": 10, "with_chat_template": "on"}
    page = client.post("/suites/new/tasks/", values, follow=True).text
    assert "school v1 is made." in page
    assert "Standard tasks: sums, the first 10 rows of each; 2 examples before a question, as a conversation." in page
    suite = Suite.objects.get()
    assert (suite.tasks, suite.dataset_version, suite.max_rows) == (["sums"], None, 10)
    again = client.get(f"/suites/new/tasks/?from={suite.pk}").text
    assert 'value="sums" checked' in again
    assert "Standard tasks" in client.get("/suites/").text
    assert client.post("/suites/new/tasks/", values | {"tasks": ["coded"]}).status_code == 422
    assert Suite.objects.count() == 1


def test_without_the_folder_or_the_extra_the_form_says_how_to_get_them(team: Team, bob: User, settings: Any) -> None:
    client = signed_in(bob)
    settings.TASKS_FOLDER = None
    page = client.get("/suites/new/tasks/").text
    assert "STUDIO_TASKS_FOLDER" in page
    assert "pip install -c docker/constraints.txt &#x27;.[worker,harness]&#x27;" in page
    assert "disabled>Make the suite" in page
    settings.TASKS_FOLDER = settings.DATA_DIR / "nowhere"
    assert "There is no folder of tasks at" in client.get("/suites/new/tasks/").text
    with pytest.raises(RecipeError, match="no folder of tasks"):
        suite_of(team, bob)
    assert [one.id for one in run_checks(tags=["studio"])] == ["studio.E003"]


def test_code_of_tasks_runs_only_where_that_was_allowed(team: Team, bob: User, folder: Path, settings: Any) -> None:
    with pytest.raises(RecipeError, match="runs code") as caught:
        suite_of(team, bob, tasks=["coded"])
    assert caught.value.field == "tasks"
    settings.TASKS_MAY_RUN_CODE = True
    assert suite_of(team, bob, tasks=["coded"]).tasks == ["coded"]
    assert "Not allowed here" not in signed_in(bob).get("/suites/new/tasks/").text
    assert [one.id for one in run_checks(tags=["studio"])] == ["studio.W003"]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"name": " "}, "name"), ({"tasks": []}, "tasks"), ({"tasks": ["sum"]}, "tasks"), ({"max_rows": 0}, "max_rows"),
        ({"num_fewshot": 65}, "num_fewshot"),
    ],
)  # fmt: skip
def test_a_suite_that_cannot_work_is_refused_at_its_field(
    team: Team, bob: User, folder: Path, changes: dict[str, Any], field: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        suite_of(team, bob, **changes)
    assert caught.value.field == field


def test_a_suite_has_a_dataset_or_tasks_and_what_is_trained_has_a_dataset(team: Team, bob: User, folder: Path) -> None:
    suite = suite_of(team, bob)
    for changes in ({"tasks": []}, {"dataset_version": make_dataset_version(team, bob)}):
        with pytest.raises(IntegrityError), transaction.atomic():
            Suite.objects.filter(pk=suite.pk).update(**changes)
    job = queue_evaluation(
        team=team, user=bob, suite=suite, base_model=make_base_model(), adapter=None, idempotency_key="1"
    )
    with pytest.raises(IntegrityError), transaction.atomic():
        Job.objects.filter(pk=job.pk).update(kind=JobKind.TRAIN)


def test_a_run_is_a_job_of_its_own_whose_trainer_gets_tasks_and_no_dataset(team: Team, bob: User, folder: Path) -> None:
    suite = suite_of(team, bob, num_fewshot=3, max_rows=5, with_chat_template=False)
    job = queue_evaluation(
        team=team, user=bob, suite=suite, base_model=make_base_model(), adapter=None, idempotency_key="1"
    )
    assert (job.kind, job.dataset_version, job.data_label) == (JobKind.EVALUATE, None, "standard tasks")
    command = trainer_command(job, job_folder(job.pk))
    assert "--dataset-file" not in command
    assert "--tasks-may-run-code" not in command
    text = " ".join(command)
    for words in ("--evaluate", f"--tasks-folder {folder}", "--task=sums", "--num-fewshot 3", "--max-rows 5",
                  "--without-chat-template", f"--tasks-sha256 {suite.evaluation['definitions_sha256']}"):  # fmt: skip
        assert words in text, words
    client = signed_in(bob)
    for url in (job.get_absolute_url(), "/jobs/", reverse("jobs:queue"), "/"):
        page = client.get(url, follow=True)
        assert page.status_code == 200, url
        assert "None" not in page.text.split("<main")[1], url
    assert caller(team, bob, "read").get(f"/api/v1/jobs/{job.pk}/").json()["dataset_version_id"] is None


def test_task_files_that_changed_are_not_run(team: Team, bob: User, folder: Path) -> None:
    suite = suite_of(team, bob)
    (folder / "sums.yaml").write_text(f"{TASK}num_fewshot: 4\n")
    with pytest.raises(RecipeError, match="have changed since it was made") as caught:
        queue_evaluation(team=team, user=bob, suite=suite, base_model=make_base_model(), idempotency_key="1")
    assert "next version" in caught.value.next_step


def test_scores_stand_in_the_suites_table_and_two_adapters_compare_row_by_row(
    team: Team, bob: User, folder: Path
) -> None:
    suite, key = suite_of(team, bob), "lm_eval-sums-exact_match"

    def run_of(name: str, num_right: int) -> Any:
        adapter = make_adapter(team, bob, name=name)
        rows = range(400)
        counts = RowCountsRecord(
            lines=tuple(rows), base={key: tuple((0.0, 1.0) for _ in rows)},
            adapter={key: tuple((float(row < num_right), 1.0) for row in rows)},
        )  # fmt: skip
        score = make_score(0.1, evaluation=key, label="sums: exact_match", value=num_right / 400)
        return register_run(
            team=team, base_model=adapter.base_model, adapter=adapter, suite=suite, folder_key="",
            result=result_of([], scores=[score], counts=counts),
        )  # fmt: skip

    good, bad = run_of("good", 300), run_of("bad", 100)
    found = compare_runs(good, bad, key)
    assert (found.difference, found.num_rows, found.verdict()) == (0.5, 400, Verdict.BETTER)
    client = signed_in(bob)
    page = client.get(suite.get_absolute_url()).text
    assert "sums: exact_match" in page
    assert "0.750" in page
    assert "sums: exact_match" in client.get(good.adapter.get_absolute_url()).text
    assert good.adapter.files is not None
    assert caller(team, bob, "read").get(f"/api/v1/evaluation-runs/{good.pk}/beside/{bad.pk}/").json()[0]["verdict"]


def test_the_api_lists_tasks_and_makes_and_runs_a_suite(team: Team, bob: User, folder: Path) -> None:
    client = caller(team, bob, "read", "write")
    listed = {one["name"]: one for one in client.get("/api/v1/tasks/").json()["tasks"]}
    assert listed["sums"]["num_rows"] == 12
    assert listed["coded"]["runs_code"]
    refused = post(client, "task-suites/", {"name": "school", "tasks": ["coded"]})
    assert (refused.status_code, "runs code" in refused.text) == (422, True)
    made = post(client, "task-suites/", {"name": "school", "tasks": ["sums"], "max_rows": 4})
    assert made.status_code == 201, made.text
    assert (made.json()["tasks"], made.json()["dataset_version_id"]) == (["sums"], None)
    queued = post(client, f"suites/{made.json()['id']}/runs/", {"base_model_id": make_base_model().pk})
    assert (queued.status_code, queued.json()["kind"]) == (201, "evaluate")
    copied = post(client, f"jobs/{queued.json()['id']}/duplicate/", {"name": "again"})
    assert (copied.status_code, "no dataset to train on" in copied.text) == (422, True)


def test_a_viewer_makes_none_and_another_team_sees_none(
    team: Team, bob: User, charlie: User, other_team: Team, folder: Path
) -> None:
    suite = suite_of(team, bob)
    viewer = make_member("vera", team, Role.VIEWER)
    assert signed_in(viewer).get("/suites/new/tasks/").status_code == 403
    assert signed_in(viewer).get(suite.get_absolute_url()).status_code == 200
    assert signed_in(charlie).get(suite.get_absolute_url()).status_code == 404
    assert "New version of" not in signed_in(charlie).get(f"/suites/new/tasks/?from={suite.pk}").text
    client = caller(team, viewer, "read", "write")
    assert post(client, "task-suites/", {"name": "x", "tasks": ["sums"]}).status_code == 403
    assert caller(other_team, charlie, "read").get(f"/api/v1/suites/{suite.pk}/").status_code == 404

from __future__ import annotations

import html
from typing import Any

import pytest
from django.urls import reverse

from studio.accounts.models import AuditEvent, Role, Team, User
from studio.catalogue.comparing import NotComparableError, compare_runs, verdicts
from studio.catalogue.models import Adapter, EvaluationRun, RunComparison, Suite
from studio.catalogue.registering import register_run
from studio.catalogue.suites import archive_suite, make_suite, run_rows, set_guardrail
from tests.conftest import make_member, signed_in
from tests.factories import make_adapter, make_base_model, make_dataset_version, make_result, make_score
from tests.jobs.test_api import caller, post
from workers.errors import RecipeError
from workers.results import Result, RowCountsRecord
from workers.verdicts import Verdict

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("data_dir")]

EVALUATION = {"metrics": ["loss", "exact_match"], "num_generated": 20, "max_new_tokens": 16}


def suite_of(team: Team, user: User, **changes: Any) -> Suite:
    version = changes.pop("dataset_version", None) or make_dataset_version(team, user)
    values = {"name": "faq", "dataset_version": version, "evaluation": EVALUATION} | changes
    return make_suite(team=team, user=user, **values)


def result_of(right: list[int], *, base: int = 0, **changes: Any) -> Result:
    """A result in which these of 400 rows are answered rightly by the adapter, and the first `base` by the base."""
    rows = range(400)
    counts = RowCountsRecord(
        lines=tuple(rows),
        base={"exact_match": tuple((float(row < base), 1.0) for row in rows)},
        adapter={"exact_match": tuple((float(row in right), 1.0) for row in rows)},
    )
    values = {
        "num_rows_to_score": 400, "num_rows_scored": 400, "test_set_sha256": "a" * 64, "settings_sha256": "b" * 64,
        "counts": counts, "scores": [make_score(0.1, evaluation="exact_match", value=len(right) / 400)],
    }  # fmt: skip
    return make_result(**(values | changes))


def run_of(adapter: Adapter, suite: Suite | None, result: Result) -> EvaluationRun:
    return register_run(
        team=adapter.team, base_model=adapter.base_model, adapter=adapter, suite=suite, folder_key="", result=result
    )


def test_a_name_that_exists_makes_the_next_version_and_the_one_before_stays(team: Team, bob: User) -> None:
    first = suite_of(team, bob)
    second = suite_of(team, bob, dataset_version=first.dataset_version, max_rows=5)
    assert (first.version, second.version) == (1, 2)
    first.refresh_from_db()
    assert first.max_rows is None
    assert str(second) == "faq v2"
    assert list(AuditEvent.objects.values_list("action", flat=True)) == ["suite.made", "suite.made"]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"name": "  "}, "name"),
        ({"max_rows": 0}, "max_rows"),
        ({"evaluation": EVALUATION | {"metrics": []}}, "evaluation.metrics"),
        ({"evaluation": EVALUATION | {"num_generated": 0}}, "evaluation.num_generated"),
        ({"evaluation": EVALUATION | {"max_new_tokens": 0}}, "evaluation.max_new_tokens"),
        ({"evaluation": EVALUATION | {"metrics": ["vibes"]}}, "evaluation.metrics"),
        ({"evaluation": EVALUATION | {"metrics": ["loss", "exact_match", "loss"]}}, "evaluation.metrics.2"),
    ],
)
def test_a_wrong_setting_is_named(changes: dict[str, Any], field: str, team: Team, bob: User) -> None:
    with pytest.raises(RecipeError) as caught:
        suite_of(team, bob, **changes)
    assert caught.value.field == field
    assert not Suite.objects.exists()


def test_only_one_version_of_a_suite_guards(team: Team, bob: User) -> None:
    first = suite_of(team, bob, is_guardrail=True)
    second = suite_of(team, bob, dataset_version=first.dataset_version, is_guardrail=True)
    assert list(Suite.objects.filter(is_guardrail=True)) == [second]
    assert set_guardrail(first, bob, is_guardrail=True) is False, "as it was when it was read"
    first.refresh_from_db()
    assert set_guardrail(first, bob, is_guardrail=True)
    assert list(Suite.objects.filter(is_guardrail=True)) == [first]


def test_another_team_sees_nothing_of_a_suite(team: Team, other_team: Team, bob: User, charlie: User) -> None:
    mine = suite_of(team, bob)
    run = run_of(make_adapter(team, bob), mine, result_of([1]))
    for url in (mine.get_absolute_url(), f"/suites/new/?from={mine.pk}"):
        answer = signed_in(charlie).get(url)
        assert answer.status_code == 404 or "faq" not in answer.text
    assert (
        signed_in(charlie).post(reverse("catalogue:change_suite", args=[mine.pk]), {"do": "archive"}).status_code == 404
    )
    base = make_base_model()
    answer = signed_in(charlie).post(reverse("jobs:evaluate"), {"suite": mine.pk, "model": f"base-{base.pk}"})
    assert answer.status_code == 404
    stranger = caller(other_team, charlie, "read", "write")
    for path in (f"suites/{mine.pk}/", f"evaluation-runs/{run.pk}/", f"evaluation-runs/{run.pk}/beside/{run.pk}/"):
        assert stranger.get(f"/api/v1/{path}").status_code == 404
    assert stranger.get("/api/v1/suites/").json()["items"] == []
    assert stranger.get("/api/v1/evaluation-runs/").json()["items"] == []
    assert post(stranger, f"suites/{mine.pk}/runs/", {"base_model_id": base.pk}).status_code == 404
    version = mine.dataset_version_id
    answer = post(stranger, "suites/", {"name": "x", "dataset_version_id": version, "evaluation": EVALUATION})
    assert answer.status_code == 422


def test_an_incomplete_run_is_said_and_never_the_best(team: Team, bob: User) -> None:
    mine = suite_of(team, bob, evaluation=EVALUATION | {"metrics": ["exact_match"]})
    part, whole, less = (make_adapter(team, bob, name=name) for name in ("part", "whole", "less"))
    run_of(part, mine, result_of(list(range(190)), num_rows_scored=350))
    run_of(whole, mine, result_of(list(range(100))))
    run_of(less, mine, result_of(list(range(50))))
    best = {row.run.adapter.name: row.is_best for row in run_rows(mine)[1] if row.run.adapter}
    assert best == {"part": [False], "whole": [True], "less": [False]}
    page = signed_in(bob).get(mine.get_absolute_url()).text
    assert page.count("incomplete: of 400") == 1


def test_only_the_newest_run_of_a_model_is_shown(team: Team, bob: User) -> None:
    mine = suite_of(team, bob, evaluation=EVALUATION | {"metrics": ["exact_match"]})
    adapter = make_adapter(team, bob)
    run_of(adapter, mine, result_of([1]))
    newest = run_of(adapter, mine, result_of([1, 2]))
    assert [row.run for row in run_rows(mine)[1]] == [newest]


def test_identical_answers_are_no_difference_and_the_comparison_is_computed_once(team: Team, bob: User) -> None:
    right = list(range(80))
    one, other = (run_of(make_adapter(team, bob, name=name), None, result_of(right)) for name in ("one", "other"))
    found = compare_runs(one, other, "exact_match")
    assert (found.difference, found.num_rows, found.p_value) == (0, 400, 1)
    assert verdicts([found]) == [Verdict.NO_DIFFERENCE]
    assert compare_runs(one, other, "exact_match").pk == found.pk
    assert RunComparison.objects.count() == 1


def test_a_true_difference_is_paired_by_row(team: Team, bob: User) -> None:
    worse = run_of(make_adapter(team, bob, name="worse"), None, result_of(list(range(80))))
    better = run_of(make_adapter(team, bob, name="better"), None, result_of(list(range(120))))
    found = compare_runs(better, worse, "exact_match")
    assert found.difference == pytest.approx(0.1)
    assert found.difference_low > 0.05, "that 80 rows are right for both is no noise"
    assert verdicts([found]) == [Verdict.BETTER]


def test_of_many_equal_adapters_none_is_better_by_luck(team: Team, bob: User) -> None:
    """A difference that one comparison alone would call one is none among eight."""
    champion = run_of(make_adapter(team, bob, name="champion"), None, result_of(list(range(80))))
    # 34 rows won and 16 lost: the exact test gives 0.015.
    lucky = run_of(make_adapter(team, bob, name="lucky"), None, result_of(list(range(16, 114))))
    found = compare_runs(lucky, champion, "exact_match")
    equal = [
        compare_runs(run_of(make_adapter(team, bob, name=f"equal {n}"), None, result_of(list(range(80)))), champion,
                     "exact_match")
        for n in range(7)
    ]  # fmt: skip
    assert verdicts([found]) == [Verdict.BETTER]
    assert verdicts([found, *equal])[0] != Verdict.BETTER


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"test_set_sha256": "c" * 64}, "different rows"),
        ({"settings_sha256": "c" * 64}, "different settings"),
        ({"num_rows_scored": 399}, "399 of 400 rows"),
        ({"test_set_sha256": ""}, "an older version"),
        ({"counts": RowCountsRecord()}, "were not kept"),
    ],
)
def test_what_cannot_be_compared_is_refused_with_the_reason(
    changes: dict[str, Any], reason: str, team: Team, bob: User
) -> None:
    one = run_of(make_adapter(team, bob, name="one"), None, result_of([1]))
    other = run_of(make_adapter(team, bob, name="other"), None, result_of([1], **changes))
    with pytest.raises(NotComparableError, match=reason):
        compare_runs(one, other, "exact_match")


def test_the_api_makes_runs_compares_and_archives(team: Team, bob: User) -> None:
    client = caller(team, bob, "read", "write")
    version = make_dataset_version(team, bob)
    made = post(client, "suites/", {"name": "faq", "dataset_version_id": version.pk, "evaluation": EVALUATION})
    assert made.status_code == 201
    suite = Suite.objects.get(pk=made.json()["id"])
    base = make_base_model()
    queued = post(client, f"suites/{suite.pk}/runs/", {"base_model_id": base.pk})
    assert (queued.status_code, queued.json()["kind"]) == (201, "evaluate")
    assert post(client, f"suites/{suite.pk}/runs/", {}).status_code == 422
    one, other = (run_of(make_adapter(team, bob, name=name), suite, result_of([1])) for name in ("one", "other"))
    (found,) = client.get(f"/api/v1/evaluation-runs/{one.pk}/beside/{other.pk}/").json()
    assert (found["evaluation"], found["verdict"], found["difference"]) == ("exact_match", "no difference", 0)
    assert len(client.get(f"/api/v1/evaluation-runs/?suite_id={suite.pk}").json()["items"]) == 2
    assert client.delete(f"/api/v1/suites/{suite.pk}/").json()["archived_at"] is not None
    refused = post(client, f"suites/{suite.pk}/runs/", {"base_model_id": base.pk})
    assert (refused.status_code, "is archived" in refused.text) == (422, True)


def test_the_form_makes_a_suite_and_says_what_is_wrong(team: Team, bob: User) -> None:
    version = make_dataset_version(team, bob)
    values = {
        "name": "faq", "dataset_version": version.pk, "metrics": ["loss"], "num_generated": 0, "max_new_tokens": 16,
    }  # fmt: skip
    client = signed_in(bob)
    page = client.post("/suites/new/", values | {"metrics": ["exact_match"]})
    assert (page.status_code, "none are generated" in page.text) == (422, True)
    page = client.post("/suites/new/", values, follow=True)
    assert "faq v1 is made." in page.text
    assert "Nothing has run on it yet" in page.text
    suite = Suite.objects.get()
    page = client.post(reverse("catalogue:change_suite", args=[suite.pk]), {"do": "archive"}, follow=True)
    assert "is archived; its runs stay." in page.text
    assert "faq v1" not in client.get("/suites/").text
    assert "faq v1" in client.get("/suites/?all").text
    assert archive_suite(Suite.objects.get(), bob) is False


def test_metrics_with_settings_are_set_in_the_form_and_come_back_in_the_next_version(team: Team, bob: User) -> None:
    client = signed_in(bob)
    values = {
        "name": "faq", "dataset_version": make_dataset_version(team, bob).pk, "num_generated": 20,
        "max_new_tokens": 16, "metrics": ["loss", "regex", "regex.2", "multiple_choice"],
        "metrics.regex.pattern": "#### [0-9]+", "metrics.regex.2.pattern": "yes", "metrics.regex.2.mode": "full_match",
        "metrics.multiple_choice.options_from": "list", "metrics.multiple_choice.options": "yes, no",
    }  # fmt: skip
    assert client.post("/suites/new/", values).status_code == 302
    suite = Suite.objects.get()
    assert suite.evaluation["metrics"] == [
        "loss",
        {"name": "multiple_choice", "settings": {"options": ["yes", "no"], "options_from": "list"}},
        {"name": "regex", "settings": {"pattern": "#### [0-9]+"}},
        {"name": "regex", "settings": {"mode": "full_match", "pattern": "yes"}},
    ]
    page = client.get(suite.get_absolute_url()).text
    assert "Regular expression: found #### [0-9]+" in page
    assert "Multiple choice: yes, no" in page
    again = client.get(f"/suites/new/?from={suite.pk}").text
    assert 'value="#### [0-9]+"' in again
    assert 'id="id_metrics-regex-2" name="metrics" value="regex.2" checked' in again
    assert 'id="id_metrics-regex-3" name="metrics" value="regex.3">' in again


@pytest.mark.parametrize(
    ("metric", "given", "where", "said"),
    [
        ("regex", {"pattern": "("}, "regex-pattern", "no regular expression that RE2 takes: missing )"),
        ("regex", {}, "regex-pattern", "Write a regular expression"),
        ("json_schema", {"definition": '{"type": 3}'}, "json_schema-definition", "no valid JSON schema"),
        ("json_schema", {"definition": '{"a": '}, "json_schema-definition", "The schema is not JSON"),
        ("multiple_choice", {"options_from": "list"}, "multiple_choice-options_from", "Write two options or more"),
        ("multiple_choice", {"per_character": "maybe"}, "multiple_choice-per_character", "is on or off"),
    ],
)
def test_a_setting_that_cannot_be_used_is_told_beside_its_field_and_kept(
    team: Team, bob: User, metric: str, given: dict[str, str], where: str, said: str
) -> None:
    values = {
        "name": "faq", "dataset_version": make_dataset_version(team, bob).pk, "num_generated": 20,
        "max_new_tokens": 16, "metrics": [metric],
    } | {f"metrics.{metric}.{key}": value for key, value in given.items()}  # fmt: skip
    page = signed_in(bob).post("/suites/new/", values)
    assert page.status_code == 422
    assert not Suite.objects.exists()
    shown = page.text.split(f'id="id_metrics-{where}_error">')[1].split("</p>")[0]
    assert said in html.unescape(shown)
    assert f'href="#id_metrics-{where}"' in page.text, "the summary links to the field"
    for value in given.values():
        assert value in html.unescape(page.text)


def test_a_viewer_looks_and_changes_nothing(team: Team, bob: User) -> None:
    viewer = make_member("vera", team, Role.VIEWER)
    suite = suite_of(team, bob)
    client = signed_in(viewer)
    assert client.get(suite.get_absolute_url()).status_code == 200
    assert client.get("/suites/new/").status_code == 403
    assert client.post(reverse("catalogue:change_suite", args=[suite.pk]), {"do": "archive"}).status_code == 403
    assert client.post(reverse("jobs:evaluate"), {"suite": suite.pk}).status_code == 403

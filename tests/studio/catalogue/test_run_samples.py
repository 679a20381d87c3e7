from __future__ import annotations

from typing import Any

import pytest
from django.test import Client
from pytest_django import DjangoAssertNumQueries

from studio.accounts.models import Team, User
from studio.catalogue.models import EvaluationRun
from studio.catalogue.registering import register_run
from tests.conftest import signed_in
from tests.factories import make_adapter, make_base_model, make_score
from tests.jobs.test_api import caller
from tests.studio.catalogue.test_suites import result_of, suite_of
from workers.results import RunRowRecord

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("data_dir")]


def row(line: int, *, base: float | None, adapter: float | None, loss: float = 0.0, **changes: Any) -> RunRowRecord:
    values: dict[str, Any] = {
        "line": line, "prompt": f"Question {line}?", "reference": "forty two", "base_answer": f"base says {line}",
        "adapter_answer": f"adapter says {line}", "left_out": {},
        "figures": {"exact_match": (base, adapter), "loss": (1.0, 1.0 + loss)},
    }  # fmt: skip
    return RunRowRecord(**(values | changes))


ROWS = (
    row(1, base=0.0, adapter=1.0, loss=0.5),
    row(2, base=1.0, adapter=0.0, loss=-0.5),
    row(3, base=1.0, adapter=1.0),
    row(4, base=None, adapter=None, left_out={"exact_match": "The right answer has no number."}),
    row(5, base=1.0, adapter=0.0, prompt="Is 50 % of it \0 there?", adapter_answer=""),
)


@pytest.fixture
def run(team: Team, bob: User) -> EvaluationRun:
    scores = [
        make_score(0.1, evaluation="loss", label="Held-out loss", higher_is_better=False),
        make_score(0.1, evaluation="exact_match", label="Exact match", higher_is_better=True),
    ]
    adapter = make_adapter(team, bob)
    return register_run(
        team=team, base_model=adapter.base_model, adapter=adapter, suite=suite_of(team, bob), folder_key="",
        result=result_of([1], scores=scores, rows=ROWS),
    )  # fmt: skip


def lines(client: Client, run: EvaluationRun, **query: str) -> list[int]:
    answer = client.get(f"/api/v1/evaluation-runs/{run.pk}/rows/", query)
    assert answer.status_code == 200, answer.text
    return [one["line"] for one in answer.json()["items"]]


def test_regressions_come_first_by_the_metric_that_is_asked_for(team: Team, bob: User, run: EvaluationRun) -> None:
    client = caller(team, bob, "read")
    assert lines(client, run) == [2, 5, 3, 1, 4], "a loss says less of a row than another metric"
    assert lines(client, run, metric="loss") == [1, 3, 4, 5, 2], "of a loss the lower is the better"
    assert lines(client, run, show="regressions") == [2, 5]
    assert lines(client, run, show="improvements") == [1]
    assert lines(client, run, show="ties") == [3]
    assert lines(client, run, show="left_out") == [4]
    assert lines(client, run, q="50 %") == [5]


def test_pages_follow_one_another_without_a_row_lost_or_shown_twice(team: Team, bob: User, run: EvaluationRun) -> None:
    client = caller(team, bob, "read")
    seen: list[int] = []
    after = ""
    for _ in range(10):
        found = client.get(f"/api/v1/evaluation-runs/{run.pk}/rows/", {"limit": "2", "after": after}).json()
        seen += [one["line"] for one in found["items"]]
        after = found["next"]
        if after is None:
            break
    assert seen == [2, 5, 3, 1, 4]
    item = client.get(f"/api/v1/evaluation-runs/{run.pk}/rows/", {"show": "left_out"}).json()["items"][0]
    assert item["left_out"] == {"exact_match": "The right answer has no number."}
    assert item["figures"]["exact_match"] == [None, None]
    assert item["change"] is None


@pytest.mark.parametrize(
    ("query", "status"), [({"metric": "beauty"}, 422), ({"show": "all of them"}, 422), ({"after": "next"}, 400)]
)
def test_what_a_run_does_not_have_is_refused(
    team: Team, bob: User, run: EvaluationRun, query: dict[str, str], status: int
) -> None:
    answer = caller(team, bob, "read").get(f"/api/v1/evaluation-runs/{run.pk}/rows/", query)
    assert answer.status_code == status


def test_the_page_shows_both_answers_their_figures_and_the_words_that_differ(
    team: Team, bob: User, run: EvaluationRun, django_assert_max_num_queries: DjangoAssertNumQueries
) -> None:
    client = signed_in(bob)
    with django_assert_max_num_queries(8):
        page = client.get(run.get_absolute_url())
    text = page.text
    assert text.index("Question 2?") < text.index("Question 3?") < text.index("Question 1?")
    assert "The right answer has no number." in text
    assert "(empty)" in text, "an empty answer is an answer"
    assert "Is 50 % of it \N{REPLACEMENT CHARACTER} there?" in text
    different = client.get(run.get_absolute_url(), {"diff": "base"}).text
    assert '<ins class="diff-added">adapter</ins>' in different
    assert "No row is like that" in client.get(run.get_absolute_url(), {"q": "nowhere"}).text
    adapter = run.adapter
    assert adapter is not None
    assert run.get_absolute_url() in client.get(adapter.get_absolute_url()).text
    assert run.suite is not None
    assert run.get_absolute_url() in client.get(run.suite.get_absolute_url()).text


def test_the_next_rows_come_alone(bob: User, run: EvaluationRun) -> None:
    client = signed_in(bob)
    more = client.get(run.get_absolute_url(), {"after": "-1.0_0"}, headers={"HX-Request": "true"})
    assert "<html" not in more.text
    assert "Question 2?" in more.text


def test_a_base_alone_is_no_better_or_worse(team: Team, bob: User) -> None:
    rows = [row(1, base=1.0, adapter=None, adapter_answer=None, figures={"exact_match": (1.0, None)})]
    run = register_run(
        team=team, base_model=make_base_model("Other"), adapter=None, suite=suite_of(team, bob), folder_key="",
        result=result_of([1], rows=rows),
    )  # fmt: skip
    page = signed_in(bob).get(run.get_absolute_url()).text
    assert "base says 1" in page
    assert "Regressions" not in page
    assert lines(caller(team, bob, "read"), run, show="left_out") == []


def test_another_team_sees_nothing_of_it(charlie: User, other_team: Team, run: EvaluationRun) -> None:
    assert signed_in(charlie).get(run.get_absolute_url()).status_code == 404
    assert caller(other_team, charlie, "read").get(f"/api/v1/evaluation-runs/{run.pk}/rows/").status_code == 404

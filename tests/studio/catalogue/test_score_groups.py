"""What the first screen of an adapter says of its scores."""

from __future__ import annotations

from typing import Any

import pytest
from django.test import Client
from django.utils import timezone

from studio.accounts.models import Team, User
from studio.catalogue.models import Adapter, AdapterState, Alias, EvaluationRun, FileCheck, Score, Suite, TestSet
from studio.catalogue.score_groups import score_groups, summary
from tests.factories import make_adapter, make_result, make_score
from workers.results import OverlapRecord, ScoreRecord

pytestmark = pytest.mark.usefixtures("data_dir")

BETTER, WORSE, SAME = {"difference": 0.3}, {"difference": -0.3}, {"difference": 0.01}
TOO_FEW = {"difference": 0.01, "rows_needed": 500, "rows_recommended": 900, "smallest_effect": 0.05}


def scores(**named: dict[str, Any]) -> list[ScoreRecord]:
    """Scores of which more is better, by name."""
    return [make_score(evaluation=name, label=name, **changes) for name, changes in named.items()]


def add_suite(adapter: Adapter, user: User, name: str, *, num_scored: int = 50, **changes: Any) -> EvaluationRun:
    suite, _ = Suite.objects.get_or_create(
        team=adapter.team, name=name, dataset_version=adapter.dataset_version, evaluation={}, created_by=user
    )
    run = EvaluationRun.objects.create(
        team=adapter.team, adapter=adapter, base_model=adapter.base_model, test_set=TestSet.SUITE, suite=suite,
        num_rows=50, num_scored=num_scored,
    )  # fmt: skip
    record = make_score(evaluation="regex", label="Refuses", num_rows=num_scored, **changes)
    Score.objects.create(adapter=adapter, run=run, test_set=TestSet.SUITE, **record.model_dump())
    return run


@pytest.mark.parametrize(
    ("found", "headline", "is_better"),
    [
        ({"x": BETTER, "y": BETTER, "z": TOO_FEW}, "Better than its base on 2 of 3 measures; worse on none.", True),
        ({"x": BETTER, "y": WORSE}, "Better than its base on 1 of 2 measures; worse on 1.", False),
        ({"x": WORSE}, "Worse than its base on the one measure; better on none.", False),
        ({"x": SAME, "y": SAME}, "No better than its base: no difference on any of 2 measures.", None),
        ({"x": SAME, "y": TOO_FEW}, "Too few rows to tell whether it is better than its base.", None),
    ],
)
def test_the_first_sentence_counts_what_is_better_and_worse(
    found: dict[str, Any], headline: str, is_better: bool | None, team: Team, alice: User
) -> None:
    said = summary(score_groups(make_adapter(team, alice, result=make_result(scores(**found)))))
    assert said is not None
    assert (said.headline, said.is_better) == (headline, is_better)


def test_perplexity_is_no_finding_beside_the_loss(team: Team, alice: User) -> None:
    three = [
        make_score(-0.5, evaluation=name, higher_is_better=False) for name in ("loss", "perplexity", "byte_perplexity")
    ]
    (group,) = score_groups(make_adapter(team, alice, result=make_result(three)))
    assert [score.evaluation for score in group.measures] == ["loss"]
    assert len(group.scores) == 3


def test_what_was_forgotten_stands_in_the_first_sentence(team: Team, alice: User, alice_client: Client) -> None:
    general = tuple(scores(knowledge=WORSE, logic=SAME))
    adapter = make_adapter(team, alice, result=make_result(scores(x=BETTER), general=general))
    add_suite(adapter, alice, "Tone", difference=-0.3)
    page = " ".join(alice_client.get(adapter.get_absolute_url()).content.decode().split())
    assert "Better than its base on the one measure, but worse on the general set and Tone v1." in page
    assert "General set: worse on knowledge; no difference on logic." in page
    assert "Tone v1: worse on Refuses." in page


@pytest.mark.parametrize(
    ("rise", "headline", "said", "is_better"),
    [
        (0.02, "Better than its base on the one measure; worse on none.", "rose by 2.0 %", True),
        (0.055, "Better than its base on the one measure; worse on none.", "leaves open whether it exceeds", True),
        (0.2, "Better than its base on the one measure, but worse on the general set.", "more than the 5.0 %", False),
    ],
)
def test_on_the_general_set_only_what_exceeds_the_allowed_rise_is_worse(
    rise: float, headline: str, said: str, is_better: bool, team: Team, alice: User
) -> None:
    general = (make_score(2.0 * rise, width=0.03, base_value=2.0, p_value=0.0001),)
    found = summary(score_groups(make_adapter(team, alice, result=make_result([make_score(-0.6)], general=general))))
    assert found is not None
    assert (found.headline, found.is_better) == (headline, is_better)
    assert said in (found.others if is_better else found.warnings)[0]


def test_scores_on_rows_that_were_trained_on_are_not_boasted_of(team: Team, alice: User, alice_client: Client) -> None:
    leaked = OverlapRecord(num_held_out_rows=100, num_exact=0, num_near=8)
    adapter = make_adapter(team, alice, result=make_result([make_score(-0.6)], overlap=leaked))
    page = alice_client.get(adapter.get_absolute_url()).content.decode()
    assert "Its scores cannot be believed: it was trained on the rows that it was tested on." in page
    assert "8 are nearly the same as a training row." in page
    assert "Better than its base" not in page


def test_scores_of_before_a_damage_are_told_as_such(team: Team, alice: User, alice_client: Client) -> None:
    adapter = make_adapter(team, alice, result=make_result([make_score(-0.6)]))
    assert "border-l-success" in alice_client.get(adapter.get_absolute_url()).content.decode()
    FileCheck.objects.create(adapter=adapter, checked_at=timezone.now(), damage='The file "x" has changed.')
    page = alice_client.get(adapter.get_absolute_url()).content.decode()
    assert "Its files are damaged: the scores are of what it was before." in page
    assert "border-l-success" not in page


def test_the_figure_that_decides_is_not_drowned_by_one_of_too_few_rows(team: Team, alice: User) -> None:
    both = [make_score(0.001, width=0.002, smallest_effect=0.02, rows_needed=2), *scores(token_f1=TOO_FEW)]
    adapter = make_adapter(team, alice, result=make_result(both))
    found = summary(score_groups(adapter))
    assert found is not None
    assert found.headline == "No better than its base: no difference on Held-out loss; too few rows for 1 measure."


def test_an_incomplete_run_is_red_and_has_no_say(team: Team, alice: User, alice_client: Client) -> None:
    adapter = make_adapter(team, alice, result=make_result(scores(x=BETTER)))
    add_suite(adapter, alice, "Safety", num_scored=48, difference=-0.9)
    page = " ".join(alice_client.get(adapter.get_absolute_url()).content.decode().split())
    assert "Better than its base on the one measure; worse on none." in page
    assert "Safety v1: incomplete, 48 of 50 rows scored: it has no say." in page
    assert "Incomplete: 48 of 50 rows were scored, 2 are missing." in page
    assert ">worse</span>" not in page
    EvaluationRun.objects.filter(adapter=adapter).update(num_scored=1, num_rows=100)
    page = alice_client.get(adapter.get_absolute_url()).content.decode()
    assert "It cannot be told whether it is any good: no evaluation is complete." in page


def test_the_newest_run_of_a_suite_counts_and_the_others_are_numbered(
    team: Team, alice: User, alice_client: Client
) -> None:
    adapter = make_adapter(team, alice, result=make_result(scores(x=BETTER)))
    add_suite(adapter, alice, "Tone", difference=-0.3)
    newest = add_suite(adapter, alice, "Tone", difference=0.3)
    held_out, tone = score_groups(adapter)
    assert (held_out.run.test_set, tone.run, tone.num_older) == (TestSet.HELD_OUT, newest, 1)
    assert "1 earlier run" in alice_client.get(adapter.get_absolute_url()).content.decode()


def test_regressions_stand_before_everything_else(team: Team, alice: User) -> None:
    found = scores(a_better=BETTER, b_same=SAME, c_worse=WORSE, d_few=TOO_FEW)
    (group,) = score_groups(make_adapter(team, alice, result=make_result(found)))
    assert [score.evaluation for score in group.scores] == ["c_worse", "a_better", "d_few", "b_same"]


@pytest.mark.parametrize(("p_value", "words"), [(0.0041, "p = 0.004"), (0.00025, "p &lt; 0.001"), (1.0, "p = 1.000")])
def test_p_values_can_be_read_and_methods_have_names(
    p_value: float, words: str, team: Team, alice: User, alice_client: Client
) -> None:
    adapter = make_adapter(team, alice, result=make_result([make_score(p_value=p_value)]))
    page = alice_client.get(adapter.get_absolute_url()).content.decode()
    assert words in page
    assert "Intervals: paired bootstrap, 10,000 resamples." in page


def test_the_title_has_version_aliases_state_and_tags(
    team: Team, alice: User, alice_client: Client, charlie: User, other_team: Team
) -> None:
    first, second = (make_adapter(team, alice) for _ in range(2))
    make_adapter(other_team, charlie, base_model=first.base_model)
    Alias.objects.create(team=team, adapter_name="support", name="champion", adapter=first)
    Adapter.objects.filter(pk=first.pk).update(state=AdapterState.APPROVED, tags=["faq"])
    answer = alice_client.get(first.get_absolute_url())
    page = answer.content.decode()
    for words in ("support v1", "@champion", "Approved", ">faq</span>", f'href="{second.get_absolute_url()}">v2</a>'):
        assert words in page, words
    assert [version["version"] for version in answer.context["adapter"].versions] == [2, 1]
    assert "@champion" not in alice_client.get(second.get_absolute_url()).content.decode()

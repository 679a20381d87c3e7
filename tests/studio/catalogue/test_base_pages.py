"""A base model's page: who uses it and what it scores by itself, for the team that looks."""

from __future__ import annotations

from html import unescape
from pathlib import Path

import pytest
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext

from studio.accounts.models import Team, User
from studio.catalogue.models import Adapter, AdapterState, BaseModel, EvaluationRun, Suite, TestSet
from studio.datasets import learning
from tests.factories import make_adapter, make_base_model, make_dataset_version, make_result, make_score
from tests.tiny import make_tiny_base

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("data_dir")]


def test_it_shows_the_teams_adapters_with_scores_and_only_the_number_of_others(
    team: Team, other_team: Team, alice: User, charlie: User, alice_client: Client
) -> None:
    base, rows = make_base_model(), make_dataset_version(team, alice)
    make_adapter(team, alice, name="ours", base_model=base, dataset_version=rows)
    unscored = make_adapter(
        team, alice, name="bare", base_model=base, dataset_version=rows, result=make_result(scores=[])
    )
    put_away = make_adapter(team, alice, name="put-away", base_model=base, dataset_version=rows)
    Adapter.objects.filter(pk=put_away.pk).update(state=AdapterState.ARCHIVED)
    for name in ("secret one", "secret two"):
        make_adapter(other_team, charlie, name=name, base_model=base, result=make_result(scores=[make_score(-0.123)]))
    with CaptureQueriesContext(connection) as queries:
        page = " ".join(alice_client.get(base.get_absolute_url()).text.split())
    assert len(queries) <= 8, [query["sql"][:120] for query in queries]
    assert "Adapters of Support on it (2)" in page
    assert "\N{MINUS SIGN}0.600 <span" in page
    assert page.index(f"/models/{unscored.pk}/") < page.index("not measured")
    assert "Other teams have 2 adapters on it." in page
    for hidden in ("secret", "0.123", "put-away"):
        assert hidden not in page


def test_it_shows_the_bases_own_runs_on_the_teams_suites_alone(
    team: Team, other_team: Team, alice: User, charlie: User, alice_client: Client, charlie_client: Client
) -> None:
    base, rows = make_base_model(), make_dataset_version(team, alice)
    suite = Suite.objects.create(team=team, name="Tickets", dataset_version=rows, evaluation={"metrics": ["token_f1"]})
    EvaluationRun.objects.create(
        team=team, base_model=base, suite=suite, test_set=TestSet.SUITE, num_rows=40, num_scored=38,
        base_figures={"token_f1": {"value": 0.4567, "low": 0.4, "high": 0.5, "num_rows": 38}},
    )  # fmt: skip
    page = " ".join(alice_client.get(base.get_absolute_url()).text.split())
    assert "0.457" in page
    assert "38 of 40 <span" in page
    assert ">incomplete</span>" in page
    other = charlie_client.get(base.get_absolute_url()).text
    assert "Tickets" not in other
    assert "0.457" not in other


def test_it_shows_the_sample_conversation_and_a_template_without_end_holds_up_nothing(
    alice_client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = learning.PreviewChild(seconds=1.5)
    monkeypatch.setattr(learning, "_child", child)
    good, bad = make_tiny_base(tmp_path / "good"), make_tiny_base(tmp_path / "bad")
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    (bad / "chat_template.jinja").write_text(endless)
    base, pages = make_base_model(), []
    for folder in (bad, good):
        BaseModel.objects.filter(pk=base.pk).update(folder=str(folder), revision=folder.name)
        pages.append(unescape(alice_client.get(base.get_absolute_url()).text))
    child.close()
    assert "not rendered within 1.5 seconds" in pages[0]
    assert "<|im_start|>user\nAnd of Spain?" in pages[1]
    assert "The capital of Spain is Madrid." in pages[1]

"""An adapter of several datasets: its pages, its card and its gates know each of them."""

from __future__ import annotations

import re
from typing import Any

import pytest
from django.test import Client
from django.urls import reverse
from pytest_django import DjangoAssertNumQueries

from studio.accounts.models import ApiToken, Team, User
from studio.catalogue.model_card import adapter_front_matter
from studio.catalogue.models import Adapter, BaseModel
from studio.catalogue.recipe_table import recipe_sections
from studio.datasets.licensing import set_licence
from studio.datasets.models import DatasetVersion
from studio.reviews.gates import get_gate
from studio.reviews.models import GateState
from tests.factories import make_adapter, make_dataset_version, make_result, make_sample, make_score
from tests.tiny import colour_rows
from workers.results import OverlapRecord, SourceRecord, SuspiciousRecord

pytestmark = [pytest.mark.usefixtures("data_dir"), pytest.mark.django_db]

PAGE_QUERIES = 8


@pytest.fixture
def versions(team: Team, alice: User) -> list[DatasetVersion]:
    return [
        make_dataset_version(team, alice, name="Support"),
        make_dataset_version(team, alice, name="FAQ", rows=colour_rows(20)),
    ]


def source(version: DatasetVersion, **changes: Any) -> SourceRecord:
    values = {
        "name": str(version), "sha256": version.sha256, "weight": 0.5, "num_train_rows": 18, "num_held_out_rows": 2,
        "rows_per_epoch": 18, "num_rows_seen": 90, "passes": 5.0, "scores": (),
    }  # fmt: skip
    return SourceRecord(**(values | changes))


@pytest.fixture
def adapter(team: Team, alice: User, versions: list[DatasetVersion]) -> Adapter:
    main, faq = versions
    result = make_result(
        samples=[make_sample(7), make_sample(3).model_copy(update={"source": 1})],
        sources=(
            source(main, weight=1.0, rows_per_epoch=36, scores=(make_score(-0.9, num_rows=31),)),
            source(faq, scores=(make_score(0.3, num_rows=17),)),
        ),
        overlap=OverlapRecord(
            num_held_out_rows=40, num_exact=2, num_near=0, num_between=1,
            pairs=((5, 6, 1.0), (8, 9, 1.0)), pair_sources=((0, 1), (1, 1)),
        ),
        suspicious=(
            SuspiciousRecord(
                line=11, source=1, reason="Other rows answer otherwise.", score=3.0, loss=2.0, other_lines=(4, 12),
                other_sources=(0, 1),
            ),
        ),
    )  # fmt: skip
    return make_adapter(team, alice, dataset_version=main, mixed=[faq], result=result)


def text_of(page: str) -> str:
    return " ".join(re.sub(r"<[^>]+>", " ", page).split())


def test_the_page_shows_each_dataset_with_its_part_and_its_own_scores(
    adapter: Adapter, versions: list[DatasetVersion], alice_client: Client,
    django_assert_max_num_queries: DjangoAssertNumQueries,
) -> None:  # fmt: skip
    with django_assert_max_num_queries(PAGE_QUERIES):
        page = alice_client.get(adapter.get_absolute_url()).text
    own = page[page.index('id="source-scores"') :]
    told = text_of(own[: own.index("</table>")])
    assert "Support v1 weight 1, 66.7 % of an epoch, 5 passes over 18 rows" in told
    assert "FAQ v1 weight 0.5, 33.3 % of an epoch, 5 passes over 18 rows" in told
    assert re.search(r"Support v1.* better .* 31 FAQ v1.* worse .* 17$", told)
    lineage = text_of(page[page.index('id="lineage"') :])
    assert f"Dataset 2 FAQ v1 , weight 0.5 sha256 {versions[1].sha256}" in lineage


def test_rows_lead_into_the_dataset_that_they_stand_in(
    adapter: Adapter, versions: list[DatasetVersion], alice_client: Client
) -> None:
    main, faq = versions
    page = alice_client.get(adapter.get_absolute_url()).text

    def link(version: DatasetVersion, line: int) -> str:
        return f'href="{reverse("datasets:row", args=[version.dataset_id, version.number, line])}"'

    suspicious = page[page.index('id="suspicious"') :]
    assert f"{link(faq, 11)}>FAQ v1, line 11<" in suspicious
    assert f"{link(main, 4)}>Support v1: 4<" in suspicious
    assert f"{link(faq, 12)}>FAQ v1: 12<" in suspicious
    overlap = page[page.index('id="overlap"') : page.index('id="suspicious"')]
    assert f"{link(main, 5)}>Support v1, line 5<" in overlap
    assert f"{link(faq, 6)}>FAQ v1, line 6<" in overlap
    assert "(1 of them of another dataset)" in overlap
    samples = page[page.index('id="samples"') :]
    assert "Line 3 of FAQ v1" in samples
    assert "Line 7 of Support" in samples
    assert "Line 7 of Support" in alice_client.get(reverse("catalogue:blind", args=[adapter.pk])).text


def test_an_adapter_of_one_dataset_names_lines_alone(team: Team, alice: User, alice_client: Client) -> None:
    page = alice_client.get(make_adapter(team, alice).get_absolute_url()).text
    assert "Each dataset alone" not in page
    assert ">Line 7<" in page


def test_the_cards_front_matter_has_the_figures_of_each_dataset(
    adapter: Adapter, versions: list[DatasetVersion]
) -> None:
    front = adapter_front_matter(adapter)
    assert 'name: "Support v1 + FAQ v1 (held-out)"' in front
    assert 'name: "FAQ v1 (held-out)"' in front
    assert f'revision: "{versions[1].sha256}"' in front


def test_the_recipe_table_has_the_mixture_in_short_and_in_full(adapter: Adapter) -> None:
    (mixture,) = (section for section in recipe_sections(adapter.recipe) if section.title == "Mixture")
    assert [(row.label, row.value) for row in mixture.rows] == [
        ("Dataset 1", "Support, weight 1, held-out share"), ("Dataset 2", "FAQ v1, weight 0.5, held-out share")
    ]  # fmt: skip
    assert mixture.chosen == mixture.rows
    assert not any(row.is_changed for row in mixture.rows)


def test_the_api_gives_the_mixture_and_the_scores_of_each_dataset(
    adapter: Adapter, versions: list[DatasetVersion], team: Team, alice: User
) -> None:
    _, secret = ApiToken.issue(team=team, user=alice, name="x", scopes=["read"])
    client = Client(headers={"Authorization": f"Bearer {secret}"})
    found = client.get(f"/api/v1/adapters/{adapter.pk}/").json()
    assert found["mix"] == [{"dataset_version_id": versions[1].pk, "weight": 0.5}]
    assert [(one["name"], one["scores"][0]["num_rows"]) for one in found["sources"]] == [
        ("Support v1", 31), ("FAQ v1", 17)
    ]  # fmt: skip
    samples = client.get(f"/api/v1/adapters/{adapter.pk}/samples/").json()
    assert {(one["source"], one["line"]) for one in samples} == {(0, 7), (1, 3)}


def test_the_list_finds_it_by_every_dataset(
    adapter: Adapter, versions: list[DatasetVersion], team: Team, alice: User, alice_client: Client
) -> None:
    other = make_adapter(team, alice, name="elsewhere", dataset_version=make_dataset_version(team, alice, name="Else"))
    for version in versions:
        page = alice_client.get(reverse("catalogue:adapters"), {"dataset": version.dataset_id}).text
        assert adapter.get_absolute_url() in page
        assert other.get_absolute_url() not in page
        assert "Support v1 and 1 more" in page


def test_the_dataset_of_a_mixture_is_used_by_the_adapter_and_not_deleted(
    adapter: Adapter, versions: list[DatasetVersion], alice_client: Client
) -> None:
    faq = versions[1]
    page = alice_client.get(reverse("datasets:used_by", args=[faq.dataset_id, faq.number])).text
    assert adapter.get_absolute_url() in page
    refused = alice_client.post(reverse("datasets:delete", args=[faq.dataset_id]))
    assert refused.status_code == 409
    assert adapter.get_absolute_url() in refused.text


@pytest.mark.parametrize(
    ("licences", "state", "said"),
    [
        (("mit", "cc-by-4.0"), GateState.PASSED, "It may be shared under"),
        (("mit", "cc-by-nd-4.0"), GateState.FAILED, "FAQ v1: "),
        (("unknown", "mit"), GateState.UNKNOWN, "Support v1: "),
        (("unknown", "cc-by-nd-4.0"), GateState.FAILED, "FAQ v1: "),
        (("cc-by-sa-4.0", "cc-by-nc-4.0"), GateState.FAILED, "each ask for terms of their own"),
    ],
)
def test_the_licence_of_every_dataset_counts(
    licences: tuple[str, str], state: GateState, said: str, adapter: Adapter, versions: list[DatasetVersion],
    alice: User,
) -> None:  # fmt: skip
    BaseModel.objects.filter(pk=adapter.base_model_id).update(licence="apache-2.0")
    for version, licence in zip(versions, licences, strict=True):
        set_licence(version.dataset, licence, user=alice)
    found = get_gate("licence").check(Adapter.objects.get(pk=adapter.pk), {})
    assert found.state == state, found.sentence
    assert said in found.sentence

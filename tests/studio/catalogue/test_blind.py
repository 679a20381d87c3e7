"""Blind choices: who cannot know what, what counts, and what all of it says."""

from __future__ import annotations

import re

import pytest
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.urls import reverse

from studio.accounts.models import ApiToken, AuditEvent, Role, Team, User
from studio.catalogue import blind
from studio.catalogue.models import Adapter, SampleChoice
from tests.conftest import make_member, signed_in
from tests.factories import make_adapter, make_result, make_sample

pytestmark = pytest.mark.usefixtures("data_dir")


@pytest.fixture
def adapter(team: Team, alice: User) -> Adapter:
    rows = [make_sample(line, base_answer=f"from {line} x", adapter_answer=f"from {line} y") for line in range(1, 41)]
    rows.append(make_sample(41, base_answer="equal", adapter_answer="equal"))
    return make_adapter(team, alice, result=make_result(samples=rows))


def page_of(adapter: Adapter) -> str:
    return reverse("catalogue:blind", args=[adapter.pk])


def test_the_order_is_drawn_for_each_person_and_row_and_stays(adapter: Adapter, alice: User, bob: User) -> None:
    keys = list(adapter.samples.values_list("pk", flat=True))
    of_alice = [blind.adapter_is_a(alice, key) for key in keys]
    assert of_alice == [blind.adapter_is_a(alice, key) for key in keys]
    assert of_alice != [blind.adapter_is_a(bob, key) for key in keys]
    assert 8 <= sum(of_alice) <= 33  # of 41 tosses: a coin fails this once in 10,000 cases, and a constant always


def test_the_order_cannot_be_told_without_the_studios_key(adapter: Adapter, alice: User, settings: object) -> None:
    keys = list(adapter.samples.values_list("pk", flat=True))
    before = [blind.adapter_is_a(alice, key) for key in keys]
    settings.SECRET_KEY = "another key of a studio" * 4  # type: ignore[attr-defined]
    assert before != [blind.adapter_is_a(alice, key) for key in keys]


def test_the_markup_is_the_same_whichever_answer_is_whose(
    adapter: Adapter, alice_client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the two texts put in each other's place, the pages of both orders are the same to the byte."""
    pages = []
    for adapter_is_a, texts in ((True, ("AAA", "BBB")), (False, ("BBB", "AAA"))):
        monkeypatch.setattr(blind, "adapter_is_a", lambda user, key, first=adapter_is_a: first)
        adapter.samples.filter(line=1).update(adapter_answer=texts[0], base_answer=texts[1])
        page = alice_client.get(page_of(adapter)).content.decode()
        assert "AAA" in page
        pages.append(re.sub(r'("csrfmiddlewaretoken" value=|"X-CSRFToken": )"[^"]*"', "", page))
    assert pages[0] == pages[1]


@pytest.mark.parametrize("letter", ["a", "b", "same"])
def test_a_choice_is_stored_by_whose_answer_it_was_and_then_revealed(
    letter: str, adapter: Adapter, bob: User, bob_client: Client
) -> None:
    pair = bob_client.get(page_of(adapter)).context["pair"]
    answer = bob_client.post(page_of(adapter), {"sample": pair.sample_id, "choice": letter}, follow=True)
    choice = SampleChoice.objects.get()
    chosen = {"a": pair.a, "b": pair.b}.get(letter, "")
    expected = "adapter" if chosen.endswith("y") else "base" if chosen else "neither"
    assert (choice.user, choice.sample_id, choice.preferred) == (bob, pair.sample_id, expected)
    text = answer.content.decode()
    assert {"adapter": "you preferred the adapter", "base": "you preferred the base",
            "neither": "you found both the same"}[expected] in text  # fmt: skip
    assert f"A was {'the adapter' if pair.a.endswith('y') else 'the base'}" in text
    assert answer.context["pair"].sample_id != pair.sample_id
    event = AuditEvent.objects.get(action="adapter.answers_compared")
    assert (event.user, event.object_id) == (bob, str(adapter.pk))


def test_the_first_choice_counts(adapter: Adapter, bob: User, bob_client: Client) -> None:
    pair = bob_client.get(page_of(adapter)).context["pair"]
    for letter in ("a", "b", "same"):
        bob_client.post(page_of(adapter), {"sample": pair.sample_id, "choice": letter})
    first = SampleChoice.objects.get()
    assert (first.preferred == "adapter") == blind.adapter_is_a(bob, pair.sample_id)


def test_equal_answers_are_not_asked_about_and_the_end_is_told(adapter: Adapter, bob: User, bob_client: Client) -> None:
    for _ in range(40):
        sample = blind.next_sample(adapter, bob)
        assert sample is not None
        assert sample.line != 41
        blind.choose(sample, bob, "same")
    assert "You have chosen on every sample" in bob_client.get(page_of(adapter)).content.decode()


def test_the_tally_names_its_interval_and_its_test(
    adapter: Adapter, alice: User, bob: User, bob_client: Client
) -> None:
    samples = list(adapter.samples.order_by("line")[:10])
    for index, sample in enumerate(samples):
        user = alice if index % 2 else bob
        wanted = index < 8
        blind.choose(sample, user, "a" if blind.adapter_is_a(user, sample.pk) == wanted else "b")
    found = blind.tally(adapter)
    assert (found.num_adapter, found.num_base, found.num_people) == (8, 2, 2)
    page = " ".join(bob_client.get(adapter.get_absolute_url()).content.decode().split())
    # binomtest(8, 10): exact interval 0.444 to 0.975, p 0.109.
    assert "preferred in <strong>80.0 %</strong> of 10 decided choices (95 % 44.4 % to 97.5 %, p = 0.109)" in page
    assert "Clopper-Pearson interval; exact two-sided sign test" in page


def test_the_page_takes_at_most_eight_queries(adapter: Adapter, bob: User, bob_client: Client) -> None:
    sample = blind.next_sample(adapter, bob)
    assert sample is not None
    choice = blind.choose(sample, bob, "a")
    with CaptureQueriesContext(connection) as queries:
        answer = bob_client.get(page_of(adapter), {"chosen": choice.pk})
    assert answer.context["revealed"]["choice"] == choice
    assert answer.context["mine"].num == answer.context["tally"].num == 1
    assert len(queries) <= 8, [query["sql"][:120] for query in queries]


def test_a_nonsense_choice_counts_for_nothing(adapter: Adapter, bob_client: Client) -> None:
    pair = bob_client.get(page_of(adapter)).context["pair"]
    answer = bob_client.post(page_of(adapter), {"sample": pair.sample_id, "choice": "c"}, follow=True)
    assert "There is no choice" in answer.content.decode()
    for sample in ("", "x", "999999"):
        assert bob_client.post(page_of(adapter), {"sample": sample, "choice": "a"}).status_code == 404
    assert not SampleChoice.objects.exists()


def test_viewers_look_on_and_other_teams_see_nothing(adapter: Adapter, team: Team, charlie_client: Client) -> None:
    viewer = signed_in(make_member("vera", team, Role.VIEWER))
    page = viewer.get(page_of(adapter))
    assert page.status_code == 200
    assert 'name="choice"' not in page.content.decode()
    assert viewer.post(page_of(adapter), {"sample": page.context["pair"].sample_id, "choice": "a"}).status_code == 403
    assert charlie_client.get(page_of(adapter)).status_code == 404
    assert charlie_client.post(page_of(adapter), {"sample": 1, "choice": "a"}).status_code == 404


def test_the_api_asks_and_takes_choices_too(adapter: Adapter, team: Team, bob: User) -> None:
    _, secret = ApiToken.issue(team=team, user=bob, name="x", scopes=["read", "write"])
    client = Client(headers={"Authorization": f"Bearer {secret}"})
    url = f"/api/v1/adapters/{adapter.pk}/blind/"
    sample = client.get(url).json()["sample"]
    answer = client.post(url, {"sample_id": sample["sample_id"], "choice": "a"}, content_type="application/json")
    assert answer.status_code == 200, answer.content
    assert (answer.json()["preferred"] == "adapter") == sample["a"].endswith("y")
    assert client.get(url).json()["tally"]["num_people"] == 1
    bad = client.post(url, {"sample_id": sample["sample_id"], "choice": "c"}, content_type="application/json")
    assert (bad.status_code, bad.json()["error"]["code"]) == (422, "no_such_choice")

"""Sample answers on the adapter's page: which are shown, in which order, and how they are compared."""

from __future__ import annotations

import pytest
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.urls import reverse

from studio.accounts.models import Team, User
from studio.catalogue import samples as listing
from studio.catalogue.models import Adapter, Sample
from tests.factories import make_adapter, make_job_for, make_result, make_sample

pytestmark = pytest.mark.usefixtures("data_dir")

# line: base's answer, adapter's answer, beside the reference "one two three four"
ANSWERS = {
    1: ("one two three four", "one two three four"),
    2: ("one two three four", "nothing of it"),
    3: ("one two", "one two three four"),
    4: ("one two three four", "one two"),
    5: ("nothing", "one two three four and very many more words than the base has"),
}


@pytest.fixture
def adapter(team: Team, alice: User) -> Adapter:
    rows = [
        make_sample(line, prompt=f"prompt {line}", reference="one two three four", base_answer=base, adapter_answer=own)
        for line, (base, own) in ANSWERS.items()
    ]
    return make_adapter(team, alice, result=make_result(samples=rows))


def lines(client: Client, adapter: Adapter, **query: str) -> list[int]:
    answer = client.get(adapter.get_absolute_url(), query)
    assert answer.status_code == 200
    return [row.sample.line for row in answer.context["page"].rows]


def test_regressions_come_first_and_the_largest_before_all(adapter: Adapter, alice_client: Client) -> None:
    assert lines(alice_client, adapter) == [2, 4, 1, 3, 5]


@pytest.mark.parametrize(
    ("show", "expected"), [("regressions", [2, 4]), ("improvements", [5, 3]), ("ties", [1]), ("nonsense", None)]
)
def test_the_filter_shows_only_rows_of_its_kind(
    show: str, expected: list[int] | None, adapter: Adapter, alice_client: Client
) -> None:
    found = lines(alice_client, adapter, show=show)
    assert sorted(found) == sorted(expected if expected is not None else ANSWERS)
    if show == "regressions":
        assert found == expected


def test_each_tab_says_how_many_rows_it_has(adapter: Adapter, alice_client: Client) -> None:
    page = alice_client.get(adapter.get_absolute_url()).context["page"]
    assert {tab.value: tab.count for tab in page.tabs} == {"": 5, "regressions": 2, "improvements": 2, "ties": 1}


def test_rows_are_found_by_words_of_any_text_and_by_length(adapter: Adapter, alice_client: Client) -> None:
    assert lines(alice_client, adapter, q="PROMPT 3") == [3]
    assert lines(alice_client, adapter, q="very many") == [5]
    assert lines(alice_client, adapter, q="\0") == lines(alice_client, adapter)
    assert sorted(lines(alice_client, adapter, length="longer")) == [3, 5]
    assert lines(alice_client, adapter, length="shorter") == [4]


@pytest.mark.parametrize("after", ["", "x", "1_", "_1", "nan_x", "1e999_2", "0.5_" + "9" * 40])
def test_a_nonsense_place_is_no_error(after: str, adapter: Adapter, alice_client: Client) -> None:
    assert alice_client.get(adapter.get_absolute_url(), {"after": after}).status_code == 200


@pytest.mark.parametrize("show", ["", "regressions", "improvements", "ties"])
def test_the_pages_put_together_are_all_rows_once(
    show: str, team: Team, alice: User, alice_client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "PAGE_SIZE", 3)
    rows = [
        make_sample(line, reference="one two three four", base_answer=base, adapter_answer=own)
        for line in range(1, 24)
        for base, own in [ANSWERS[line % 5 + 1]]
    ]
    adapter = make_adapter(team, alice, result=make_result(samples=rows))
    condition = listing.SHOWN[show][1]
    expected = set(Sample.objects.filter(condition, adapter=adapter).values_list("line", flat=True))
    seen: list[int] = []
    query = f"show={show}"
    while query:
        answer = alice_client.get(
            f"{reverse('catalogue:samples', args=[adapter.pk])}?{query}", headers={"HX-Request": "true"}
        )
        page = answer.context["page"]
        seen += [row.sample.line for row in page.rows]
        query = page.more_query
    assert len(seen) == len(set(seen)) > 3
    assert set(seen) == expected


def test_the_fragment_has_the_pages_own_url_and_is_the_page_without_scripts(
    adapter: Adapter, alice_client: Client
) -> None:
    url = f"{reverse('catalogue:samples', args=[adapter.pk])}?show=ties"
    answer = alice_client.get(url, headers={"HX-Request": "true"})
    assert answer.content.decode().strip().startswith('<section id="samples"')
    assert answer["HX-Push-Url"] == f"{adapter.get_absolute_url()}?show=ties"
    assert alice_client.get(url)["Location"] == f"{adapter.get_absolute_url()}?show=ties#samples"


def test_words_that_differ_are_marked_without_colour_alone(adapter: Adapter, alice_client: Client) -> None:
    page = alice_client.get(adapter.get_absolute_url(), {"diff": "base", "q": "prompt 4"}).content.decode()
    assert '<del class="diff-removed"> three four</del>' in page


def test_older_samples_are_measured_when_they_are_first_looked_at(adapter: Adapter, alice_client: Client) -> None:
    Sample.objects.filter(adapter=adapter).update(figure="", base_figure=None, adapter_figure=None)
    assert lines(alice_client, adapter) == [2, 4, 1, 3, 5]
    assert not Sample.objects.filter(adapter=adapter, figure="").exists()


def test_rows_without_a_number_have_no_part_where_numbers_count(team: Team, alice: User, alice_client: Client) -> None:
    rows = [
        make_sample(1, reference="no number", base_answer="1", adapter_answer="2"),
        make_sample(2, reference="#### 4", base_answer="it is 4", adapter_answer="it is 5"),
    ]
    adapter = make_adapter(
        team, alice, result=make_result(samples=rows), evaluation={"metrics": ["loss", "numeric_answer"]}
    )
    assert lines(alice_client, adapter) == [2, 1]
    assert lines(alice_client, adapter, show="ties") == []
    assert Sample.objects.get(adapter=adapter, line=1).adapter_figure is None


def test_ten_thousand_samples_cost_no_query_more(team: Team, alice: User, alice_client: Client) -> None:
    adapter = make_adapter(team, alice)
    make_job_for(adapter)
    Sample.objects.bulk_create(
        Sample(adapter=adapter, line=line, prompt="p", reference="r", base_answer="b", adapter_answer="a",
               figure="token_f1", base_figure=0.5, adapter_figure=line % 3 / 2)
        for line in range(10_000)
    )  # fmt: skip
    with CaptureQueriesContext(connection) as queries:
        answer = alice_client.get(adapter.get_absolute_url())
    assert len(queries) <= 8, [query["sql"][:120] for query in queries]
    assert len(answer.context["page"].rows) == listing.PAGE_SIZE

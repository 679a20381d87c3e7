from __future__ import annotations

import csv
import io
import json
import re
from html import unescape
from typing import Any

import pytest
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.urls import reverse

from studio.accounts.models import ApiToken, Team, User
from studio.catalogue import listing
from studio.catalogue.compare_pages import NONE
from studio.catalogue.models import Adapter, AdapterState, Alias, EvaluationRun, SavedView, Score, TestSet
from tests.conftest import signed_in
from tests.factories import make_adapter, make_base_model, make_dataset_version, make_result, make_score

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("data_dir")]


@pytest.fixture
def make(team: Team, alice: User) -> Any:
    base, version = make_base_model(), make_dataset_version(team, alice)

    def make(name: str, difference: float | None = -0.1, **changes: Any) -> Adapter:
        scores = [] if difference is None else [make_score(difference)]
        adapter = make_adapter(
            team, alice, name=name, base_model=base, dataset_version=version, result=make_result(scores=scores)
        )
        if changes:
            Adapter.objects.filter(pk=adapter.pk).update(**changes)
        return adapter

    return make


def names(client: Client, query: str = "") -> list[str]:
    page = client.get(f"/models/{query}")
    assert page.status_code == 200
    return re.findall(r'link-primary font-medium" href="/models/\d+/">([^<]+)</a>', page.text)


def test_every_word_of_a_search_begins_a_word_of_the_name_or_the_card(make: Any, alice_client: Client) -> None:
    make("support-r16")
    make("legal_contracts", card="Answers about leases.")
    assert names(alice_client, "?q=supp") == ["support-r16"]
    assert names(alice_client, "?q=r16+support") == ["support-r16"]
    assert names(alice_client, "?q=leas") == ["legal_contracts"]
    assert names(alice_client, "?q=support+leases") == []
    make("plain", tags=["german", "v1.2"])
    assert names(alice_client, "?q=German") == names(alice_client, "?q=pla+german") == ["plain"]
    assert names(alice_client, "?q=v1.2") == ["plain"]
    assert names(alice_client, "?q=leas+german") == []


@pytest.mark.parametrize(
    "text", ["'", "a & | !", "(((", ":*", "'; DROP TABLE x; --", "\\", "\x00", "<->", "é'*", "%", "!!!"]
)
def test_no_search_is_syntax(text: str, make: Any, alice_client: Client) -> None:
    make("support")
    assert alice_client.get("/models/", {"q": text}).status_code == 200


def test_only_the_newest_version_of_a_name_is_listed_unless_every_one_is_asked_for(
    make: Any, alice_client: Client
) -> None:
    for _ in range(3):
        make("support")
    page = alice_client.get("/models/").text
    assert names(alice_client) == ["support"]
    assert ">v3</span>" in page
    assert names(alice_client, "?every=on") == ["support"] * 3


def test_archived_ones_are_out_of_sight_until_they_are_asked_for(make: Any, alice_client: Client) -> None:
    make("old", state=AdapterState.ARCHIVED)
    make("good", state=AdapterState.APPROVED)
    make("new")
    assert sorted(names(alice_client)) == ["good", "new"]
    assert names(alice_client, "?state=archived") == ["old"]
    assert names(alice_client, "?state=approved") == ["good"]


def test_aliases_and_tags_are_shown_and_filter(make: Any, team: Team, alice_client: Client) -> None:
    first = make("support", tags=["faq", "de"])
    make("support")
    make("other")
    Alias.objects.create(team=team, adapter_name="support", name="champion", adapter=first)
    assert names(alice_client, "?alias=champion") == ["support"], "an older version too"
    assert "@champion" in alice_client.get("/models/?every=on").text
    assert names(alice_client, "?tag=de&every=on") == ["support"]
    assert sorted(names(alice_client, "?alias=nobody")) == ["other", "support"], "what nothing offers asks for nothing"


@pytest.mark.parametrize("sort", ["loss", "updated", "name", "size"])
def test_pages_show_every_adapter_once_and_lead_back(
    sort: str, make: Any, alice_client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "PAGE_SIZE", 3)
    for number in range(8):
        # Equal differences and missing ones are where cursors go wrong.
        make(f"adapter-{number}", None if number > 5 else -0.1 * (number // 2))
    query, seen, pages = f"?sort={sort}", [], []
    while query:
        page = alice_client.get(f"/models/{query}").text
        seen += names(alice_client, query)
        pages.append(query)
        found = re.search(r'rel="next" href="(\?[^"]+)"', page)
        query = found.group(1).replace("&amp;", "&") if found else ""
    assert sorted(seen) == [f"adapter-{number}" for number in range(8)]
    assert len(pages) == 3
    back = re.search(r'rel="prev" href="(\?[^"]+)"', alice_client.get(f"/models/{pages[2]}").text)
    assert back is not None
    assert names(alice_client, back.group(1).replace("&amp;", "&")) == seen[3:6]


@pytest.mark.parametrize("sort", ["loss", "token_f1"])
def test_an_order_by_score_is_right_in_both_directions_and_over_the_border_to_those_not_scored(
    sort: str, make: Any, team: Team, alice_client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "PAGE_SIZE", 3)
    differences = [0.3, -0.2, None, -0.2, 0.1, None, -0.4, None]
    made = [make(f"adapter-{number}", difference) for number, difference in enumerate(differences)]
    for adapter in made:
        for score in adapter.scores.all():
            score.pk, score.evaluation = None, "token_f1"
            score.save()
    best_first = -1 if sort == "token_f1" else 1
    expected = [
        f"adapter-{number}"
        for number in sorted(
            range(8),
            key=lambda n: (differences[n] is None, best_first * (differences[n] or 0), -made[n].created_at.timestamp()),
        )
    ]
    query, pages = f"?sort={sort}", []
    while query:
        with CaptureQueriesContext(connection) as caught:
            page = alice_client.get(f"/models/{query}").text
        assert len(caught) <= 8, query
        pages.append(names(alice_client, query))
        previous = re.search(r'rel="prev" href="(\?[^"]+)"', page)
        found = re.search(r'rel="next" href="(\?[^"]+)"', page)
        query = found.group(1).replace("&amp;", "&") if found else ""
    assert [name for page in pages for name in page] == expected
    backwards = [pages[-1]]
    while previous:
        page = alice_client.get("/models/" + previous.group(1).replace("&amp;", "&")).text
        backwards.insert(0, names(alice_client, previous.group(1).replace("&amp;", "&")))
        previous = re.search(r'rel="prev" href="(\?[^"]+)"', page)
    assert backwards == pages


def test_an_adapter_that_was_scored_again_stands_once_by_its_newest_score(
    make: Any, team: Team, alice_client: Client
) -> None:
    first, second = make("first", -0.3), make("second", -0.2)
    run = EvaluationRun.objects.create(
        team=team, adapter=second, base_model=second.base_model, test_set=TestSet.HELD_OUT, num_rows=9, num_scored=9
    )
    Score.objects.create(adapter=second, run=run, test_set=TestSet.HELD_OUT, **make_score(-0.7).model_dump())
    page = alice_client.get("/models/")
    assert names(alice_client) == ["second", "first"]
    assert [(one.pk, one.shown_score.difference) for one in page.context["page"].adapters] == [
        (second.pk, -0.7), (first.pk, -0.3),
    ]  # fmt: skip


def test_a_page_stays_where_it_is_when_others_are_added(
    make: Any, alice_client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "PAGE_SIZE", 2)
    for number in range(4):
        make(f"adapter-{number}")
    page = alice_client.get("/models/?sort=name").text
    found = re.search(r'rel="next" href="(\?[^"]+)"', page)
    assert found is not None
    make("a-new-one")
    assert names(alice_client, found.group(1).replace("&amp;", "&")) == ["adapter-2", "adapter-3"]


@pytest.mark.parametrize("cursor", ["x", "W10", "bnVsbA", "WyJhIiwgMV0", "W05hTiwgIjIwMjAiLCAxXQ", "A" * 500])
def test_a_cursor_that_is_none_shows_the_first_page(cursor: str, make: Any, alice_client: Client) -> None:
    make("support")
    for name in ("after", "before"):
        assert names(alice_client, f"?{name}={cursor}") == ["support"]


def test_the_export_has_every_row_and_no_formula(make: Any, alice_client: Client) -> None:
    make("=HYPERLINK(1)", -0.1, tags=["+x"])
    make("plain", None)
    answer = alice_client.get("/models/export.csv?sort=loss")
    rows = list(csv.DictReader(io.StringIO(b"".join(answer.streaming_content).decode())))
    assert {row["name"] for row in rows} == {"'=HYPERLINK(1)", "plain"}
    row = next(row for row in rows if row["name"] != "plain")
    assert (row["tags"], row["difference"], row["verdict"]) == ("'+x", "-0.1", "no difference")
    lines = b"".join(alice_client.get("/models/export.jsonl").streaming_content).decode().splitlines()
    assert {json.loads(line)["name"] for line in lines} == {"=HYPERLINK(1)", "plain"}
    assert json.loads(lines[0])["url"].startswith("http://testserver/models/")


def test_views_are_a_persons_own_unless_they_are_shared(
    make: Any, alice_client: Client, bob: User, charlie: User
) -> None:
    make("support")
    query = "state=approved&after=abc"
    alice_client.post(reverse("catalogue:save_view"), {"name": "Mine", "query": query})
    page = alice_client.post(
        reverse("catalogue:save_view"), {"name": "Ours", "query": query, "shared": "on"}, follow=True
    )
    assert "The view “Ours” is saved." in page.text
    assert SavedView.objects.get(name="Mine").query == "state=approved", "a place in a list is no filter"
    seen = signed_in(bob).get("/models/").text
    assert ("Ours" in seen, "Mine" in seen) == (True, False)
    assert "Ours" not in signed_in(charlie).get("/models/").text
    view = SavedView.objects.get(name="Ours")
    url = reverse("catalogue:delete_view", args=[view.pk])
    assert signed_in(bob).post(url).status_code == 404, "only who saved it forgets it"
    alice_client.post(url)
    assert not SavedView.objects.filter(pk=view.pk).exists()


def test_the_comparison_shows_what_differs_and_says_what_cannot_be_compared(
    make: Any, team: Team, alice_client: Client
) -> None:
    one, other = make("one"), make("other")
    recipe = one.recipe | {"settings": {"rank": 64}}
    Adapter.objects.filter(pk=one.pk).update(recipe=recipe)
    page = alice_client.get(f"/models/compare/?run={one.pk}&run={other.pk}").text
    assert "settings.rank" in page
    assert "precision" not in page.split("<tbody>")[1].split("</tbody>")[0], "equal settings are left out"
    assert "training.seed" in alice_client.get(f"/models/compare/?runs={one.pk},{other.pk}&all").text
    assert "Not comparable with other v1" in page, "their rows were not recorded"
    answer = alice_client.get(f"/models/compare/?runs={one.pk},{other.pk}&as=csv")
    assert "settings.rank,64,16" in b"".join(answer.streaming_content).decode()


def test_the_comparison_names_every_dataset_of_a_mixture_and_each_of_its_settings(
    make: Any, team: Team, alice: User, alice_client: Client
) -> None:
    one, faq = make("one"), make_dataset_version(team, alice, name="FAQ", num_rows=20)
    metrics = ["loss", {"name": "regex", "settings": {"pattern": "a+"}}]
    mixture = make_adapter(
        team, alice, name="mixture", base_model=one.base_model, dataset_version=one.dataset_version, mixed=[faq],
        evaluation={"metrics": metrics},
    )  # fmt: skip
    answer = alice_client.get(f"/models/compare/?runs={one.pk},{mixture.pk}&as=csv")
    told = {name: values for name, *values in csv.reader(io.StringIO(b"".join(answer.streaming_content).decode()))}
    assert told["dataset version"] == [str(one.dataset_version), f"{one.dataset_version}, FAQ v1"]
    assert told["mix.1.name"] == [NONE, "FAQ v1"]
    assert told["mix.1.weight"] == [NONE, "0.5"]
    assert told["mix.1.sha256"] == [NONE, faq.sha256]
    assert (told["evaluation.metrics.1"][1], told["evaluation.metrics.2.settings.pattern"][1]) == ("loss", "a+")
    assert not any("{" in value for values in told.values() for value in values), "no program's notation"
    page = alice_client.get(f"/models/compare/?runs={one.pk},{mixture.pk}").text
    assert "mix.1.weight" in page
    assert f"{one.dataset_version}, FAQ v1" in page


def test_at_most_ten_are_compared_and_only_the_teams(
    make: Any, alice_client: Client, other_team: Team, charlie: User
) -> None:
    mine = [make(f"adapter-{number}") for number in range(11)]
    theirs = make_adapter(other_team, charlie, name="secret")
    ids = ",".join(str(one.pk) for one in (theirs, *mine))
    page = alice_client.get(f"/models/compare/?runs={ids}").text
    assert "secret" not in page
    assert "3 of those chosen are not shown" in page
    assert alice_client.get("/models/compare/?runs=x,,9999999999").status_code == 200


def test_list_and_comparison_keep_to_eight_queries(make: Any, team: Team, alice: User, alice_client: Client) -> None:
    made = [make(f"adapter-{number}") for number in range(8)]
    main, faq = made[0].dataset_version, make_dataset_version(team, alice, name="FAQ", num_rows=20)
    made += [
        make_adapter(team, alice, name=f"mixture-{number}", base_model=made[0].base_model, dataset_version=main,
                     mixed=[faq]) for number in range(2)
    ]  # fmt: skip
    ids = ",".join(str(one.pk) for one in made)
    for url in ("/models/?q=adapter&tag=x", "/models/", f"/models/compare/?runs={ids}"):
        alice_client.get(url)
        with CaptureQueriesContext(
            connection,
        ) as queries:
            alice_client.get(url)
        assert len(queries) <= 8, url


def headers(page: str) -> list[str]:
    head = page.split("<thead>")[1].split("</thead>")[0]
    return [" ".join(re.sub(r"<[^>]+>", " ", one).split()) for one in re.findall(r"<th .*?</th>", head, re.DOTALL)]


@pytest.mark.parametrize("search", ["support", "nothing"])
def test_without_the_filters_the_columns_and_the_order_stay(make: Any, alice_client: Client, search: str) -> None:
    make("support", tags=["de"])
    kept = "every=on&sort=name&cols=1&col=method&col=size"
    page = alice_client.get(f"/models/?{kept}&q={search}&tag=de").text
    links = [unescape(one) for one in re.findall(r'href="([^"]*)"', page)]
    assert links.count(f"/models/?{kept}") == (1 if search == "support" else 2), "Clear, and Show all"
    assert (f"?tag=de&{kept}" in links) == (search == "support")
    assert headers(alice_client.get(f"/models/?{kept}").text)[5:] == ["Method", "Size"]
    plain = alice_client.get(f"/models/?q={search}").text
    assert 'href="/models/?"' in plain


def test_the_columns_that_are_chosen_are_shown_and_stay_in_the_url_and_in_saved_views(
    team: Team, alice: User, alice_client: Client
) -> None:
    scores = [make_score(-0.1), make_score(0.25, evaluation="token_f1")]
    make_adapter(team, alice, name="both", result=make_result(scores=scores))
    make_adapter(team, alice, name="loss only", result=make_result(scores=scores[:1]))
    usual = headers(alice_client.get("/models/").text)
    assert usual[5:] == ["Base", "Method", "Dataset", "Size", "Made"]
    assert headers(alice_client.get("/models/?col=by").text) == usual, "nobody has chosen yet"
    query = "sort=loss&cols=1&col=by&col=token_f1&col=parameters&col=nonsense&col=loss"
    with CaptureQueriesContext(connection) as caught:
        page = alice_client.get(f"/models/?{query}").text
    assert len(caught) <= 8
    assert headers(page)[5:] == ["Token F1 ↑", "Parameters", "By"]
    rows = {name: row for row in page.split('<tr id="adapter-row-')[1:] for name in ("both", "loss only")
            if f">{name}</a>" in row}  # fmt: skip
    assert "+0.250 [" in rows["both"]
    assert '<span class="muted">\N{EN DASH}</span>' in rows["loss only"]
    assert "4,884,480" in rows["both"]
    assert headers(alice_client.get("/models/?cols=1").text)[5:] == []
    # The filters' form keeps the columns, and the columns' form the filters.
    filtering, choosing = (page.split(f'aria-label="{label}"')[1].split("</form>")[0]
                           for label in ("Filter and sort", "Columns"))  # fmt: skip
    assert 'name="col" value="token_f1"' in filtering
    assert 'type="hidden" name="sort" value="loss"' in choosing
    assert re.search(r'value="token_f1" checked', choosing)
    assert not re.search(r'value="size" checked', choosing)
    alice_client.post(reverse("catalogue:save_view"), {"name": "Wide", "query": query + "&after=abc"})
    kept = SavedView.objects.get().query
    assert headers(alice_client.get(f"/models/?{kept}").text)[5:] == ["Token F1 ↑", "Parameters", "By"]


def test_saved_views_can_be_listed_made_and_deleted_by_the_api(
    team: Team, alice: User, bob: User, charlie: User
) -> None:
    def api(user: User) -> Client:
        own = user.memberships.get().team
        _, secret = ApiToken.issue(team=own, user=user, name="x", scopes=["read", "write"])
        return Client(headers={"authorization": f"Bearer {secret}"})

    def save(client: Client, **body: object) -> Any:
        return client.post("/api/v1/adapters/views/", body, content_type="application/json")

    hers, his, others = api(alice), api(bob), api(charlie)
    made = save(hers, name="Best", query="?sort=token_f1&after=x", is_shared=True)
    assert made.status_code == 201
    assert (made.json()["query"], made.json()["user"]) == ("sort=token_f1", "alice")
    assert save(hers, name="Best", query="state=approved", is_shared=True).json()["id"] == made.json()["id"]
    save(hers, name="Mine")
    assert [one["name"] for one in hers.get("/api/v1/adapters/views/").json()] == ["Best", "Mine"]
    assert [(one["name"], one["query"]) for one in his.get("/api/v1/adapters/views/").json()] == [
        ("Best", "state=approved"),
    ]
    assert others.get("/api/v1/adapters/views/").json() == []
    url = f"/api/v1/adapters/views/{made.json()['id']}/"
    assert his.delete(url).status_code == 404, "only who saved it forgets it"
    assert others.delete(url).status_code == 404
    assert hers.delete(url).status_code == 204
    assert save(hers, name="  ").json()["error"]["field"] == "name"
    refused = save(hers, name="Long", query="q=" + "x" * 1500)
    assert (refused.status_code, refused.json()["error"]["field"]) == (422, "query")
    read_only = ApiToken.issue(team=team, user=bob, name="r", scopes=["read"])[1]
    assert save(Client(headers={"authorization": f"Bearer {read_only}"}), name="x").status_code == 403

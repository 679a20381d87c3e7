"""Inbox, review, policy and discussion: what people see, in few queries, and nothing of another team."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from studio.accounts.models import ApiToken, AuditEvent, Team, User
from studio.catalogue.models import Adapter
from studio.reviews import checking, commenting, judging, reviewing
from studio.reviews.models import Comment, Review
from studio.reviews.policies import PolicySettings, change_policy, current_policy, default_settings
from studio.reviews.reviewing import NotAllowedError
from tests.conftest import signed_in
from tests.factories import make_score
from tests.studio.reviews.conftest import actor, submitted
from workers.results import OverlapRecord

HOSTILE = "<script>alert(1)</script> [x](javascript:alert(2)) ![y](http://host/z) **bold** @lena"


@pytest.fixture
def review(make_good: Callable[..., Adapter]) -> Review:
    return submitted(make_good(overlap=None), note="For the help desk.")


def num_queries(client: Client, path: str) -> int:
    headers = {"HX-Request": "true"} if path.endswith("/gates/") else {}
    client.get(path, headers=headers)
    with CaptureQueriesContext(connection) as caught:
        assert client.get(path, headers=headers).status_code == 200
    return len(caught)


def test_every_page_takes_at_most_eight_queries_however_much_there_is(
    review: Review, make_good: Callable[..., Adapter], lena: User, ludwig: User
) -> None:
    for number in range(5):
        other = submitted(make_good(f"other {number}"))
        reviewing.assign(other.pk, actor(lena), user_ids=[lena.pk, ludwig.pk])
    reviewing.assign(review.pk, actor(lena), user_ids=[lena.pk, ludwig.pk])
    reviewing.waive(review.pk, actor(lena), gate="overlap", reason="Looked at.")
    first = judging.reserve_next(review, actor(lena))
    assert first is not None
    judging.judge(review.pk, first.pk, "a", actor(lena))
    judging.reserve_next(review, actor(lena))
    for who in (lena, ludwig):
        said = commenting.comment(review, actor(who), "Hm.", sample_id=first.sample_id)
        commenting.comment(review, actor(lena), "Yes.", answers=said.pk)
    client = signed_in(lena)
    one = f"/reviews/{review.pk}"
    paths = ["/reviews/", "/reviews/?tab=waiting", "/reviews/?tab=done", "/reviews/policy/", "/reviews/count/",
             f"{one}/", f"{one}/gates/", f"{one}/samples/", f"{one}/threads/", f"{one}/people/"]  # fmt: skip
    counted = {path: num_queries(client, path) for path in paths}
    assert {path: number for path, number in counted.items() if number > 8} == {}


def test_the_review_shows_what_hinders_it_first(review: Review, lena: User) -> None:
    page = " ".join(signed_in(lena).get(f"/reviews/{review.pk}/").text.split())
    assert "Test rows were not trained on: not known" in page
    assert page.index("Test rows were not trained on") < page.index("Beats the base: passed")
    assert "Approve: 1 gate to go" in page
    assert "For the help desk." in page


def test_gates_that_are_being_checked_are_asked_for_until_they_are_known(
    make_good: Callable[..., Adapter], lena: User
) -> None:
    waiting, client = submitted(make_good(), check=False), signed_in(lena)
    gates = f"/reviews/{waiting.pk}/gates/"
    assert f'hx-get="{gates}"' in client.get(f"/reviews/{waiting.pk}/").text
    assert client.get(gates).headers["Location"] == f"/reviews/{waiting.pk}/#gates"
    fragment = client.get(gates, headers={"HX-Request": "true"}).text
    assert f'hx-get="{gates}"' in fragment
    assert "Approve: wait for the gates" in fragment
    checking.check(waiting.pk)
    fragment = client.get(gates, headers={"HX-Request": "true"}).text
    assert "hx-get" not in fragment
    assert "gates pass.</strong>" in fragment
    assert ">Approve</button>" in fragment
    assert "<html" not in fragment


def test_the_adapters_page_judges_by_the_policy_of_its_team(
    make_good: Callable[..., Adapter], lena: User, bob_client: Client, charlie: User
) -> None:
    adapter = make_good(
        general=(make_score(0.3, width=0.02, base_value=2.0),),
        overlap=OverlapRecord(num_held_out_rows=100, num_exact=3, num_near=1),
    )
    page = bob_client.get(adapter.get_absolute_url()).text
    assert "<strong>Forgets: its loss on general text rose by 15 %</strong>" in page
    assert page.count("alert-error") == 2
    asked = default_settings().gates
    asked |= {"forgetting": {"max_rise_percent": 20.0}, "overlap": {"max_percent": 5.0}}
    change_policy(charlie.memberships.get().team, PolicySettings(1, asked), by=charlie)
    assert bob_client.get(adapter.get_absolute_url()).text.count("alert-error") == 2, "another team's policy"
    change_policy(adapter.team, PolicySettings(1, asked), by=lena)
    page = bob_client.get(adapter.get_absolute_url()).text
    assert "alert-error" not in page
    assert "Keeps what its base knew" in page
    asked["beats_base"] = {"evaluation": "token_f1"}
    change_policy(adapter.team, PolicySettings(1, asked), by=lena)
    page = bob_client.get(adapter.get_absolute_url()).text
    assert "The policy decides by Token F1, which was not measured on held-out rows." in page


def test_the_inbox_sorts_reviews_into_mine_waiting_and_done_and_pages_by_key(
    make_good: Callable[..., Adapter], lena: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("studio.reviews.views.PAGE_SIZE", 2)
    reviews = [submitted(make_good(f"name {number}"), check=False) for number in range(5)]
    reviewing.assign(reviews[0].pk, actor(lena), user_ids=[lena.pk])
    reviewing.reject(reviews[4].pk, actor(lena), reason="No.")
    client = signed_in(lena)
    assert [one in client.get("/reviews/").text for one in ("name 0 v1", "name 1 v1")] == [True, False]
    seen: list[str] = []
    path = "/reviews/?tab=waiting"
    while path:
        page = client.get(path).text
        seen += [f"name {number}" for number in range(5) if f">name {number} v1<" in page]
        after = page.split('rel="next" href="')
        path = "/reviews/" + after[1].split('"')[0].replace("&amp;", "&") if len(after) > 1 else ""
    assert sorted(seen) == ["name 0", "name 1", "name 2", "name 3"]
    assert "name 4 v1" in client.get("/reviews/?tab=done").text
    assert client.get("/reviews/?tab=waiting&after=nonsense").status_code == 302


def test_the_number_that_waits_is_shown_to_leads_only(review: Review, lena: User, bob_client: Client) -> None:
    assert ">1<" in signed_in(lena).get("/reviews/count/").text
    assert bob_client.get("/reviews/count/").text.strip() == ""
    assert 'hx-get="/reviews/count/"' in signed_in(lena).get("/reviews/").text
    assert 'hx-get="/reviews/count/"' not in bob_client.get("/reviews/").text


def test_the_adapters_page_can_show_its_review_or_a_button(
    make_good: Callable[..., Adapter], bob_client: Client
) -> None:
    adapter = make_good()
    assert f"/reviews/submit/{adapter.pk}/" in bob_client.get(f"/reviews/of-adapter/{adapter.pk}/").text
    review = submitted(adapter, check=False)
    fragment = bob_client.get(f"/reviews/of-adapter/{adapter.pk}/").text
    assert f'href="/reviews/{review.pk}/"' in fragment
    assert "submit" not in fragment


def test_another_team_finds_nothing(review: Review, charlie_client: Client) -> None:
    for path in ("", "gates/", "samples/", "threads/", "people/", "samples/verdicts.jsonl"):
        assert charlie_client.get(f"/reviews/{review.pk}/{path}").status_code == 404, path
    assert "support" not in charlie_client.get("/reviews/?tab=waiting").text.split("<main")[1]


def test_a_comment_is_sanitised_as_the_model_card_is_and_mentions_are_told(
    review: Review, lena: User, bob_client: Client, charlie: User
) -> None:
    bob_client.post(f"/reviews/{review.pk}/threads/", {"text": f"{HOSTILE} @charlie mail@lena.example @nobody"})
    page = bob_client.get(f"/reviews/{review.pk}/threads/").text.split("<main")[1]
    assert "<strong>bold</strong>" in page
    assert "<script>alert" not in page
    assert 'href="javascript' not in page
    assert "<img" not in page
    mentioned = AuditEvent.objects.filter(action="review.mentioned")
    assert [event.details["mentioned_id"] for event in mentioned] == [lena.pk]


def test_a_thread_is_answered_edited_by_its_author_alone_and_resolved(
    review: Review, lena: User, bob: User, bob_client: Client
) -> None:
    said = commenting.comment(review, actor(bob), "Too short?")
    answer = commenting.comment(review, actor(lena), "Yes.", answers=said.pk)
    with pytest.raises(NotAllowedError):
        commenting.edit(review, said.pk, actor(lena), "Mine now.")
    path = f"/reviews/{review.pk}/threads"
    assert bob_client.post(f"{path}/{answer.pk}/edit/", {"text": "Mine now."}).status_code == 403
    bob_client.post(f"{path}/{said.pk}/edit/", {"text": "Far too short?"})
    bob_client.post(f"{path}/{said.pk}/resolve/", {"resolved": "1"})
    said = Comment.objects.get(pk=said.pk)
    assert (said.text, said.resolved_by, said.edited_at is not None) == ("Far too short?", bob, True)
    bob_client.post(f"{path}/{said.pk}/resolve/", {"resolved": "0"})
    assert Comment.objects.get(pk=said.pk).resolved_at is None
    assert bob_client.post(f"{path}/{said.pk}/edit/", {"text": " "}).status_code == 422


def test_a_lead_changes_the_policy_on_its_page_and_a_trainer_reads_it(
    team: Team, lena: User, bob_client: Client
) -> None:
    client = signed_in(lena)
    form = {"approvals": "2", "overlap.is_on": "on", "overlap.max_percent": "0.5", "note": "Stricter."}
    assert client.post("/reviews/policy/", form).status_code == 302
    policy = current_policy(team)
    assert (policy.version, policy.settings) == (
        2,
        {"approvals": 2, "gates": {"overlap": {"max_percent": 0.5}}, "scans": {}},
    )
    wrong = client.post("/reviews/policy/", form | {"overlap.max_percent": "much"})
    assert wrong.status_code == 422
    assert "is a number from 0 to 100" in wrong.text
    assert bob_client.post("/reviews/policy/", form).status_code == 403
    assert "Stricter." in bob_client.get("/reviews/policy/").text
    assert "older version" in bob_client.get("/reviews/policy/?version=1").text
    assert AuditEvent.objects.get(action="review.policy_changed").details["note"] == "Stricter."


def test_the_policy_and_a_review_by_the_api(team: Team, make_good: Any, lena: User) -> None:
    _, secret = ApiToken.issue(team=team, user=lena, name="x", scopes=["read", "write"])
    client = Client(headers={"Authorization": f"Bearer {secret}"})

    def post(path: str, body: dict[str, Any]) -> Any:
        return client.post(f"/api/v1/{path}", body, content_type="application/json")

    assert client.get("/api/v1/policies/current/").json()["created_at"] is None
    assert post("policies/", {"approvals": 1, "gates": {"nothing": {}}}).status_code == 422
    assert post("policies/", {"approvals": 1, "gates": {"overlap": {}}}).json()["version"] == 2
    adapter = make_good()
    made = post("reviews/", {"adapter_id": adapter.pk}).json()
    assert (made["state"], made["gates_are_due"], made["policy_version"]) == ("open", True, 2)
    refused = post(f"reviews/{made['id']}/approve/", {})
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "review_state")
    item = post(f"reviews/{made['id']}/samples/next/", {}).json()
    assert {item["a"], item["b"]} == {f"base {item['line']}", f"mine {item['line']}"}
    told = post(f"reviews/{made['id']}/samples/{item['id']}/judge/", {"choice": "a"}).json()
    assert told["winner"] == ("base" if item["a"].startswith("base") else "adapter")
    listed = client.get("/api/v1/reviews/?tab=waiting").json()["items"]
    assert [(one["adapter_name"], one["adapter_version"]) for one in listed] == [("support", 1)]


def test_the_review_begins_with_what_was_found_in_the_adapter_by_its_policys_thresholds(
    make_good: Callable[..., Adapter], lena: User, team: Team
) -> None:
    leaked = OverlapRecord(num_held_out_rows=100, num_exact=3, num_near=0)
    review = submitted(make_good(overlap=leaked))
    page = " ".join(signed_in(lena).get(f"/reviews/{review.pk}/").text.split())
    assert page.index("Trained on its test rows: 3 of 100") < page.index("Test rows were not trained on: failed")
    assert f'href="/models/{review.adapter_id}/#overlap"' in page
    _, secret = ApiToken.issue(team=team, user=lena, name="x", scopes=["read"])
    api = Client(headers={"authorization": f"Bearer {secret}"})
    told = api.get(f"/api/v1/reviews/{review.pk}/").json()["findings"]
    assert (told[0]["code"], told[0]["level"]) == ("overlap", "bad")
    policy = current_policy(review.team)
    settings = PolicySettings.from_dict(policy.settings)
    changed = {**settings.gates, "overlap": {"max_percent": 5.0}}
    change_policy(review.team, PolicySettings.cleaned(settings.approvals, changed), by=lena)
    milder = submitted(make_good("milder", overlap=leaked))
    told = api.get(f"/api/v1/reviews/{milder.pk}/").json()["findings"]
    assert (told[0]["code"], told[0]["level"]) == ("overlap", "warning")


def test_what_waits_is_ordered_by_due_date_and_then_the_longest_waiting_first(
    make_good: Callable[..., Adapter], lena: User, team: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("studio.reviews.views.PAGE_SIZE", 2)
    today = timezone.localdate()
    due = {"old": None, "late": today + timedelta(days=9), "soon": today + timedelta(days=1), "new": None}
    for name, day in due.items():
        submitted(make_good(name), check=False, due_on=day)
    client, seen, path = signed_in(lena), [], "/reviews/?tab=waiting"
    assert "By due date, then the longest waiting first." in client.get(path).text
    while path:
        page = client.get(path).text
        seen += re.findall(r">(\w+) v1</a></h2>", page)
        after = re.search(r'rel="next" href="([^"]+)"', page)
        path = "/reviews/" + after.group(1).replace("&amp;", "&") if after else ""
    assert seen == ["soon", "late", "old", "new"]
    _, secret = ApiToken.issue(team=team, user=lena, name="x", scopes=["read"])
    api = Client(headers={"authorization": f"Bearer {secret}"})
    told, url = [], "/api/v1/reviews/?tab=waiting&limit=3"
    while url:
        answer = api.get(url).json()
        told += [one["adapter_name"] for one in answer["items"]]
        url = f"/api/v1/reviews/?tab=waiting&limit=3&after={answer['next']}" if answer["next"] else ""
    assert told == seen
    refused = api.get("/api/v1/reviews/?tab=waiting&after=nonsense")
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_cursor")

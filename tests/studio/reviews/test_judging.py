"""Blind verdicts: one item with one person, in an order that nobody can guess, and a tally that is exact."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import pytest
from django.test import Client
from django.utils import timezone
from scipy.stats import beta

from studio.accounts.models import Team, User
from studio.catalogue.models import Adapter
from studio.reviews import judging, reviewing
from studio.reviews.models import BlindItem, Review
from studio.reviews.policies import PolicySettings, change_policy, default_settings
from studio.reviews.reviewing import ReviewError
from studio.reviews.tally import tally
from tests.conftest import signed_in
from tests.studio.reviews.conftest import actor, submitted
from tests.studio.reviews.test_reviewing import at_once
from workers.proportions import clopper_pearson


@pytest.fixture
def review(adapter: Adapter) -> Review:
    return submitted(adapter)


def judge_next(review: Review, who: User, choice: str) -> BlindItem:
    item = judging.reserve_next(review, actor(who))
    assert item is not None
    return judging.judge(review.pk, item.pk, choice, actor(who))


def test_an_item_is_with_one_person_for_a_quarter_of_an_hour(review: Review, lena: User, ludwig: User) -> None:
    mine, theirs = (judging.reserve_next(review, actor(who)) for who in (lena, ludwig))
    assert mine is not None
    assert theirs is not None
    assert mine.pk != theirs.pk
    assert judging.reserve_next(review, actor(lena)) == mine, "asked again, it is the same one"
    with pytest.raises(ReviewError, match="somebody else"):
        judging.judge(review.pk, mine.pk, "a", actor(ludwig))
    BlindItem.objects.filter(pk=mine.pk).update(reserved_until=timezone.now() - timedelta(seconds=1))
    judging.judge(review.pk, theirs.pk, "same", actor(ludwig))
    assert judging.reserve_next(review, actor(ludwig)) == mine
    with pytest.raises(ReviewError, match="somebody else"):
        judging.judge(review.pk, mine.pk, "a", actor(lena))


@pytest.mark.django_db(transaction=True)
def test_two_people_who_ask_at_the_same_moment_never_get_the_same_item(
    review: Review, lena: User, ludwig: User, alice: User
) -> None:
    for _ in range(2):
        items = at_once(*(lambda who=who: judging.reserve_next(review, actor(who)) for who in (lena, ludwig, alice)))
        assert len({item.pk for item in items}) == 3  # type: ignore[attr-defined]
        for item, who in zip(items, (lena, ludwig, alice), strict=True):
            judging.judge(review.pk, item.pk, "same", actor(who))  # type: ignore[attr-defined]
    assert judging.reserve_next(review, actor(lena)) is None


def test_the_page_does_not_tell_whose_answer_is_whose_before_the_verdict(review: Review, lena: User) -> None:
    client = signed_in(lena)
    BlindItem.objects.filter(review=review).update(adapter_is_a=False)
    assert "Take the next sample" in client.get(f"/reviews/{review.pk}/samples/").text
    client.post(f"/reviews/{review.pk}/samples/next/")
    item = BlindItem.objects.get(reserved_by=lena)
    page = client.get(f"/reviews/{review.pk}/samples/").text
    line = item.sample.line
    assert page.index(f"base {line}") < page.index(f"mine {line}"), "A is the base's"
    shown = page.split('id="blind"')[1].split("Verdicts")[0].replace(f"base {line}", "").replace(f"mine {line}", "")
    assert "adapter" not in shown.split("<form")[0].lower()
    after = client.post(f"/reviews/{review.pk}/samples/{item.pk}/judge/", {"choice": "b"}, follow=True).text
    assert "this adapter's answer (B) is better" in after.replace("&#x27;", "'")


def test_the_order_is_drawn_once_and_stays(make_good: Any, lena: User) -> None:
    reviews = [submitted(make_good(f"name {number}")) for number in range(8)]
    sides = [item.adapter_is_a for review in reviews for item in review.items.order_by("position")]
    assert len(sides) == 48
    assert 5 < sum(sides) < 43, "a fair coin leaves this range once in ten million"
    item = judging.reserve_next(reviews[0], actor(lena))
    assert item is not None
    before = (item.answer("a"), item.answer("b"))
    again = judging.reserve_next(reviews[0], actor(lena))
    assert again is not None
    assert (again.answer("a"), again.answer("b")) == before


def test_undo_takes_back_ones_own_newest_verdict(review: Review, lena: User, ludwig: User) -> None:
    first = judge_next(review, lena, "a")
    judge_next(review, ludwig, "b")
    second = judge_next(review, lena, "bad")
    assert judging.undo(review.pk, actor(lena)).pk == second.pk
    assert judging.reserved_item(review, actor(lena)) == second
    assert judging.undo(review.pk, actor(lena)).pk == first.pk
    assert judging.tally_of(review).num_judged == 1
    with pytest.raises(ReviewError, match="nothing to undo"):
        judging.undo(review.pk, actor(lena))


@pytest.mark.parametrize(("won", "total"), [(0, 5), (5, 5), (3, 7), (120, 200), (1, 1)])
def test_the_interval_is_that_of_clopper_and_pearson(won: int, total: int) -> None:
    low, high = clopper_pearson(won, total)
    assert low == pytest.approx(0.0 if won == 0 else beta.ppf(0.025, won, total - won + 1), abs=1e-9)
    assert high == pytest.approx(1.0 if won == total else beta.ppf(0.975, won + 1, total - won), abs=1e-9)


def test_no_share_is_made_up_where_nothing_was_decided() -> None:
    found = tally({"same": 3, "bad": 1}, num_items=9)
    assert (found.num_judged, found.share, found.low, found.high) == (4, None, None, None)


def test_the_verdicts_come_as_json_lines_that_preference_training_can_read(review: Review, lena: User) -> None:
    client = signed_in(lena)
    BlindItem.objects.filter(review=review).update(adapter_is_a=True)
    for choice in ("a", "b", "same", "bad"):
        judge_next(review, lena, choice)
    flagged = judge_next(review, lena, "a")
    judging.annotate(review.pk, flagged.pk, actor(lena), is_flagged=True, note="Cut off.")
    lines = [json.loads(line) for line in client.get(f"/reviews/{review.pk}/samples/verdicts.jsonl").text.splitlines()]
    assert [line["verdict"] for line in lines] == ["adapter", "base", "same", "bad", "adapter"]
    assert [line["chosen"] is None for line in lines] == [False, False, True, True, False]
    assert (lines[4]["is_flagged"], lines[4]["note"], lines[4]["judged_by"]) == (True, "Cut off.", "lena")
    url = f"/reviews/{review.pk}/samples/verdicts.jsonl?only=preferences"
    pairs = [json.loads(line) for line in client.get(url).text.splitlines()]
    for pair, (chosen, rejected) in zip(pairs, (("mine", "base"), ("base", "mine")), strict=True):
        number = pair["line"]
        assert (pair["prompt"], pair["chosen"], pair["rejected"]) == (
            f"Question {number}?", f"{chosen} {number}", f"{rejected} {number}"
        )  # fmt: skip


def test_a_policy_can_ask_for_blind_verdicts(team: Team, adapter: Adapter, alice: User, lena: User) -> None:
    gates = default_settings().gates | {"blind_samples": {"min_judged": 2}}
    change_policy(team, PolicySettings(1, gates), by=alice)
    review = submitted(adapter)
    judge_next(review, lena, "a")
    with pytest.raises(ReviewError, match="Samples were judged blind"):
        reviewing.approve(review.pk, actor(lena))
    judge_next(review, lena, "same")
    assert review.outcomes.get(gate="blind_samples").sentence == "2 samples were judged blind; the policy asks for 2."
    reviewing.approve(review.pk, actor(lena))


def test_an_author_sees_the_tally_and_judges_nothing(review: Review, bob_client: Client) -> None:
    page = bob_client.get(f"/reviews/{review.pk}/samples/").text
    assert "Leads and admins who did not make the adapter judge its samples." in page
    assert bob_client.post(f"/reviews/{review.pk}/samples/next/").status_code == 403

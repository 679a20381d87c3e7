"""Blind verdicts on a review's samples: one item is with one person at a time, and is judged once.

A reservation is a row's own `reserved_by` and `reserved_until`. Who asks for an item takes the first free one that
nobody else is taking at this moment (FOR UPDATE SKIP LOCKED), so two people never get the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from django.db import transaction
from django.db.models import Case, Count, Q, QuerySet, Value, When
from django.utils import timezone

from studio.accounts.models import record
from studio.reviews import checking
from studio.reviews.models import BlindItem, Choice, Review
from studio.reviews.reviewing import MAX_REASON, Action, Actor, ReviewError, locked, require
from studio.reviews.tally import Tally, tally

RESERVED_FOR = timedelta(minutes=15)
BLIND_GATE = "blind_samples"


def reserved_item(review: Review, actor: Actor) -> BlindItem | None:
    """The item that this person is judging; None when they have none, or their time ran out."""
    mine = _of(review).filter(judged_at=None, reserved_by=actor.user, reserved_until__gt=timezone.now())
    return mine.order_by("position").first()


def reserve_next(review: Review, actor: Actor) -> BlindItem | None:
    """The item that this person is to judge now, kept from others for a quarter of an hour; None when none is free.

    Asked again it gives the same one, with the full time.
    """
    require(Action.JUDGE, actor, review.adapter, review.state)
    now = timezone.now()
    with transaction.atomic():
        is_mine = Q(reserved_by=actor.user)
        free = review.items.filter(is_mine | Q(reserved_until=None) | Q(reserved_until__lte=now), judged_at=None)
        order = Case(When(is_mine & Q(reserved_until__gt=now), then=Value(0)), default=Value(1))
        item = free.select_for_update(skip_locked=True, of=("self",)).order_by(order, "position").first()
        if item is None:
            return None
        item.reserved_by, item.reserved_until = actor.user, now + RESERVED_FOR
        item.save(update_fields=["reserved_by", "reserved_until"])
    return _of(review).get(pk=item.pk)


def judge(review_id: int, item_id: int, choice: str, actor: Actor) -> BlindItem:
    """A verdict on an item that this person has reserved.

    Raises:
        ReviewError: it is reserved for somebody else or judged already, or there is no such verdict.
    """
    if choice not in Choice.values:
        raise ReviewError(
            f'There is no verdict "{choice}".', next_step=f"Choose among: {', '.join(Choice.values)}.", field="choice"
        )
    with locked(review_id, Action.JUDGE, actor) as review:
        now = timezone.now()
        # One conditional UPDATE: whose time ran out keeps the item as long as nobody else has taken it.
        mine = review.items.filter(pk=item_id, judged_at=None, reserved_by=actor.user)
        if not mine.update(choice=choice, judged_by=actor.user, judged_at=now, reserved_until=None, reserved_by=None):
            raise ReviewError("This sample was judged by somebody else meanwhile, or is with somebody else now.")
        item = _of(review).get(pk=item_id)
        checking.check_now(review, BLIND_GATE)
        record("review.sample_judged", team=review.team, user=actor.user, token=actor.token, target=review,
               item=item.pk, line=item.sample.line, winner=item.winner())  # fmt: skip
    return item


def undo(review_id: int, actor: Actor) -> BlindItem:
    """This person's newest verdict in the review is none any more, and its item is theirs again.

    Raises:
        ReviewError: they have judged nothing here.
    """
    with locked(review_id, Action.JUDGE, actor) as review:
        item = last_judged(review, actor)
        if item is None:
            raise ReviewError("You have judged nothing in this review, so there is nothing to undo.")
        now = timezone.now()
        # What they were about to judge is free again, so that they hold one item.
        review.items.filter(judged_at=None, reserved_by=actor.user).update(reserved_by=None, reserved_until=None)
        review.items.filter(pk=item.pk).update(
            choice="", judged_by=None, judged_at=None, reserved_by=actor.user, reserved_until=now + RESERVED_FOR
        )
        checking.check_now(review, BLIND_GATE)
        record("review.verdict_undone", team=review.team, user=actor.user, token=actor.token, target=review,
               item=item.pk, line=item.sample.line)  # fmt: skip
    return _of(review).get(pk=item.pk)


def annotate(
    review_id: int, item_id: int, actor: Actor, *, is_flagged: bool | None = None, note: str | None = None
) -> BlindItem:
    """A flag (something is wrong with the sample) or a note on an item that this person has reserved or judged.

    Raises:
        ReviewError: the item is somebody else's.
    """
    with locked(review_id, Action.JUDGE, actor) as review:
        changes: dict[str, Any] = {} if is_flagged is None else {"is_flagged": is_flagged}
        if note is not None:
            changes["note"] = note.strip()[:MAX_REASON]
        mine = review.items.filter(Q(reserved_by=actor.user) | Q(judged_by=actor.user), pk=item_id)
        if not mine.update(**changes):
            raise ReviewError("This sample is with somebody else.")
        record("review.sample_noted", team=review.team, user=actor.user, token=actor.token, target=review,
               item=item_id, is_flagged=is_flagged, has_note=bool(note))  # fmt: skip
    return _of(review).get(pk=item_id)


def last_judged(review: Review, actor: Actor) -> BlindItem | None:
    """The item that this person judged last."""
    return _of(review).filter(judged_by=actor.user).order_by("-judged_at", "-pk").first()


def tally_of(review: Review) -> Tally:
    """How the verdicts of a review stand; one query."""
    judged = Q(judged_at__isnull=False)
    found = review.items.aggregate(
        num_items=Count("pk"),
        adapter=Count("pk", judged & (Q(choice="a", adapter_is_a=True) | Q(choice="b", adapter_is_a=False))),
        base=Count("pk", judged & (Q(choice="a", adapter_is_a=False) | Q(choice="b", adapter_is_a=True))),
        same=Count("pk", judged & Q(choice="same")),
        bad=Count("pk", judged & Q(choice="bad")),
    )  # fmt: skip
    num_items = found.pop("num_items")
    return tally(found, num_items=num_items)


def verdict_lines(review: Review, *, preferences_only: bool = False) -> Iterator[str]:
    """Every verdict of a review as a line of JSON.

    `prompt`, `chosen` and `rejected` are what preference training reads; without a winner the last two are null.
    `preferences_only` leaves those and flagged samples out.
    """
    items = _of(review).filter(judged_at__isnull=False).select_related("judged_by").order_by("position")
    if preferences_only:
        items = items.filter(choice__in=[Choice.A, Choice.B], is_flagged=False)
    for item in items:
        answers = {"adapter": item.sample.adapter_answer, "base": item.sample.base_answer}
        winner = item.winner()
        loser = {"adapter": "base", "base": "adapter"}.get(winner)
        yield (
            json.dumps(
                {
                    "prompt": item.sample.prompt,
                    "chosen": answers[winner] if loser else None,
                    "rejected": answers[loser] if loser else None,
                    "verdict": winner,
                    "reference": item.sample.reference,
                    "line": item.sample.line,
                    "adapter": review.adapter.name,
                    "version": review.adapter.version,
                    "is_flagged": item.is_flagged,
                    "note": item.note,
                    "judged_by": item.judged_by.username if item.judged_by else None,
                    "judged_at": item.judged_at.isoformat() if item.judged_at else None,
                },
                ensure_ascii=False,
            )
            + "\n"
        )


def _of(review: Review) -> QuerySet[BlindItem]:
    return BlindItem.objects.filter(review=review).select_related("sample")

"""Checking the gates of reviews, in a worker: files are read whole, which takes longer than a page may.

A review counts how often its gates were asked for and which of these was answered last, so that an answer which comes
too late or twice changes nothing, and one that never comes is asked for again.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from datetime import timedelta
from functools import partial

from celery import current_app
from django.db import transaction
from django.db.models import F
from django.utils import timezone
from kombu.exceptions import OperationalError

from studio.accounts.models import record
from studio.catalogue.models import Adapter
from studio.reviews.gates import Found, gates, unknown
from studio.reviews.models import GateOutcome, Review, ReviewState
from studio.reviews.policies import PolicySettings
from studio.storage import StorageError
from workers.errors import ExplainedError

logger = logging.getLogger(__name__)

# Reviews whose gates people look at: later ones show what changed since the approval.
CHECKED_STATES = (ReviewState.OPEN, ReviewState.APPROVED)
# A message that was lost, or a check whose worker died. A check that takes longer is done twice, which harms nothing.
LOST_AFTER = timedelta(seconds=60)


def queue_check(review_id: int) -> None:
    """Ask a worker to check a review's gates. Without a broker the sweep asks again later: nothing is lost."""
    try:
        # By name: tasks.py calls this module, which therefore cannot know it.
        current_app.send_task("studio.reviews.tasks.check_gates", (review_id,), retry=False)
    except OperationalError:
        logger.warning("The gates of review %s could not be queued; the sweep will.", review_id, exc_info=True)


def ask_again(*review_ids: int) -> None:
    """What was found is out of date: check again after the running transaction."""
    found = Review.objects.filter(pk__in=review_ids)
    found.update(gates_asked=F("gates_asked") + 1, gates_queued_at=timezone.now())
    for review_id in review_ids:
        transaction.on_commit(partial(queue_check, review_id))


def ask_again_for(adapter: Adapter, states: Collection[str] = CHECKED_STATES) -> None:
    """Check the gates of an adapter's reviews again: something new was measured."""
    ask_again(*Review.objects.filter(adapter=adapter, state__in=states).values_list("pk", flat=True))


def check_waiting() -> int:
    """Queue the reviews whose gates nobody has checked; gives their number."""
    lost = Review.objects.filter(
        gates_checked__lt=F("gates_asked"), state__in=CHECKED_STATES, gates_queued_at__lt=timezone.now() - LOST_AFTER
    )
    waiting = list(lost.order_by("gates_queued_at").values_list("pk", flat=True)[:100])
    Review.objects.filter(pk__in=waiting).update(gates_queued_at=timezone.now())
    for review_id in waiting:
        queue_check(review_id)
    return len(waiting)


def check(review_id: int) -> None:
    """Check every gate of a review's policy and store what was found. Safe to run twice and to lose."""
    rows = Review.objects.select_related("policy").filter(state__in=CHECKED_STATES, gates_checked__lt=F("gates_asked"))
    review = rows.filter(pk=review_id).first()
    if review is None:
        return
    asked = review.gates_asked
    # Read after `asked`: what is measured from now on is asked for again.
    adapter = _read_adapter(review)
    settings = PolicySettings.from_dict(review.policy.settings)
    found = {name: _check_one(name, adapter, one) for name, one in settings.gates.items()}
    with transaction.atomic():
        held = Review.objects.select_for_update(of=("self",)).select_related("adapter", "team").get(pk=review_id)
        if held.gates_checked >= asked:
            return
        was = {one.gate: one.state for one in held.outcomes.all()}
        for name, one in found.items():
            _store(held, name, one)
        held.outcomes.exclude(gate__in=found).delete()
        Review.objects.filter(pk=review_id).update(gates_checked=asked, gates_checked_at=timezone.now())
        states = {name: one.state.value for name, one in found.items()}
        if states != was:
            record("review.gates_checked", team=held.team, target=held, adapter=held.adapter_id, states=states)


def check_now(review: Review, gate: str) -> None:
    """Check one gate that takes no time, where the policy has it. The caller holds the review's lock."""
    settings = PolicySettings.from_dict(review.policy.settings).gates.get(gate)
    if settings is not None:
        _store(review, gate, _check_one(gate, _read_adapter(review), settings))


def _read_adapter(review: Review) -> Adapter:
    rows = Adapter.objects.select_related("base_model", "dataset_version__dataset", "team").prefetch_related("scores")
    return rows.get(pk=review.adapter_id)


def _check_one(name: str, adapter: Adapter, settings: dict[str, object]) -> Found:
    try:
        return gates()[name].check(adapter, settings)
    except (ExplainedError, StorageError) as error:
        logger.warning("The gate %s of adapter %s could not be checked.", name, adapter.pk, exc_info=True)
        said = error.message if isinstance(error, ExplainedError) else (error.strerror or str(error))
        return unknown(f"It could not be checked: {said}")


def _store(review: Review, gate: str, found: Found) -> None:
    outcome = review.outcomes.filter(gate=gate).first() or GateOutcome(review=review, gate=gate)
    # A waiver was given for what was found then: another finding is not waived.
    if (outcome.state, outcome.sentence) != (found.state, found.sentence):
        outcome.waived_by, outcome.waived_at, outcome.waiver_reason = None, None, ""
    outcome.state, outcome.sentence, outcome.figures = found.state, found.sentence, found.figures
    outcome.checked_at = timezone.now()
    outcome.save()

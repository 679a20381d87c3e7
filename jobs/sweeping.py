"""What keeps the queue moving when a message, a worker or beat is lost. Runs in beat's task and in every idle slot."""

from __future__ import annotations

from datetime import timedelta

from django.conf import settings
from django.db import connection, transaction
from django.db.models.functions import Now

from jobs import lifecycle, outbox
from jobs.models import Job, JobState, OutboxMessage
from jobs.products import remove_unregistered_before
from jobs.waking import wake_workers

# Any number that no other advisory lock of the studio uses.
SWEEPER_LOCK = 0x5357454550
# Seconds that a job may be ready without being taken before idle workers are told again, at the default lease of 60 s.
HINT_SECONDS = 30


def sweep() -> None:
    """Take jobs back from lost workers, queue what has waited for its retry, and send what was not sent.

    Safe to run in many places at once. Taking back is not left to one of them: a sweeper that is paused while it
    holds the lock must not keep jobs from being saved.
    """
    lifecycle.reap_expired()
    lifecycle.requeue_due()
    _clear_away()
    with transaction.atomic():
        if not _is_only_sweeper():
            return
        _hint_again()
        outbox.relay()
        outbox.prune()


def _clear_away() -> None:
    """Remove the products of jobs that ended lately without one: their workers died before they could register it."""
    ended = Job.objects.filter(
        state__in=[JobState.FAILED, JobState.CANCELLED], finished_at__gt=Now() - timedelta(hours=1),
        attempts__outcome="lost",
    )  # fmt: skip
    for job in ended.distinct():
        remove_unregistered_before(job)


def _is_only_sweeper() -> bool:
    """Take the sweepers' lock until the end of the transaction; False when another has it.

    The transaction's and not the session's: the database ends an idle transaction by itself, and its lock with it.
    """
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_try_advisory_xact_lock(%s)", [SWEEPER_LOCK])
        return bool(cursor.fetchone()[0])


def _hint_again() -> None:
    """Wake idle workers again when a job has been ready for long: their message may have been lost on its way."""
    hint_age = timedelta(seconds=HINT_SECONDS * settings.LEASE_SECONDS / 60)
    forgotten = Job.objects.filter(state=JobState.QUEUED, not_before__lt=Now() - hint_age)
    recent = OutboxMessage.objects.filter(topic="wake", created_at__gt=Now() - hint_age)
    if forgotten.exists() and not recent.exists():
        wake_workers()

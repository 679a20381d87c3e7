"""Celery tasks: a few lines each, safe to run twice and safe to lose."""

from __future__ import annotations

from celery import shared_task

from studio.datasets import changes, fetching, inspecting, repairing, resumable, row_tables, scanning, splitting


@shared_task
def inspect_dataset(version_id: int) -> None:
    """Inspect a version."""
    inspecting.inspect(version_id)


@shared_task
def inspect_waiting() -> None:
    """Queue versions whose message was lost or whose inspection died."""
    inspecting.inspect_waiting()


@shared_task
def repair_dataset(version_id: int, user_id: int) -> None:
    """Make a corrected version."""
    repairing.repair(version_id, user_id)


@shared_task
def throw_away_old_uploads() -> None:
    """Remove uploads that nobody went on with for a day."""
    resumable.throw_away_old()


@shared_task
def fetch_upload(upload_id: str) -> None:
    """Fetch a file that no browser sends."""
    fetching.fetch(upload_id)


@shared_task
def fetch_waiting() -> None:
    """Queue fetches whose message was lost or whose worker died."""
    fetching.fetch_waiting()


@shared_task
def find_changes(version_id: int) -> None:
    """Compare a version with the one before it."""
    changes.find_changes(version_id)


@shared_task
def freeze_split(split_id: int) -> None:
    """Make a split of a version."""
    splitting.freeze(split_id)


@shared_task
def freeze_waiting() -> None:
    """Queue splits whose message was lost or whose worker died."""
    splitting.freeze_waiting()


@shared_task
def scan_dataset(version_id: int) -> None:
    """Run a version's next scan."""
    scanning.scan_next(version_id)


@shared_task
def scan_waiting() -> None:
    """Queue scans whose message was lost or whose worker died, and those that a version lacks."""
    scanning.scan_waiting()


@shared_task
def prepare_rows(version_id: int) -> None:
    """Write a version's rows at rest."""
    row_tables.prepare(version_id)


@shared_task
def prepare_waiting() -> None:
    """Queue rows at rest whose message was lost or whose worker died."""
    row_tables.prepare_waiting()

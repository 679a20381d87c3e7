"""Blobs and the versions that hold them: one file for equal bytes of every team, so both are looked at under a lock."""

from __future__ import annotations

from django.db import connection, transaction

from studio.datasets.models import DatasetVersion, RowTable
from studio.storage import remove_base_scores, remove_blob


def lock_blob(sha256: str) -> None:
    """Wait until nobody else stores, registers or removes these bytes; held until the transaction ends."""
    # The lock is the database's, because web processes and workers may be several. Its key has 64 bits with a sign:
    # two blobs that share one wait for each other without need, and nothing worse.
    key = int.from_bytes(bytes.fromhex(sha256)[:8], "big", signed=True)
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_advisory_xact_lock(%s)", [key])


def remove_unused_blob(sha256: str) -> None:
    """Delete a blob that no version of any team holds, nor the rows of one."""
    with transaction.atomic():
        lock_blob(sha256)
        is_used = (
            DatasetVersion.objects.filter(sha256=sha256).exists() or RowTable.objects.filter(sha256=sha256).exists()
        )
        if not is_used:
            remove_blob(sha256)
            remove_base_scores(sha256)

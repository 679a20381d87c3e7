"""Blobs, and the versions, splits and rows at rest that hold them: one file for equal bytes of every team, so all are
looked at under a lock.
"""

from __future__ import annotations

from functools import partial

from django.db import connection, transaction

from studio.datasets.models import DatasetSplit, DatasetVersion, RowTable
from studio.storage import remove_base_scores, remove_blob


def lock_blob(sha256: str) -> None:
    """Wait until nobody else stores, registers or removes these bytes; held until the transaction ends."""
    # The lock is the database's, because web processes and workers may be several. Its key has 64 bits with a sign:
    # two blobs that share one wait for each other without need, and nothing worse.
    key = int.from_bytes(bytes.fromhex(sha256)[:8], "big", signed=True)
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_advisory_xact_lock(%s)", [key])


def remove_unused_blob(sha256: str) -> None:
    """Delete a blob that no version, no split and no rows at rest of any team hold, and the scores of base models on
    its rows of each team that holds no version of it."""
    with transaction.atomic():
        lock_blob(sha256)
        versions = DatasetVersion.objects.filter(sha256=sha256)
        # A team's scores tell what the rows say, and are of no use to another one that has the same file.
        teams = set(versions.values_list("dataset__team", flat=True))
        remove_base_scores(sha256, but_of=teams)
        others = (DatasetSplit, RowTable)
        if not teams and not any(held.objects.filter(sha256=sha256).exists() for held in others):
            remove_blob(sha256)


def remove_splits(version: DatasetVersion) -> None:
    """Delete a version's splits with their files, once the transaction is over."""
    digests = set(version.splits.exclude(sha256="").values_list("sha256", flat=True))
    version.splits.all().delete()
    for sha256 in digests:
        transaction.on_commit(partial(remove_unused_blob, sha256))


def remove_row_table(version: DatasetVersion) -> None:
    """Delete a version's rows at rest with their file, once the transaction is over."""
    made = RowTable.objects.filter(version=version)
    digests = set(made.exclude(sha256="").values_list("sha256", flat=True))
    made.delete()
    for sha256 in digests:
        transaction.on_commit(partial(remove_unused_blob, sha256))

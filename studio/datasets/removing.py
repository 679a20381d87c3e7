"""Deleting a dataset: only when nothing needs it, and its files only when no other version holds the same bytes."""

from __future__ import annotations

from collections.abc import Sequence

from django.db import models, transaction

from studio.accounts.models import User, record
from studio.datasets.blobs import remove_unused_blob
from studio.datasets.models import Dataset, DatasetSplit, DatasetVersion, RowTable


class DatasetInUseError(Exception):
    """Jobs or adapters use a version of the dataset; `users` has them."""

    def __init__(self, users: Sequence[models.Model]) -> None:
        super().__init__(f"{len(users)} jobs and adapters use this dataset.")
        self.users = list(users)


def delete_dataset(dataset: Dataset, *, user: User) -> None:
    """Delete a dataset with all its versions; raises DatasetInUseError."""
    with transaction.atomic():
        # Locked, so that no job can be queued on a version between the look and the deletion.
        versions = list(DatasetVersion.objects.select_for_update().filter(dataset=dataset))
        users = [one for version in versions for one in version.users()]
        if users:
            raise DatasetInUseError(users)
        splits = DatasetSplit.objects.filter(version__in=versions).exclude(sha256="")
        tables = RowTable.objects.filter(version__in=versions).exclude(sha256="")
        digests = {version.sha256 for version in versions}
        for made in (splits, tables):
            digests |= set(made.values_list("sha256", flat=True))
        record("dataset.deleted", team=dataset.team, user=user, target=dataset, num_versions=len(versions))
        dataset.delete()
        transaction.on_commit(lambda: _remove_blobs(digests))


def _remove_blobs(digests: set[str]) -> None:
    for sha256 in digests:
        remove_unused_blob(sha256)

"""The licence of a dataset: who says what it is."""

from __future__ import annotations

from django.db import transaction

from studio.accounts.models import ApiToken, User, record
from studio.datasets.models import Dataset


def set_licence(dataset: Dataset, licence: str, *, user: User, token: ApiToken | None = None) -> None:
    """Store a dataset's licence; nothing happens when it has that one."""
    with transaction.atomic():
        before = Dataset.objects.select_for_update().get(pk=dataset.pk).licence
        if before == licence:
            return
        Dataset.objects.filter(pk=dataset.pk).update(licence=licence)
        dataset.licence = licence
        record(
            "dataset.licence_changed", team=dataset.team, user=user, token=token, target=dataset,
            before=before, after=licence,
        )  # fmt: skip

"""Where an attempt puts its product, and how what was never registered goes away again."""

from __future__ import annotations

from jobs.models import Job
from studio import storage


def product_key(job: Job, attempt: int) -> str:
    """The storage key of the product that an attempt makes: no two attempts share one."""
    return f"{job.team_id}/{job.pk}-{attempt}"


def remove_unregistered(job: Job, attempt: int, *, asks_storage: bool = True) -> None:
    """Remove what an attempt put in its product's place before it was interrupted.

    Call it only for an attempt that has ended without success: nobody refers to these files, and nobody can any more.
    Without `asks_storage` only this machine's disk is looked at.
    """
    key = product_key(job, attempt)
    if storage.adapter_folder(key).exists() or (asks_storage and storage.is_remote()):
        storage.discard_adapter(key)


def remove_unregistered_before(job: Job, *, asks_storage: bool = True) -> None:
    """Remove what attempts before the job's present one put in a product's place."""
    for number in range(1, job.attempt):
        remove_unregistered(job, number, asks_storage=asks_storage)

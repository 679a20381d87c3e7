"""Where an attempt puts its product, and how what was never registered goes away again."""

from __future__ import annotations

import shutil

from jobs.models import Job
from studio import storage


def product_key(job: Job, attempt: int) -> str:
    """The storage key of the product that an attempt makes: no two attempts share one."""
    return f"{job.team_id}/{job.pk}-{attempt}"


def remove_unregistered(job: Job, attempt: int) -> None:
    """Remove what an attempt put in its product's place before it was interrupted.

    Call it only for an attempt that has ended without success: nobody refers to these files, and nobody can any more.
    """
    shutil.rmtree(storage.adapter_folder(product_key(job, attempt)), ignore_errors=True)


def remove_unregistered_before(job: Job) -> None:
    """Remove what attempts before the job's present one put in a product's place."""
    for number in range(1, job.attempt):
        remove_unregistered(job, number)

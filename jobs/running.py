"""Running a job: claim, train, evaluate, export, register, finish. Read top to bottom, it is a job's life."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path

from django.conf import settings
from django.db import InterfaceError, OperationalError, connection, transaction

from jobs import failures, lifecycle
from jobs.lifecycle import FencedError
from jobs.models import Job
from jobs.products import product_key, remove_unregistered, remove_unregistered_before
from jobs.supervising import Link, Outcome, boot_clock, supervise
from studio import storage
from studio.catalogue.registering import checked_files, register_adapter
from workers.failpoints import failpoint
from workers.recipe import Recipe
from workers.results import Result

logger = logging.getLogger(__name__)


def run_job(
    job: Job,
    *,
    is_draining: Callable[[], bool] = lambda: False,
    tell: Callable[[object], None] = lambda event: None,
) -> None:
    """Run a job that was just claimed, to the end of this attempt. The job's row says afterwards how it went.

    Raises:
        Exception: something that nobody foresaw; the job is recorded as failed to start and tried again.
    """
    with Link(job.pk, job.attempt) as link:
        _run(job, link, is_draining, tell)


def _run(job: Job, link: Link, is_draining: Callable[[], bool], tell: Callable[[object], None]) -> None:
    try:
        failpoint("claim.after_commit")
        folder = prepare_folder(job)
        failpoint("trainer.before_start")
        outcome = supervise(
            trainer_command(job, folder), link=link,
            log_file=folder / "attempts" / str(job.attempt) / "trainer.log", is_draining=is_draining, tell=tell,
        )  # fmt: skip
        failpoint("finish.before")
        # Without a database this worker has nothing else to do, and a trainer that was stopped can lose nothing more.
        until_answered(lambda: finish(job, outcome), num_leases=10 if outcome.is_unsure else 0.5)
    except FencedError:
        logger.warning("Job %s has moved on without attempt %s; nothing is written.", job.pk, job.attempt)
    except (OperationalError, InterfaceError):
        logger.exception("Job %s could not be finished", job.pk)
        _record_retry(job, code="database", message="The database did not answer when this attempt ended.")
    except OSError as error:
        logger.exception("Job %s could not run", job.pk)
        explained = storage.explain_disk_error(error)
        code = getattr(explained, "code", "storage")
        _record_retry(job, code=code, message=f"The studio could not store the job's files: {explained}.")
    except Exception:
        logger.exception("Job %s could not run", job.pk)
        _record_retry(job, code="internal", message="The studio failed while it ran this job; its log has the details.")
        raise


def prepare_folder(job: Job) -> Path:
    """The job's folder with its recipe in it, for this attempt and for people."""
    folder = storage.job_folder(job.pk)
    (folder / "attempts" / str(job.attempt)).mkdir(parents=True, exist_ok=True)
    remove_unregistered_before(job)
    recipe = Recipe.from_dict(job.recipe)
    aside = folder / f"recipe-{job.attempt}.json.new"
    aside.write_text(json.dumps(recipe.to_dict(), indent=2, ensure_ascii=False))
    aside.replace(folder / "recipe.json")
    return folder


def trainer_command(job: Job, folder: Path) -> list[str]:
    """The command line of the trainer. Ids were resolved to paths here: nothing of it comes from a person."""
    return [
        sys.executable, "-m", "workers", str(folder / "recipe.json"),
        "--out", str(folder),
        "--base-model-folder", job.base_model.folder,
        "--dataset-file", str(storage.blob_path(job.dataset_version.sha256)),
        "--attempt", str(job.attempt),
    ]  # fmt: skip


def finish(job: Job, outcome: Outcome) -> None:
    """Turn the end of a trainer into the job's next state; raises FencedError when the job has moved on."""
    if outcome.is_unsure:
        # Not the job's fault: the database was away, or this process was paused. Fenced if somebody took the job back.
        lifecycle.retry_later(
            job.pk, job.attempt, code="database", counted=False,
            message="Its worker could not reach the database in time and stopped the trainer.",
        )  # fmt: skip
        return
    if outcome.is_fenced:
        raise FencedError
    lifecycle.note_exit(job.pk, job.attempt, outcome.exit_status)
    if outcome.result is not None and outcome.exit_status == 0:
        register(job, Path(outcome.result.folder))
    elif outcome.asked == "now":
        lifecycle.cancelled(job.pk, job.attempt)
    elif outcome.asked == "checkpoint" and outcome.failed is None:
        lifecycle.hand_back(
            job.pk, job.attempt,
            reason="Its worker stops for maintenance; it goes on from its last checkpoint elsewhere.",
        )  # fmt: skip
    elif outcome.is_stalled:
        lifecycle.retry_later(
            job.pk, job.attempt, code="stalled", counted=True, message="The trainer made no progress and was stopped."
        )
    else:
        failure = failures.explain(outcome.failed, outcome.exit_status)
        if failure.retry:
            lifecycle.retry_later(
                job.pk, job.attempt, code=failure.code, message=failure.message, counted=failure.counted
            )
        else:
            lifecycle.fail(job.pk, job.attempt, code=failure.code, message=failure.message, next_step=failure.next_step)


def until_answered(action: Callable[[], None], *, num_leases: float = 0.5) -> None:
    """Do something in the database, again and again while it does not answer, for so many leases at most.

    This thread's connection has been idle since the claim: a restart of the database meanwhile is found out here.
    """
    give_up_at = boot_clock() + settings.LEASE_SECONDS * num_leases
    while True:
        try:
            action()
        except (OperationalError, InterfaceError):
            if boot_clock() > give_up_at:
                raise
            connection.close()
            time.sleep(min(1.0, settings.LEASE_SECONDS / 20))
        else:
            return


def register(job: Job, product: Path) -> None:
    """Put the finished adapter in its place and, in one transaction, into the catalogue with the job's success."""
    # The attempt is part of the key, so a worker presumed dead cannot touch its successor's product.
    key = product_key(job, job.attempt)
    lifecycle.heartbeat(job.pk, job.attempt)
    failpoint("register.before_keep")
    storage.keep_adapter(product, key)
    failpoint("register.files_kept")
    # Before the transaction: hashing gigabytes takes longer than one may stand open.
    files = checked_files(key)
    result = Result.from_folder(storage.adapter_folder(key))
    try:
        with transaction.atomic():
            adapter = register_adapter(
                team=job.team, user=job.created_by, name=job.name, base_model=job.base_model,
                dataset_version=job.dataset_version, recipe=Recipe.from_dict(job.recipe), folder_key=key, files=files,
                result=result,
            )  # fmt: skip
            lifecycle.succeed(job.pk, job.attempt, adapter)
            failpoint("register.before_commit")
    except FencedError:
        remove_unregistered(job, job.attempt)
        raise
    failpoint("register.after_commit")
    # Once more: a worker that was paused may have put its files there after this attempt had begun.
    remove_unregistered_before(job)


def _record_retry(job: Job, *, code: str, message: str) -> None:
    try:
        counted = code not in lifecycle.UNCOUNTED
        until_answered(lambda: lifecycle.retry_later(job.pk, job.attempt, code=code, message=message, counted=counted))
        remove_unregistered(job, job.attempt)
    except FencedError:
        logger.warning("Job %s has moved on without attempt %s.", job.pk, job.attempt)

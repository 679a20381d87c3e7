"""Running a job: claim, train, evaluate, export, register, finish. Read top to bottom, it is a job's life."""

from __future__ import annotations

import json
import logging
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from django.conf import settings
from django.db import InterfaceError, OperationalError, connection, transaction

from jobs import failures, lifecycle
from jobs.lifecycle import FencedError
from jobs.models import Job
from jobs.supervising import Link, Outcome, boot_clock, follow, supervise
from jobs.trainers import Seat, Trainer
from studio import storage
from studio.catalogue.registering import checked_files, register_adapter
from workers.recipe import Recipe
from workers.results import Result

logger = logging.getLogger(__name__)


TRAINER = (sys.executable, "-m", "workers")
# A trainer that may do more than one job (workers/resident.py).
RESIDENT_COMMAND = (*TRAINER, "--resident")


def run_job(
    job: Job,
    *,
    is_draining: Callable[[], bool] = lambda: False,
    tell: Callable[[object], None] = lambda event: None,
    seat: Seat | None = None,
) -> None:
    """Run a job that was just claimed, to the end of this attempt. The job's row says afterwards how it went.

    `seat` may hold a warm trainer from the job before and takes this one's; without, the job has a trainer to itself.

    Raises:
        Exception: something that nobody foresaw; the job is recorded as failed to start and tried again.
    """
    with Link(job.pk, job.attempt) as link:
        _run(job, link, is_draining, tell, seat or Seat(0))


def _run(job: Job, link: Link, is_draining: Callable[[], bool], tell: Callable[[object], None], seat: Seat) -> None:
    try:
        folder = prepare_folder(job)
        with _train(job, folder, link, is_draining, tell, seat) as outcome:
            until_answered(lambda: finish(job, outcome))
    except FencedError:
        logger.warning("Job %s has moved on without attempt %s; nothing is written.", job.pk, job.attempt)
    except OSError as error:
        logger.exception("Job %s could not run", job.pk)
        explained = storage.explain_disk_error(error)
        code = getattr(explained, "code", "storage")
        _record_retry(job, code=code, message=f"The studio could not store the job's files: {explained}.")
    except Exception:
        logger.exception("Job %s could not run", job.pk)
        _record_retry(job, code="internal", message="The studio failed while it ran this job; its log has the details.")
        raise


@contextmanager
def _train(
    job: Job,
    folder: Path,
    link: Link,
    is_draining: Callable[[], bool],
    tell: Callable[[object], None],
    seat: Seat,
) -> Iterator[Outcome]:
    """Train, and say how it ended. On leaving, the trainer is warm in its seat if all went well, and else is gone."""
    command = trainer_command(job, folder)
    log_file = folder / "attempts" / str(job.attempt) / "trainer.log"
    trainer = seat.take(job)
    if not seat.may_stay_after(job):
        yield supervise(command, link=link, log_file=log_file, is_draining=is_draining, tell=tell)
        return
    is_warm = trainer is not None
    trainer = trainer or Trainer(RESIDENT_COMMAND, log_file)
    try:
        outcome = _follow_resident(trainer, command, log_file, link, is_draining, tell)
        if is_warm and not (outcome.was_heard or outcome.is_fenced or outcome.asked):
            # It died while it was idle, and nothing of this job was begun.
            trainer.kill()
            trainer = Trainer(RESIDENT_COMMAND, log_file)
            outcome = _follow_resident(trainer, command, log_file, link, is_draining, tell)
        yield outcome
        if outcome.stays and not is_draining():
            seat.keep(trainer, job)
            trainer = None
    finally:
        if trainer is not None:
            trainer.kill()


def _follow_resident(
    trainer: Trainer,
    command: list[str],
    log_file: Path,
    link: Link,
    is_draining: Callable[[], bool],
    tell: Callable[[object], None],
) -> Outcome:
    """Give a resident trainer what a trainer of this job alone would have on its command line, and follow it."""
    trainer.send({"job": {"arguments": command[len(TRAINER) :], "log": str(log_file)}})
    return follow(trainer, link=link, is_draining=is_draining, tell=tell)


def prepare_folder(job: Job) -> Path:
    """The job's folder with its recipe in it, for this attempt and for people."""
    folder = storage.job_folder(job.pk)
    (folder / "attempts" / str(job.attempt)).mkdir(parents=True, exist_ok=True)
    recipe = Recipe.from_dict(job.recipe)
    aside = folder / f"recipe-{job.attempt}.json.new"
    aside.write_text(json.dumps(recipe.to_dict(), indent=2, ensure_ascii=False))
    aside.replace(folder / "recipe.json")
    return folder


def trainer_command(job: Job, folder: Path) -> list[str]:
    """The command line of the trainer. Ids were resolved to paths here: nothing of it comes from a person."""
    return [
        *TRAINER, str(folder / "recipe.json"),
        "--out", str(folder),
        "--base-model-folder", job.base_model.folder,
        "--dataset-file", str(storage.blob_path(job.dataset_version.sha256)),
        "--attempt", str(job.attempt),
        "--quantised-cache", str(storage.quantised_folder()),
    ]  # fmt: skip


def finish(job: Job, outcome: Outcome) -> None:
    """Turn the end of a trainer into the job's next state; raises FencedError when the job has moved on."""
    if outcome.is_fenced:
        raise FencedError
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


def until_answered(action: Callable[[], None]) -> None:
    """Do something in the database, again and again while it does not answer, for half a lease at most.

    This thread's connection has been idle since the claim: a restart of the database meanwhile is found out here.
    """
    give_up_at = boot_clock() + settings.LEASE_SECONDS / 2
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
    key = f"{job.team_id}/{job.pk}-{job.attempt}"
    lifecycle.heartbeat(job.pk, job.attempt)
    storage.keep_adapter(product, key)
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
    except FencedError:
        shutil.rmtree(storage.adapter_folder(key), ignore_errors=True)
        raise


def _record_retry(job: Job, *, code: str, message: str) -> None:
    try:
        counted = code not in lifecycle.UNCOUNTED
        until_answered(lambda: lifecycle.retry_later(job.pk, job.attempt, code=code, message=message, counted=counted))
    except FencedError:
        logger.warning("Job %s has moved on without attempt %s.", job.pk, job.attempt)

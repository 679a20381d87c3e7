"""Running a job: claim, train, evaluate, export, register, finish. Read top to bottom, it is a job's life."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from django.conf import settings
from django.db import InterfaceError, OperationalError, connection, transaction

from jobs import failures, files, lifecycle
from jobs.evaluating import queue_guardrails
from jobs.failures import UNCOUNTED, Ending
from jobs.gpu_health import GpuWatch
from jobs.lifecycle import FencedError
from jobs.models import Job, JobKind
from jobs.products import product_key, remove_unregistered, remove_unregistered_before
from jobs.supervising import Link, Outcome, boot_clock, follow, supervise
from jobs.trainers import Seat, Trainer
from studio import storage
from studio.catalogue.models import Adapter, EvaluationRun
from studio.catalogue.registering import checked_files, register_adapter, register_run
from studio.datasets.models import DatasetVersion
from workers.failpoints import failpoint
from workers.recipe import Recipe
from workers.results import Result

logger = logging.getLogger(__name__)

SMALL_FILES_BYTES = 2**20
"""What an attempt writes beside weights: its log, the rows in tokens, the base model's scores."""


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
        failpoint("claim.after_commit")
        folder = prepare_folder(job)
        log_file = folder / "attempts" / str(job.attempt) / "trainer.log"
        files.fetch_checkpoint(job)
        failpoint("trainer.before_start")
        with files.CheckpointStore(job.pk, job.attempt) as checkpoints, GpuWatch(job.worker) as gpu:
            telling = checkpoints.telling(tell)
            with _train(job, folder, log_file, link, is_draining, telling, seat) as outcome:
                if not outcome.is_fenced:
                    checkpoints.finish(log_file)
                gpu_fault = gpu.fault()
                failpoint("finish.before")
                # Without a database this worker has nothing else to do, and a trainer that was stopped can lose nothing
                # more.
                until_answered(lambda: finish(job, outcome, gpu_fault), num_leases=10 if outcome.is_unsure else 0.5)
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


@contextmanager
def _train(
    job: Job,
    folder: Path,
    log_file: Path,
    link: Link,
    is_draining: Callable[[], bool],
    tell: Callable[[object], None],
    seat: Seat,
) -> Iterator[Outcome]:
    """Train, and say how it ended. On leaving, the trainer is warm in its seat if all went well, and else is gone."""
    command = trainer_command(job, folder)
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
    remove_unregistered_before(job)
    recipe = Recipe.from_dict(job.recipe)
    aside = folder / f"recipe-{job.attempt}.json.new"
    aside.write_text(json.dumps(recipe.to_dict(), indent=2, ensure_ascii=False))
    aside.replace(folder / "recipe.json")
    return folder


def has_room(job: Job) -> bool:
    """Whether the disk takes another checkpoint of a job: its weights and both moments, and as much for its product."""
    num_bytes = 2 * 12 * int(job.estimate.get("num_trainable", 0)) + SMALL_FILES_BYTES
    return storage.has_room(storage.job_folder(job.pk), num_bytes)


def trainer_command(job: Job, folder: Path) -> list[str]:
    """The command line of the trainer. Ids were resolved to paths here: nothing of it comes from a person."""
    return [
        *TRAINER, str(folder / "recipe.json"),
        "--out", str(folder),
        "--base-model-folder", str(files.base_model_folder(job)),
        "--attempt", str(job.attempt),
        *(["--micro-batch-size", str(job.micro_batch_size)] if job.micro_batch_size else []),
        "--quantised-cache", str(storage.quantised_folder()),
        *_data_options(job),
        *(_evaluation_options(job) if job.kind == JobKind.EVALUATE else []),
    ]  # fmt: skip


def _data_options(job: Job) -> list[str]:
    """Whose rows are trained or scored on: a dataset's, or those of standard tasks."""
    if job.dataset_version is not None:
        return [
            "--dataset-file", str(files.dataset_file(job)),
            "--base-scores", str(storage.base_scores_folder(job.dataset_version.sha256)),
            *(["--split-file", str(split)] if (split := files.split_file(job)) is not None else []),
        ]  # fmt: skip
    assert job.suite is not None
    asked, folder = job.suite.evaluation, settings.TASKS_FOLDER
    options = ["--tasks-folder", str(folder or "STUDIO_TASKS_FOLDER"), "--tasks-sha256", asked["definitions_sha256"]]
    options += [f"--task={name}" for name in job.suite.tasks]
    options += ["--num-fewshot", str(asked["num_fewshot"])] if asked["num_fewshot"] is not None else []
    options += [] if asked["with_chat_template"] else ["--without-chat-template"]
    return [*options, *(["--tasks-may-run-code"] if settings.TASKS_MAY_RUN_CODE else [])]


def _evaluation_options(job: Job) -> list[str]:
    options = ["--evaluate"]
    if job.scored_adapter is not None:
        options += ["--adapter-folder", str(storage.fetch_adapter(job.scored_adapter.folder))]
    if job.suite is not None and job.suite.max_rows is not None:
        options += ["--max-rows", str(job.suite.max_rows)]
    return options


def finish(job: Job, outcome: Outcome, gpu_fault: str = "") -> None:
    """Turn the end of a trainer into the job's next state; raises FencedError when the job has moved on.

    `gpu_fault` is what the driver reports of the GPU since the attempt began, in words; empty when it is well.
    """
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
        try:
            register(job, Path(outcome.result.folder))
        except FencedError:
            # Discarded at the last moment, or moved on without us, which raises again.
            lifecycle.cancelled(job.pk, job.attempt)
    elif outcome.asked == "now":
        lifecycle.cancelled(job.pk, job.attempt)
    elif outcome.failed is None and _ended_at_checkpoint(outcome):
        reason = "Its worker stops for maintenance; it goes on from its last checkpoint elsewhere."
        if outcome.is_pausing:
            reason = "It had given its device back when the pause was taken back; it goes on from its last checkpoint."
        lifecycle.hand_back(job.pk, job.attempt, reason=reason)
    else:
        failure = failures.explain(
            Ending(
                reported=outcome.failed, exit_status=outcome.exit_status, stalled=outcome.stalled,
                host_memory=outcome.host_memory, gpu_fault=gpu_fault,
            )
        )  # fmt: skip
        if failure.code == "gpu_error" and job.worker is not None:
            lifecycle.quarantine(job.worker, failure.message)
        if failure.retry:
            lifecycle.retry_later(
                job.pk, job.attempt, code=failure.code, message=failure.message, counted=failure.counted,
                next_step=failure.next_step, micro_batch_size=failure.micro_batch_size,
            )  # fmt: skip
        else:
            lifecycle.fail(job.pk, job.attempt, code=failure.code, message=failure.message, next_step=failure.next_step)


def _ended_at_checkpoint(outcome: Outcome) -> bool:
    """Whether the trainer was told to save a checkpoint and end, even if it was told otherwise too late."""
    return outcome.asked == "checkpoint" or (outcome.stopped is not None and outcome.stopped.mode == "checkpoint")


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
    """Put what was made in its place and, in one transaction, into the catalogue with the job's success."""
    # The attempt is part of the key, so a worker presumed dead cannot touch its successor's product.
    key = product_key(job, job.attempt)
    lifecycle.heartbeat(job.pk, job.attempt)
    failpoint("register.before_keep")
    storage.keep_adapter(product, key)
    failpoint("register.files_kept")
    # Before the transaction: hashing gigabytes takes longer than one may stand open.
    listed = checked_files(key)
    result = Result.from_folder(storage.adapter_folder(key))
    try:
        with transaction.atomic():
            made = _register(job, key, listed, result)
            lifecycle.succeed(job.pk, job.attempt, made)
            if isinstance(made, Adapter):
                queue_guardrails(made, job)
            failpoint("register.before_commit")
    except FencedError:
        remove_unregistered(job, job.attempt)
        raise
    failpoint("register.after_commit")
    # Once more: a worker that was paused may have put its files there after this attempt had begun.
    remove_unregistered_before(job)


def _register(job: Job, key: str, files: list[dict[str, str | int]], result: Result) -> Adapter | EvaluationRun:
    if job.kind == JobKind.EVALUATE:
        return register_run(
            team=job.team, base_model=job.base_model, adapter=job.scored_adapter, suite=job.suite, folder_key=key,
            result=result,
        )  # fmt: skip
    return register_adapter(
        team=job.team, user=job.created_by, name=job.name, base_model=job.base_model,
        dataset_version=_trained_on(job), recipe=Recipe.from_dict(job.recipe), folder_key=key, files=files,
        result=result,
    )  # fmt: skip


def _trained_on(job: Job) -> DatasetVersion:
    assert job.dataset_version is not None, "only an evaluation may have no dataset"
    return job.dataset_version


def _record_retry(job: Job, *, code: str, message: str) -> None:
    try:
        counted = code not in UNCOUNTED
        until_answered(lambda: lifecycle.retry_later(job.pk, job.attempt, code=code, message=message, counted=counted))
        remove_unregistered(job, job.attempt)
    except FencedError:
        logger.warning("Job %s has moved on without attempt %s.", job.pk, job.attempt)

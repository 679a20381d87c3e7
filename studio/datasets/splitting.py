"""Splits of a version: asked for once, made by a worker in a child process, and frozen.

    waiting -> running -> done | failed

What was asked and the file that came of it never change. A split goes with its dataset, with a version that is read by
other columns, or by hand where no job names it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import orjson
from django.db import transaction
from django.db.models import F, Q, QuerySet
from django.utils import timezone

from studio.accounts.models import ApiToken, User, record
from studio.datasets.blobs import lock_blob, remove_unused_blob
from studio.datasets.inspecting import DEAD_AFTER, InspectionFailedError, run_child, send_task
from studio.datasets.models import DatasetSplit, DatasetVersion, SplitState, VersionState
from studio.datasets.uploads import clean_name
from studio.storage import incoming_blob
from studio.streaming import file_chunks
from workers.errors import ExplainedError
from workers.splits.asked import SplitRequest

logger = logging.getLogger(__name__)

SECONDS = 3600.0
MAX_ATTEMPTS = 3
LOST_AFTER = timedelta(minutes=2)
MAX_ASKED = 100
MAX_SPLITS = 50
"""Of one version."""
HEARTBEAT_SECONDS = 5.0
_TOO_MUCH = (
    "It takes more memory or time than a split may use. Keep only equal rows together, or divide a file of fewer rows."
)


class SplitRefusedError(ExplainedError):
    """A split that cannot be made, chosen or deleted as things are."""

    code = "split_refused"


class _SupersededError(Exception):
    """Another worker has taken the split, or it is gone."""


def ask_split(
    version: DatasetVersion, asked: SplitRequest, *, name: str, user: User, token: ApiToken | None = None
) -> DatasetSplit:
    """A split to be made by a worker.

    Args:
        name: empty for the next free "Split 1", "Split 2", ...

    Raises:
        SplitRefusedError: the version has no rows to divide, or has a split of this name or by this question.
    """
    name = clean_name(name)
    if not version.is_ready() or not version.num_usable:
        raise SplitRefusedError(
            f"{version} has no usable rows that could be divided.", next_step="Wait until it is inspected, or mend it."
        )
    question = hashlib.sha256(json.dumps(asked.to_dict(), sort_keys=True).encode()).hexdigest()
    with transaction.atomic():
        # One at a time: two splits must not take the same number.
        DatasetVersion.objects.select_for_update(no_key=True).get(pk=version.pk)
        kept = list(version.splits.exclude(state=SplitState.FAILED).only("name", "asked_sha256"))
        if same := next((one for one in kept if one.asked_sha256 == question), None):
            raise SplitRefusedError(f"These very settings have made the split “{same.name}”. It is still there.")
        if name in {one.name for one in kept}:
            raise SplitRefusedError(
                f"{version} has a split “{name}” already.", next_step="Give it another name.", field="name"
            )
        if len(kept) >= MAX_SPLITS:
            raise SplitRefusedError(
                f"{version} has {MAX_SPLITS} splits, which is the most.", next_step="Delete one that no job uses."
            )
        name = name or _free_name({one.name for one in kept})
        version.splits.filter(Q(name=name) | Q(asked_sha256=question), state=SplitState.FAILED).delete()
        split = DatasetSplit.objects.create(
            version=version, name=name, asked=asked.to_dict(), asked_sha256=question, created_by=user
        )
        record("dataset.split_asked", team=version.dataset.team, user=user, token=token, target=split)
        transaction.on_commit(lambda: send_task("freeze_split", split.pk))
    return split


def _free_name(taken: set[str]) -> str:
    return next(name for number in range(1, len(taken) + 2) if (name := f"Split {number}") not in taken)


def freeze(split_id: int) -> None:
    """Make a split. Safe to run twice and to lose."""
    split = DatasetSplit.objects.select_related("version__dataset__team", "created_by").filter(pk=split_id).first()
    if split is None or not _claim(split):
        return
    try:
        _make(split)
    except _SupersededError:
        logger.info("Split %s goes on elsewhere, or not at all.", split.pk)


def freeze_waiting() -> int:
    """Ask for splits that nobody makes; returns for how many."""
    dead = DatasetSplit.objects.filter(
        state=SplitState.RUNNING, heartbeat_at__lt=timezone.now() - DEAD_AFTER, attempt__gte=MAX_ATTEMPTS
    )
    dead.update(state=SplitState.FAILED, heartbeat_at=None, error=f"Its worker died {MAX_ATTEMPTS} times.")
    lost = _free(DatasetSplit.objects.all(), queued_before=timezone.now() - LOST_AFTER)
    asked = list(lost.order_by("pk").values_list("pk", flat=True)[:MAX_ASKED])
    DatasetSplit.objects.filter(pk__in=asked, state=SplitState.WAITING).update(queued_at=timezone.now())
    for split_id in asked:
        send_task("freeze_split", split_id)
    return len(asked)


def make_default(
    split: DatasetSplit | None, version: DatasetVersion, *, user: User, token: ApiToken | None = None
) -> None:
    """Have new jobs on a version begin with a split; with None, with the plain held-out share.

    Raises:
        SplitRefusedError: the split is not done.
    """
    with transaction.atomic():
        DatasetVersion.objects.select_for_update(no_key=True).get(pk=version.pk)
        version.splits.filter(is_default=True).update(is_default=False)
        if split is not None and not version.splits.filter(pk=split.pk, state=SplitState.DONE).update(is_default=True):
            raise SplitRefusedError(f"{split} is not done yet.", next_step="Wait until it is frozen.")
        name = split.name if split is not None else ""
        record("dataset.split_default", team=version.dataset.team, user=user, token=token, target=version, split=name)


def jobs_of(split: DatasetSplit) -> list[Any]:
    """The jobs whose recipes name a split, the newest first."""
    # "jobs" is the reverse side of a relation that belongs to an app above this one; so is "adapters" below.
    version = split.version
    jobs = version.jobs.model.objects.filter(_names(split, version.jobs, version.job_mixes.values("job")))
    return list(jobs.only("name", "state", "dataset_version").order_by("-created_at", "pk")) if split.sha256 else []


def _names(split: DatasetSplit, trained: Any, mixed: Any) -> Q:
    """Those whose recipe names a split, for its main dataset or for one that is mixed in."""
    of_main = Q(pk__in=trained.values("pk"), recipe__dataset__split__sha256=split.sha256)
    return of_main | Q(pk__in=mixed, recipe__mix__contains=[{"split": {"sha256": split.sha256}}])


def users_of(split: DatasetSplit) -> list[Any]:
    """The jobs and adapters whose recipes name a split."""
    version = split.version
    adapters = version.adapters.model.objects.filter(
        _names(split, version.adapters, version.adapter_mixes.values("adapter"))
    )
    return [*jobs_of(split), *(adapters.only("name", "dataset_version").order_by("-pk") if split.sha256 else ())]


def delete_split(split: DatasetSplit, *, user: User, token: ApiToken | None = None) -> None:
    """Delete a split with its file.

    Raises:
        SplitRefusedError: a job or an adapter names it, which could not be made again without.
    """
    with transaction.atomic():
        # Locked, so that no job can be queued on it between the look and the deletion.
        locked = DatasetSplit.objects.select_for_update(of=("self",)).select_related("version__dataset__team")
        found = locked.filter(pk=split.pk).first()
        if found is None:
            return
        if users := users_of(found):
            names = ", ".join(f"“{one.name}”" for one in users[:3]) + (", …" if users[3:] else "")
            made, they = (
                ("One job or adapter was", "that") if len(users) == 1 else
                (f"{len(users)} jobs and adapters were", "they")
            )  # fmt: skip
            raise SplitRefusedError(
                f"{made} made with “{found.name}” ({names}), so it stays: without it {they} could not be made again."
            )
        record("dataset.split_deleted", team=found.version.dataset.team, user=user, token=token, target=found)
        found.delete()
        if found.sha256:
            transaction.on_commit(lambda: remove_unused_blob(found.sha256))


def _free(rows: QuerySet[DatasetSplit], *, queued_before: Any = None) -> QuerySet[DatasetSplit]:
    """Splits that wait, or whose worker died."""
    waiting = Q(state=SplitState.WAITING)
    if queued_before is not None:
        waiting &= Q(queued_at__lt=queued_before)
    died = Q(state=SplitState.RUNNING, heartbeat_at__lt=timezone.now() - DEAD_AFTER)
    return rows.filter(waiting | died, attempt__lt=MAX_ATTEMPTS, version__state=VersionState.READY)


def _claim(split: DatasetSplit) -> bool:
    """Whether this process makes the split: one conditional UPDATE decides."""
    mine = _free(DatasetSplit.objects.filter(pk=split.pk, attempt=split.attempt))
    taken = mine.update(
        state=SplitState.RUNNING, attempt=F("attempt") + 1, num_read=0, error="", heartbeat_at=timezone.now()
    )
    split.attempt += taken
    return bool(taken)


def _make(split: DatasetSplit) -> None:
    version = split.version
    started = told = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="split-") as folder:
        out = Path(folder) / "split.jsonl"
        arguments = [str(version.path()), "--format", version.format,
                     "--columns", orjson.dumps(version.columns).decode(), "--asked", orjson.dumps(split.asked).decode(),
                     "--dataset-sha256", version.sha256, "--out", str(out)]  # fmt: skip
        try:
            for event in run_child("splits.making", arguments, seconds=SECONDS):
                if event["kind"] == "progress":
                    if time.monotonic() - told > HEARTBEAT_SECONDS or not split.num_read:
                        told = time.monotonic()
                        split.num_read = event["num_read"]
                        _update(split, num_read=split.num_read, heartbeat_at=timezone.now())
                elif event["kind"] == "refused":
                    _fail(split, f"{event['message']} {event['next_step']}".strip())
                else:
                    _store(split, out, event, seconds=time.monotonic() - started)
        except InspectionFailedError:
            logger.warning("Split %s of version %s ended without a result.", split.pk, version.pk, exc_info=True)
            _fail(split, _TOO_MUCH)
        except OSError as error:
            logger.warning("Split %s could not be stored.", split.pk, exc_info=True)
            _fail(split, f"Its file could not be stored: {error.strerror or error}.")


def _store(split: DatasetSplit, out: Path, event: dict[str, Any], *, seconds: float) -> None:
    """Keep the file and, in one transaction, the row that names it."""
    with incoming_blob(file_chunks(out.open("rb")), max_bytes=out.stat().st_size) as blob:
        blob.share()
        with transaction.atomic():
            lock_blob(blob.sha256)
            sizes = {f"num_{part}": num for part, num in event["num_rows"].items()}
            _update(
                split, state=SplitState.DONE, heartbeat_at=None, sha256=blob.sha256, num_bytes=blob.num_bytes,
                report=event["report"], seconds=seconds, **sizes,
            )  # fmt: skip
            team = split.version.dataset.team
            record("dataset.split_frozen", team=team, user=split.created_by, target=split, sha256=blob.sha256, **sizes)
            # Last, so that a row that cannot be written leaves no file behind.
            blob.keep()


def _fail(split: DatasetSplit, error: str) -> None:
    _update(split, state=SplitState.FAILED, heartbeat_at=None, error=error)


def _update(split: DatasetSplit, **values: Any) -> None:
    mine = DatasetSplit.objects.filter(pk=split.pk, state=SplitState.RUNNING, attempt=split.attempt)
    if not mine.update(**values):
        raise _SupersededError

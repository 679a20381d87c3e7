"""Inspection: every row of an upload is read in a child process, and what was found is stored.

    inspecting -> ready | needs_mapping | unreadable

`statistics` then holds {"turns": [[turns, rows]], "roles": {role: turns}, "characters": {...}, "answers": {...},
"tokens": {base revision: {...}}}, where each {...} is {"num_rows", "total", "longest", "histogram": [[upper bound,
rows]]}, for answers with turns in the place of rows; tokens also have "cut": {"512": rows longer than that, ...}.
Tokens are a second step, so that a version is ready before it is over; the rows at rest (row_tables.py) and scans
(scanning.py) are others, on their own.
Versions that were read long ago may lack roles and answers.
"""

from __future__ import annotations

import logging
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import orjson
from celery import current_app
from django.apps import apps
from django.conf import settings
from django.db import models, transaction
from django.db.models import Q
from django.utils import timezone
from kombu.exceptions import OperationalError

from studio.datasets.blobs import remove_row_table, remove_splits
from studio.datasets.models import DatasetProblem, DatasetVersion, VersionState

logger = logging.getLogger(__name__)

# The child may read for this long without a sign of life, and for this long altogether.
SILENT_SECONDS = 120.0
ROWS_SECONDS = 2 * 3600.0
TOKENS_SECONDS = 600.0
# A message that was lost, and an inspection whose worker died.
LOST_AFTER = timedelta(seconds=20)
DEAD_AFTER = timedelta(seconds=90)


class InspectionFailedError(RuntimeError):
    """The child ended without a result."""


def queue_inspection(version_id: int) -> None:
    """Ask a worker to inspect a version. Without a broker the sweep asks again later: nothing is lost."""
    DatasetVersion.objects.filter(pk=version_id).update(queued_at=timezone.now())
    if not send_task("inspect_dataset", version_id):
        logger.warning("The inspection of version %s could not be queued; the sweep will.", version_id)


def send_task(name: str, *arguments: int) -> bool:
    """Ask a worker to run a task of this app; False when the broker does not answer."""
    try:
        # By name: tasks.py calls this module, which therefore cannot know it.
        current_app.send_task(f"studio.datasets.tasks.{name}", arguments, retry=False)
    except OperationalError:
        logger.warning("The broker does not answer.", exc_info=True)
        return False
    return True


def waiting_versions() -> models.QuerySet[DatasetVersion]:
    """Versions whose message was lost or whose inspection died."""
    now = timezone.now()
    return DatasetVersion.objects.filter(
        Q(heartbeat_at=None) | Q(heartbeat_at__lt=now - DEAD_AFTER),
        state=VersionState.INSPECTING,
        queued_at__lt=now - LOST_AFTER,
    )


def inspect_waiting() -> int:
    """Queue what nobody inspects, and token counts that are missing; returns how many were queued."""
    waiting = list(waiting_versions().order_by("pk").values_list("pk", flat=True)[:100])
    missing = [version_id for version_id in _without_tokens() if version_id not in waiting]
    for version_id in waiting + missing:
        queue_inspection(version_id)
    return len(waiting) + len(missing)


def _without_tokens() -> list[int]:
    """Ready versions that lack the counts of a base model that was registered after them; a few at a time."""
    revisions = [revision for revision, _folder in base_folders()]
    if not revisions:
        return []
    now = timezone.now()
    lacking = Q()
    for revision in revisions:
        lacking |= ~Q(statistics__tokens__has_key=revision)
    ready = DatasetVersion.objects.filter(lacking, state=VersionState.READY, num_usable__gt=0)
    idle = ready.filter(
        Q(heartbeat_at=None) | Q(heartbeat_at__lt=now - DEAD_AFTER), queued_at__lt=now - timedelta(minutes=5)
    )
    return list(idle.order_by("-pk").values_list("pk", flat=True)[:5])


def base_folders() -> list[tuple[str, Path]]:
    """(revision, folder) of every registered base model. Named in a string: catalogue stands above datasets."""
    base_model = apps.get_model("catalogue", "BaseModel")
    return [(revision, Path(folder)) for revision, folder in base_model.objects.values_list("revision", "folder")]


def inspect(version_id: int) -> None:
    """Read a version's file and store what was found; then count tokens. Safe to run twice and to lose."""
    version = DatasetVersion.objects.select_related("dataset").filter(pk=version_id).first()
    if version is None:
        return
    if version.state == VersionState.INSPECTING:
        if not _claim(version):
            return
        try:
            _inspect_rows(version)
        except InspectionFailedError as error:
            _finish(version, state=VersionState.UNREADABLE, error=str(error), error_next_step=_SPLIT_FILE)
        version.refresh_from_db()
        if version.state == VersionState.READY:
            send_task("prepare_rows", version_id)
            send_task("scan_dataset", version_id)
    if version.state == VersionState.READY and version.num_usable:
        _count_tokens(version)


def _claim(version: DatasetVersion) -> bool:
    """Whether this process inspects the version: one conditional UPDATE decides."""
    now = timezone.now()
    free = DatasetVersion.objects.filter(
        Q(heartbeat_at=None) | Q(heartbeat_at__lt=now - DEAD_AFTER), pk=version.pk, state=VersionState.INSPECTING
    )
    return free.update(heartbeat_at=now, progress={"stage": "rows", "num_rows": 0}) == 1


_SPLIT_FILE = "Split the file into smaller ones, or remove what makes its rows unusually large."


def _inspect_rows(version: DatasetVersion) -> None:
    arguments = ["rows", str(version.path())]
    if version.format:
        arguments += ["--format", version.format, "--columns", orjson.dumps(version.columns).decode()]
    recognised: dict[str, Any] = {}
    problems: list[DatasetProblem] = []
    for event in run_child("inspection", arguments, seconds=ROWS_SECONDS):
        kind = event.pop("kind")
        if kind == "recognised":
            recognised = {key: event[key] for key in ("carrier", "format", "columns", "column_names")}
        elif kind == "problem":
            problems.append(_problem(version, event))
        elif kind == "progress":
            _report(version, event)
        elif kind == "refused":
            _finish(version, state=VersionState.UNREADABLE, error=event["message"],
                    error_next_step=event["next_step"], **recognised)  # fmt: skip
        elif event["needs_mapping"]:
            _finish(version, state=VersionState.NEEDS_MAPPING, **{**recognised, "format": ""})
        elif event["num_usable"] == 0 and not version.format and _all_broken(event["problem_counts"]):
            del event["needs_mapping"]
            first = problems[0]
            _finish(version, problems, state=VersionState.UNREADABLE, **recognised, **event,
                    error=f"Not one of the {event['num_rows']:,} rows can be read. The first problem: {first.message}",
                    error_next_step=first.fix)  # fmt: skip
        else:
            del event["needs_mapping"]
            _finish(version, problems, state=VersionState.READY, error="", error_next_step="", **recognised, **event)


def _all_broken(problem_counts: dict[str, int]) -> bool:
    """Whether every problem is one of the file's, so that no choice of columns would help."""
    return all(rule.startswith("F") and rule != "F010" for rule in problem_counts)


def _problem(version: DatasetVersion, event: dict[str, Any]) -> DatasetProblem:
    event["field"] = (event["field"] or "")[:120]
    return DatasetProblem(version=version, **event)


def _report(version: DatasetVersion, progress: dict[str, Any]) -> None:
    DatasetVersion.objects.filter(pk=version.pk).update(heartbeat_at=timezone.now(), progress=progress)


def _finish(version: DatasetVersion, problems: list[DatasetProblem] | None = None, **values: Any) -> None:
    """Store an inspection's result in one transaction; a version that is no longer inspected stays as it is."""
    with transaction.atomic():
        still = DatasetVersion.objects.filter(pk=version.pk, state=VersionState.INSPECTING)
        if still.update(heartbeat_at=None, progress={}, **values) == 1:
            version.problems.all().delete()
            # These were of other columns; jobs would have kept the version from being read with others.
            version.scans.all().delete()
            remove_splits(version)
            remove_row_table(version)
            DatasetProblem.objects.bulk_create(problems or [], batch_size=1000)


def _count_tokens(version: DatasetVersion) -> None:
    """Add the token lengths of each base model that has none yet. What fails is stored, so it is not tried forever."""
    for revision, folder in base_folders():
        if version.tokens_of(revision) is not None:
            continue
        arguments = ["tokens", str(version.path()), "--format", version.format,
                     "--columns", orjson.dumps(version.columns).decode(),
                     "--base-model-folder", str(folder), "--seconds", str(TOKENS_SECONDS)]  # fmt: skip
        found: dict[str, Any] = {}
        try:
            for event in run_child("inspection", arguments, seconds=TOKENS_SECONDS + SILENT_SECONDS):
                if event["kind"] == "progress":
                    _report(version, {"stage": "tokens", "num_rows": event["num_rows"]})
                elif event["kind"] == "refused":
                    found = {"error": event["message"]}
                elif event["kind"] == "done":
                    found = event["tokens"]
        except InspectionFailedError as error:
            found = {"error": str(error)}
        _store_tokens(version, revision, found)


def _store_tokens(version: DatasetVersion, revision: str, found: dict[str, Any]) -> None:
    with transaction.atomic():
        row = DatasetVersion.objects.select_for_update().filter(pk=version.pk, state=VersionState.READY).first()
        if row is None or row.columns != version.columns:
            return
        tokens = {**row.statistics.get("tokens", {}), revision: found}
        row.statistics = {**row.statistics, "tokens": tokens}
        row.heartbeat_at, row.progress = None, {}
        row.save(update_fields=["statistics", "heartbeat_at", "progress"])
    version.statistics = row.statistics


def run_child(module: str, arguments: list[str], *, seconds: float) -> Iterator[dict[str, Any]]:
    """The events of a process that reads a dataset (`python -m workers.MODULE`).

    It is ended when it is silent or busy for too long.

    Raises:
        InspectionFailedError: it ended without a result (its memory limit, a fault), or had to be ended.
    """
    command = [sys.executable, "-m", f"workers.{module}", *arguments]
    # One thread: pools would count against the memory limit and take the trainer's cores.
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1",
                   "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}  # fmt: skip
    last = ""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL,
        cwd=settings.ROOT, env=environment,
    ) as child:  # fmt: skip
        assert child.stdout is not None
        try:
            for line in _read_lines(child.stdout.fileno(), time.monotonic() + seconds):
                event: dict[str, Any] = orjson.loads(line)
                last = event["kind"]
                yield event
        finally:
            child.kill()
    if last not in {"done", "refused"}:
        raise InspectionFailedError(
            "The file could not be inspected: reading it takes more memory than one upload may use."
        )


def _read_lines(descriptor: int, end: float) -> Iterator[bytes]:
    pending = b""
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while True:
            patience = min(SILENT_SECONDS, end - time.monotonic())
            if patience <= 0 or not selector.select(patience):
                raise InspectionFailedError("The file could not be inspected: reading it takes too long.")
            chunk = os.read(descriptor, 1 << 20)
            if not chunk:
                return
            *lines, pending = (pending + chunk).split(b"\n")
            yield from lines

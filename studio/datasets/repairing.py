"""A corrected version of a dataset: what has a plain remedy is remedied, in a child process, and becomes a new version.

`DatasetVersion.correction` of the version that is corrected: {"state": "queued" | "failed" | "done", "queued_at",
"error", "number": of the corrected version}. Of the corrected version: {"of": number, "num_rows", "num_changed",
"num_repeated", "num_left_out", "counts": {rule: times}, "changes": [{line, rules, before, after}] of the first ones}.
Safe to run twice: the same rows give the same bytes, and a file that the team has is not stored again.
"""

from __future__ import annotations

import tempfile
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import orjson
from django.db import transaction
from django.utils import timezone

from studio.accounts.models import ApiToken, User, record
from studio.datasets import inspecting
from studio.datasets.inspecting import InspectionFailedError
from studio.datasets.models import DatasetVersion
from studio.datasets.uploads import receive_upload
from studio.storage import StorageError
from studio.streaming import file_chunks
from workers.errors import DatasetError

REPAIR_SECONDS = 2 * 3600.0
# Whoever asked may ask again: the message was lost, or the worker died.
LOST_AFTER = timedelta(minutes=5)


class NothingToRepairError(Exception):
    """The version is not ready, has nothing with a plain remedy, or is being corrected already; the text says which."""


def queue_repair(version: DatasetVersion, *, user: User, token: ApiToken | None = None) -> None:
    """Ask a worker for a corrected version; raises NothingToRepairError."""
    if not version.is_ready():
        raise NothingToRepairError(f"{version} is {version.get_state_display().lower()}.")
    if not version.repairs():
        raise NothingToRepairError(f"{version} has no problem with a plain remedy.")
    with transaction.atomic():
        locked = DatasetVersion.objects.select_for_update().get(pk=version.pk)
        if is_running(locked):
            raise NothingToRepairError(f"{version} is being corrected already.")
        locked.correction = {"state": "queued", "queued_at": timezone.now().isoformat()}
        locked.save(update_fields=["correction"])
        record("dataset.repair_asked", team=version.dataset.team, user=user, token=token, target=version)
        transaction.on_commit(lambda: inspecting.send_task("repair_dataset", version.pk, user.pk))


def is_running(version: DatasetVersion) -> bool:
    """Whether a corrected version was asked for a moment ago and is not there yet."""
    found = version.correction
    return found.get("state") == "queued" and timezone.now() - datetime.fromisoformat(found["queued_at"]) < LOST_AFTER


def repair(version_id: int, user_id: int) -> None:
    """Make the corrected version; what keeps it from being made is stored, for people."""
    version = DatasetVersion.objects.select_related("dataset__team").filter(pk=version_id).first()
    user = User.objects.filter(pk=user_id).first()
    if version is None or user is None or not version.is_ready():
        return
    try:
        made, outcome = _make(version, user)
    except (DatasetError, StorageError, InspectionFailedError) as error:
        version.correction = {"state": "failed", "error": str(error)}
        version.save(update_fields=["correction"])
        return
    with transaction.atomic():
        # A file that the team had already has its own story.
        if not made.already_stored:
            made.correction = {"of": version.number, **outcome}
            made.save(update_fields=["correction"])
        version.correction = {"state": "done", "dataset": made.dataset_id, "number": made.number}
        version.save(update_fields=["correction"])
        record(
            "dataset.repaired", team=version.dataset.team, user=user, target=made, of=version.number,
            num_changed=outcome["num_changed"], num_left_out=outcome["num_left_out"],
        )  # fmt: skip


def _make(version: DatasetVersion, user: User) -> tuple[DatasetVersion, dict[str, Any]]:
    arguments = [str(version.path()), "--format", version.format, "--columns", orjson.dumps(version.columns).decode()]
    changes: list[dict[str, Any]] = []
    outcome: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="repair-") as folder:
        out = Path(folder) / "rows.jsonl"
        for event in inspecting.run_child("repairing", [*arguments, "--out", str(out)], seconds=REPAIR_SECONDS):
            kind = event.pop("kind")
            if kind == "change":
                changes.append(event)
            elif kind == "refused":
                raise DatasetError(event["message"], next_step=event["next_step"])
            elif kind == "done":
                outcome = event
        if not outcome["num_changed"] and not outcome["num_left_out"]:
            raise DatasetError("None of the problems had a plain remedy.", next_step="Correct the rows by hand.")
        stem = version.file_name.partition(".")[0] or "rows"
        with out.open("rb") as content:
            made = receive_upload(
                team=version.dataset.team, user=user, file_name=f"{stem}-corrected.jsonl",
                chunks=file_chunks(content), dataset=version.dataset,
            )  # fmt: skip
    if not made.already_stored:  # what a person chose for its columns holds for the corrected rows, too
        made.format, made.columns = version.format, version.columns
        made.save(update_fields=["format", "columns"])
    return made, {**outcome, "changes": changes}

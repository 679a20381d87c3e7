"""Whether base models' files are still what was registered. Tens of gigabytes take minutes, so a task reads them."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

import redis
from celery import current_app
from django.db import transaction
from django.db.models import F, Q
from django.utils import timezone
from kombu.exceptions import OperationalError

from studio import storage
from studio.accounts.models import ApiToken, Team, User, record
from studio.catalogue.base_files import storage_key
from studio.catalogue.file_checks import EVERY
from studio.catalogue.models import BaseFileCheck, BaseModel
from studio.storage import NotStoredError, StorageError, fetching

logger = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 20
MEND = "Ask whoever runs the studio to restore the folder from its source; jobs on it would learn on other weights."


def check_of(base: BaseModel) -> BaseFileCheck | None:
    """What is known of a base model's files; None when nobody has looked since it was registered."""
    try:
        return base.file_check
    except BaseFileCheck.DoesNotExist:
        return None


def ask_for_check(base: BaseModel, *, team: Team, user: User, token: ApiToken | None = None) -> BaseFileCheck:
    """Have a base model's files read soon, with an audit event; whoever asks while one waits asks for the same."""
    with transaction.atomic():
        check, _ = BaseFileCheck.objects.select_for_update().get_or_create(base_model=base)
        if check.asked_at is None:
            check.asked_at = timezone.now()
            check.save(update_fields=["asked_at"])
            record("base_model.check_asked", team=team, user=user, token=token, target=base)
            transaction.on_commit(_hurry)
    return check


def check_next() -> bool:
    """Read the files of the base model that was asked for first, or else of one not looked at for a week.

    Returns False when none is due.
    """
    old = timezone.now() - EVERY
    is_due = (
        Q(file_check__asked_at__isnull=False)
        | Q(file_check__isnull=True, created_at__lt=old)
        | Q(file_check__checked_at__lt=old)
    )
    rows = BaseModel.objects.filter(is_due).select_related("file_check")
    base = rows.order_by(F("file_check__asked_at").asc(nulls_last=True), "pk").first()
    if base is None:
        return False
    known = check_of(base)
    asked_at = known.asked_at if known else None
    damage = find_damage(base)
    values = {"checked_at": timezone.now(), "damage": damage}
    BaseFileCheck.objects.update_or_create(base_model=base, defaults=values)
    # Who asked meanwhile saw the files later than they were read, and is answered by another look.
    BaseFileCheck.objects.filter(base_model=base, asked_at=asked_at).update(asked_at=None)
    return True


def find_damage(base: BaseModel) -> str:
    """What is wrong with a base model's files, as sentences; empty when every one has its checksum. Reads all bytes."""
    folder = Path(base.folder)
    is_here = folder.is_dir() or not storage.is_remote()
    for file in base.files:
        name = str(file["name"])
        chunks = _read(folder / name) if is_here else fetching.read_through(f"{storage_key(base)}/{name}")
        try:
            digest = _sha256(chunks)
        except (FileNotFoundError, NotStoredError):
            return f'The file "{name}" is missing. {MEND}'
        except (OSError, StorageError) as error:
            return f'The file "{name}" cannot be read: {error}. {MEND}'
        if digest != file["sha256"]:
            return f'The file "{name}" has changed since it was registered: its checksum differs. {MEND}'
    return ""


def _read(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def _sha256(chunks: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


def _hurry() -> None:
    """Ask a worker to look now. A broker that fails costs time alone: beat asks again."""
    try:
        # By name: tasks.py imports this module.
        current_app.send_task("studio.catalogue.tasks.check_base_files", expires=300, retry=False)
    except (OperationalError, redis.RedisError, OSError) as error:
        logger.warning("The check of a base model waits for the next look, the broker did not answer: %s", error)

"""Whether adapters' files are still what they were: looked at now and then, never by a page that only shows it."""

from __future__ import annotations

import time
from datetime import timedelta

from django.db.models import F, Q
from django.dispatch import Signal
from django.utils import timezone

from studio.accounts.models import ApiToken, User, record
from studio.catalogue.bundles import check_files
from studio.catalogue.models import Adapter, FileCheck
from workers.errors import DamagedAdapterError

EVERY = timedelta(days=7)
"""Between two looks at an adapter's files: bits rot slowly, and reading all of them takes the disk's time."""
SECONDS_AT_ONCE = 60.0
files_checked = Signal()
"""Sent with `check`, a FileCheck, after a look at an adapter's files that no gate of a review has asked for."""


def note_check(adapter: Adapter, error: DamagedAdapterError | None, *, for_gate: bool = False) -> FileCheck:
    """Keeps what a look at the files has found; None: they are whole."""
    damage = f"{error.message} {error.next_step}".strip() if error else ""
    check, _ = FileCheck.objects.update_or_create(
        adapter=adapter, defaults={"checked_at": timezone.now(), "damage": damage}
    )
    adapter.file_check = check
    if not for_gate:
        files_checked.send(FileCheck, check=check)
    return check


def check_adapter(adapter: Adapter, *, for_gate: bool = False) -> FileCheck:
    """Reads every byte of an adapter's files and keeps what was found; `for_gate`: the gate itself tells its review."""
    try:
        check_files(adapter, every_byte=True)
    except DamagedAdapterError as error:
        return note_check(adapter, error, for_gate=for_gate)
    return note_check(adapter, None, for_gate=for_gate)


def check_now(adapter: Adapter, *, user: User, token: ApiToken | None = None) -> FileCheck:
    """`check_adapter` because a person asked for it, with an audit event."""
    check = check_adapter(adapter)
    record(
        "adapter.files_checked",
        team=adapter.team, user=user, token=token, target=adapter, is_damaged=bool(check.damage),
    )  # fmt: skip
    return check


def check_oldest(seconds: float = SECONDS_AT_ONCE) -> int:
    """Checks adapters that were not looked at for a week, the longest ago first, until the time is used up."""
    due = Q(file_check=None, created_at__lt=timezone.now() - EVERY) | Q(
        file_check__checked_at__lt=timezone.now() - EVERY
    )
    end, num_checked = time.monotonic() + seconds, 0
    order = F("file_check__checked_at").asc(nulls_first=True)
    for adapter in Adapter.objects.filter(due).order_by(order, "pk")[:1000].iterator(chunk_size=50):
        check_adapter(adapter)
        num_checked += 1
        if time.monotonic() > end:
            break
    return num_checked

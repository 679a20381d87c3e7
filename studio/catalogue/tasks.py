"""Celery tasks of the catalogue."""

from __future__ import annotations

import threading

from celery import shared_task

from studio.catalogue.base_checks import check_next
from studio.catalogue.base_files import share_base_models
from studio.catalogue.file_checks import check_oldest

_sharing = threading.Lock()
_checking = threading.Lock()
_checking_bases = threading.Lock()


@shared_task
def share_bases() -> None:
    """Bring base models into the storage that machines share. One at a time: a large one takes longer than a beat."""
    if not _sharing.acquire(blocking=False):
        return
    try:
        share_base_models()
    finally:
        _sharing.release()


@shared_task
def check_adapter_files() -> None:
    """Read the files of adapters whose last check is the oldest. One at a time, like `share_bases`."""
    if not _checking.acquire(blocking=False):
        return
    try:
        check_oldest()
    finally:
        _checking.release()


@shared_task
def check_base_files() -> None:
    """Read the files of base models whose check was asked for or is a week old. One at a time, like `share_bases`."""
    if not _checking_bases.acquire(blocking=False):
        return
    try:
        while check_next():
            pass
    finally:
        _checking_bases.release()

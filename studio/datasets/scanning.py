"""Scans: each is run over a ready version's rows in a child process of its own, and what it found is stored.

    waiting -> running -> done | failed        skipped: not for rows of this type

A message runs one scan and then asks for the next, so that the scans of a large file do not hold up the inspections of
others. A scan that a plug-in file adds is run on older versions too, a few at a time.
"""

from __future__ import annotations

import logging
import time
from datetime import timedelta
from typing import Any

import orjson
from django.db import transaction
from django.db.models import Count, F, Q, QuerySet
from django.http import Http404
from django.utils import timezone

from studio.accounts.models import ApiToken, User, record
from studio.datasets.inspecting import DEAD_AFTER, InspectionFailedError, run_child, send_task
from studio.datasets.models import DatasetScan, DatasetVersion, ScanFinding, ScanState, VersionState
from workers.scans import scans

logger = logging.getLogger(__name__)

SCAN_SECONDS = 3600.0
MAX_ATTEMPTS = 3
"""A scan that took its worker with it this often is not tried again by itself."""
LOST_AFTER = timedelta(minutes=2)
NUM_SWEPT = 5
MAX_ASKED = 100
HEARTBEAT_SECONDS = 5.0
_TOO_MUCH = "It takes more memory or time than a scan may use. A file of fewer rows can be scanned."


class ScanRunsError(RuntimeError):
    """The scan that is asked for again is not over."""


class _SupersededError(Exception):
    """Another worker has taken the scan, or its version is inspected anew."""


def prepare(version: DatasetVersion) -> None:
    """The rows of the scans that a ready version lacks."""
    known = set(version.scans.values_list("name", flat=True))
    lacking = [plugin for name, plugin in scans().items() if name not in known]
    rows = []
    for plugin in lacking:
        why_not = plugin.why_not(version.example_type())
        state = ScanState.SKIPPED if why_not else ScanState.WAITING
        rows.append(DatasetScan(version=version, name=plugin.name, state=state, error=why_not))
    DatasetScan.objects.bulk_create(rows, ignore_conflicts=True)


def scan_next(version_id: int) -> None:
    """Run the next scan of a version, and ask for the one after it. Safe to run twice and to lose."""
    version = DatasetVersion.objects.filter(pk=version_id, state=VersionState.READY, num_usable__gt=0).first()
    if version is None:
        return
    prepare(version)
    scan = _claim(version)
    if scan is None:
        return
    try:
        _run(scan)
    except _SupersededError:
        logger.info("Scan %s goes on elsewhere, or not at all.", scan.pk)
    left = _free(version.scans)
    if left.exists():
        left.update(queued_at=timezone.now())
        send_task("scan_dataset", version_id)


def scan_waiting() -> int:
    """Ask for scans that nobody runs and for those that versions lack; returns for how many versions."""
    now = timezone.now()
    _give_up()
    # The next scan of a version is asked for by the one that runs.
    running = DatasetScan.objects.filter(state=ScanState.RUNNING, heartbeat_at__gte=now - DEAD_AFTER)
    lost = _free(DatasetScan.objects, queued_before=now - LOST_AFTER).exclude(version__in=running.values("version"))
    asked = set(lost.order_by("version").values_list("version", flat=True).distinct()[:MAX_ASKED])
    for version in _lacking().order_by("-pk")[:NUM_SWEPT]:
        prepare(version)
        asked.add(version.pk)
    DatasetScan.objects.filter(version__in=asked, state=ScanState.WAITING).update(queued_at=now)
    for version_id in sorted(asked):
        send_task("scan_dataset", version_id)
    return len(asked)


def scan_again(scan: DatasetScan, *, user: User, token: ApiToken | None = None) -> None:
    """Ask for a scan that is over once more; raises ScanRunsError."""
    over = DatasetScan.objects.filter(pk=scan.pk, state__in=[ScanState.DONE, ScanState.FAILED])
    with transaction.atomic():
        if not over.update(state=ScanState.WAITING, attempt=0, num_read=0, error="", queued_at=timezone.now()):
            raise ScanRunsError(f"{scan.label()} is not over, or not for these rows.")
        version = scan.version
        record("dataset.scan_asked", team=version.dataset.team, user=user, token=token, target=version, scan=scan.name)
        transaction.on_commit(lambda: send_task("scan_dataset", scan.version_id))


def languages_of(version: DatasetVersion) -> dict[str, int]:
    """Rows by language, the most frequent first; empty until the scan of languages is done. One query."""
    found = version.scans.filter(name="language", state=ScanState.DONE).values_list("counts", flat=True).first() or {}
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def known_scan(name: str) -> str:
    """The name of a scan that is installed; raises Http404."""
    if name not in scans():
        raise Http404
    return name


def ask_for_scan(version: DatasetVersion, name: str, *, user: User, token: ApiToken | None = None) -> DatasetScan:
    """Ask for a scan of a ready version, also for one that it has never had; raises ScanRunsError."""
    if not version.is_ready() or not version.num_usable:
        raise ScanRunsError(f"{version} has no usable rows that could be scanned.")
    known = version.scans.filter(name=name)
    if not known.exists():
        with transaction.atomic():
            prepare(version)
            record("dataset.scan_asked", team=version.dataset.team, user=user, token=token, target=version, scan=name)
            transaction.on_commit(lambda: send_task("scan_dataset", version.pk))
        return known.get()
    scan = known.get()
    scan.version = version
    scan_again(scan, user=user, token=token)
    return scan


def scans_of(version: DatasetVersion) -> list[DatasetScan]:
    """A version's scans in the order of the page. Those of plug-ins that are gone are left out."""
    places = {name: place for place, name in enumerate(scans())}
    rows = [row for row in version.scans.select_related("version") if row.name in places]
    return sorted(rows, key=lambda row: places[row.name])


def _lacking() -> QuerySet[DatasetVersion]:
    names = list(scans())
    ready = DatasetVersion.objects.filter(state=VersionState.READY, num_usable__gt=0)
    return ready.annotate(num=Count("scans", filter=Q(scans__name__in=names))).filter(num__lt=len(names))


def _free(rows: Any, *, queued_before: Any = None) -> QuerySet[DatasetScan]:
    """Scans that wait, or whose worker died."""
    waiting = Q(state=ScanState.WAITING)
    if queued_before is not None:
        waiting &= Q(queued_at__lt=queued_before)
    died = Q(state=ScanState.RUNNING, heartbeat_at__lt=timezone.now() - DEAD_AFTER)
    found: QuerySet[DatasetScan] = rows.filter(waiting | died, name__in=list(scans()), attempt__lt=MAX_ATTEMPTS)
    return found


def _give_up() -> None:
    dead = DatasetScan.objects.filter(
        state=ScanState.RUNNING, heartbeat_at__lt=timezone.now() - DEAD_AFTER, attempt__gte=MAX_ATTEMPTS
    )
    dead.update(state=ScanState.FAILED, heartbeat_at=None, error=f"Its worker died {MAX_ATTEMPTS} times.")


def _claim(version: DatasetVersion) -> DatasetScan | None:
    """The next scan that this process may run: one conditional UPDATE decides."""
    places = {name: place for place, name in enumerate(scans())}
    for scan in sorted(_free(version.scans), key=lambda row: places[row.name]):
        mine = _free(DatasetScan.objects).filter(pk=scan.pk, attempt=scan.attempt)
        if mine.update(
            state=ScanState.RUNNING, attempt=F("attempt") + 1, num_read=0, error="", heartbeat_at=timezone.now()
        ):
            scan.version = version
            scan.attempt += 1
            return scan
    return None


def _run(scan: DatasetScan) -> None:
    version = scan.version
    arguments = [scan.name, str(version.path()), "--format", version.format,
                 "--columns", orjson.dumps(version.columns).decode()]  # fmt: skip
    findings: list[ScanFinding] = []
    started = told = time.monotonic()
    try:
        for event in run_child("scanning", arguments, seconds=SCAN_SECONDS):
            if event["kind"] == "finding":
                findings.append(ScanFinding(scan=scan, place=len(findings), **event["finding"]))
            elif event["kind"] == "progress":
                if time.monotonic() - told > HEARTBEAT_SECONDS or not scan.num_read:
                    told = time.monotonic()
                    scan.num_read = event["num_read"]
                    _update(scan, num_read=scan.num_read, heartbeat_at=timezone.now())
            elif event["kind"] == "refused":
                _finish(scan, [], state=ScanState.FAILED, error=f"{event['message']} {event['next_step']}".strip())
            else:
                _finish(
                    scan, findings, state=ScanState.DONE, num_findings=event["num_findings"],
                    num_rows=event["num_rows"], kinds=event["kinds"], notes=event["notes"], counts=event["counts"],
                    seconds=time.monotonic() - started,
                )  # fmt: skip
    except InspectionFailedError:
        logger.warning("Scan %s of version %s ended without a result.", scan.name, version.pk, exc_info=True)
        _finish(scan, [], state=ScanState.FAILED, error=_TOO_MUCH)


def _update(scan: DatasetScan, **values: Any) -> None:
    mine = DatasetScan.objects.filter(pk=scan.pk, state=ScanState.RUNNING, attempt=scan.attempt)
    if not mine.update(**values):
        raise _SupersededError


def _finish(scan: DatasetScan, findings: list[ScanFinding], **values: Any) -> None:
    """Store a scan's result in one transaction, in place of an earlier one."""
    with transaction.atomic():
        _update(
            scan,
            heartbeat_at=None,
            **{"num_findings": 0, "num_rows": None, "kinds": {}, "notes": [], "counts": {}, **values},
        )
        ScanFinding.objects.filter(scan=scan).delete()
        ScanFinding.objects.bulk_create(findings, batch_size=2000)

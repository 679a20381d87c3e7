"""REST endpoints for the scans of a version: what the scan pages show, and running one again."""

from __future__ import annotations

from typing import Any, Literal

from django.shortcuts import get_object_or_404
from ninja import Query, Router, Status
from pydantic import Field

from studio.api.auth import ApiRequest, may_write
from studio.api.errors import ERRORS, ApiError
from studio.api.schemas import Out, QueryFields
from studio.datasets.models import DatasetScan, DatasetVersion
from studio.datasets.scanning import ScanRunsError, ask_for_scan, known_scan, scans_of

router = Router(tags=["datasets"])


class ScanOut(Out):
    """One scan of a version's rows and how far it is. `kinds` counts its findings by kind."""

    name: str
    label: str
    help: str
    state: Literal["waiting", "running", "done", "failed", "skipped"]
    percent: int = Field(description="Of the rows to read, while it runs.")
    num_findings: int
    num_rows: int | None = Field(description="Rows with findings; null until it is done.")
    kinds: dict[str, int]
    notes: list[str]
    counts: dict[str, int] = Field(description="Rows by what the scan told them to be: languages.")
    error: str
    seconds: float


class FindingOut(Out):
    """Something about a row; `other_line` is the row that it is like. Secrets are masked in `excerpt`."""

    line: int
    kind: str
    message: str
    other_line: int | None
    excerpt: str


class FindingPage(Out):
    """Findings by line; `num_findings` counts all of the scan, `next` is the `after` of the next page."""

    items: list[FindingOut]
    num_findings: int
    next: int | None


class FindingFilters(QueryFields):
    """Which findings to give."""

    kind: str = Field("", max_length=60)
    after: int = Field(-1, ge=-1, le=2**31 - 1, description="`next` of the page before; -1 for the first page.")
    limit: int = Field(50, ge=1, le=200)


def _version(request: ApiRequest, dataset_id: int, number: int) -> DatasetVersion:
    versions = DatasetVersion.objects.filter(dataset__team=request.team).select_related("dataset")
    return get_object_or_404(versions, dataset_id=dataset_id, number=number)


@router.get("datasets/{int:dataset_id}/versions/{int:number}/scans/", response={200: list[ScanOut], **ERRORS})
def list_scans(request: ApiRequest, dataset_id: int, number: int) -> list[DatasetScan]:
    """The scans of the version's rows; empty until they are asked for, which a worker does after the inspection."""
    return scans_of(_version(request, dataset_id, number))


def _scan(request: ApiRequest, dataset_id: int, number: int, name: str) -> DatasetScan:
    version = _version(request, dataset_id, number)
    return get_object_or_404(version.scans.select_related("version"), name=name)


@router.get(
    "datasets/{int:dataset_id}/versions/{int:number}/scans/{slug:name}/findings/",
    response={200: FindingPage, **ERRORS},
)
def list_findings(
    request: ApiRequest, dataset_id: int, number: int, name: str, filters: Query[FindingFilters]
) -> dict[str, Any]:
    """What a scan found, by line."""
    scan = _scan(request, dataset_id, number, name)
    rows = scan.findings.filter(place__gt=filters.after).order_by("place")
    if filters.kind:
        rows = rows.filter(kind=filters.kind)
    found = list(rows[: filters.limit + 1])
    items = found[: filters.limit]
    more = len(found) > filters.limit
    return {"items": items, "num_findings": scan.num_findings, "next": items[-1].place if more else None}


@router.post(
    "datasets/{int:dataset_id}/versions/{int:number}/scans/{slug:name}/run/",
    response={202: ScanOut, **ERRORS},
    auth=may_write,
)
def run_scan(request: ApiRequest, dataset_id: int, number: int, name: str) -> Status[DatasetScan]:
    """Run a scan that is over once more, or one that the version has never had."""
    version = _version(request, dataset_id, number)
    try:
        scan = ask_for_scan(version, known_scan(name), user=request.user, token=request.token)
    except ScanRunsError as error:
        raise ApiError(409, "scan_not_over", str(error), help="Wait until its state changes.") from error
    scan.refresh_from_db()
    return Status(202, scan)

"""Pages of a version's scans: all of them with their first findings, one with every finding, and as CSV."""

from __future__ import annotations

from django.contrib import messages
from django.core.paginator import Paginator
from django.http import HttpResponse, StreamingHttpResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.views.decorators.http import require_GET, require_POST

from studio.accounts.access import TeamRequest, team_page
from studio.accounts.models import Role
from studio.csv_tables import csv_response
from studio.datasets.models import DatasetScan, DatasetVersion, ScanFinding
from studio.datasets.scanning import ScanRunsError, ask_for_scan, known_scan, scans_of
from studio.datasets.views import PAGE_SIZE, page_links, render_tab, version_or_404

NUM_FIRST = 5
_COLUMNS = ("file", "line", "kind", "message", "other line", "excerpt")


@team_page()
@require_GET
def scans(request: TeamRequest, dataset_id: int, number: int) -> HttpResponse:
    """Every scan with its count and first findings; the fragment asks for itself again until all are over."""
    version = version_or_404(request, dataset_id, number)
    shown = scans_of(version)
    first: dict[int, list[ScanFinding]] = {scan.pk: [] for scan in shown}
    for finding in ScanFinding.objects.filter(scan__in=shown, place__lt=NUM_FIRST).order_by("place"):
        first[finding.scan_id].append(finding)
    context = {
        "scans": [(scan, first[scan.pk]) for scan in shown],
        "is_over": bool(shown) and all(scan.is_over() for scan in shown),
        "num_first": NUM_FIRST,
    }
    if request.htmx:  # type: ignore[attr-defined]
        may_change = request.membership.may(Role.TRAINER)
        return render(request, "datasets/_scans.html", {"version": version, "may_change": may_change, **context})
    return render_tab(request, version, "scans", context)


def _scan(version: DatasetVersion, name: str) -> DatasetScan:
    scan: DatasetScan = get_object_or_404(version.scans, name=name)
    scan.version = version
    return scan


@team_page()
@require_GET
def scan(request: TeamRequest, dataset_id: int, number: int, name: str) -> HttpResponse:
    """Every finding of one scan by line, of one kind if that is asked for."""
    version = version_or_404(request, dataset_id, number)
    shown = _scan(version, name)
    rows = shown.findings.order_by("place")
    kind = request.GET.get("kind", "")
    chosen = rows.filter(kind=kind) if kind in shown.kinds else rows
    page = Paginator(chosen, PAGE_SIZE).get_page(request.GET.get("page"))
    num_kept = rows.count() if kind in shown.kinds else page.paginator.count
    return render_tab(
        request, version, "scan",
        {"scan": shown, "page": page, "kind": kind, "kinds": _by_count(shown.kinds), "num_kept": num_kept,
         "num_not_kept": shown.num_findings - num_kept, **page_links(request, page)},
    )  # fmt: skip


def _by_count(kinds: dict[str, int]) -> list[tuple[str, int]]:
    return sorted(kinds.items(), key=lambda item: (-item[1], item[0]))


@team_page()
@require_GET
def scan_csv(request: TeamRequest, dataset_id: int, number: int, name: str) -> StreamingHttpResponse:
    """The findings that are kept as a table."""
    version = version_or_404(request, dataset_id, number)
    shown = _scan(version, name)
    rows = (
        (version.file_name, one.line, one.kind, one.message, one.other_line, one.excerpt)
        for one in shown.findings.order_by("place").iterator(chunk_size=1000)
    )
    return csv_response(request, f"{shown.name}-{version.dataset_id}-v{version.number}.csv", _COLUMNS, rows)


@team_page(Role.TRAINER)
@require_POST
def run_scan_again(request: TeamRequest, dataset_id: int, number: int, name: str) -> HttpResponse:
    """Ask for a scan once more."""
    version = version_or_404(request, dataset_id, number)
    try:
        ask_for_scan(version, known_scan(name), user=request.user)
    except ScanRunsError as error:
        messages.error(request, str(error))
    return redirect("datasets:scans", dataset_id, number)

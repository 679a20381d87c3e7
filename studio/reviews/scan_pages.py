"""What a team's policy lets scans block, on a dataset's scans page; leads waive there."""

from __future__ import annotations

from typing import Any

from django.contrib import messages
from django.http import HttpResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_POST, require_safe

from studio.accounts.access import TeamRequest, team_page
from studio.accounts.models import Membership, Role
from studio.datasets.models import DatasetVersion, ScanState
from studio.reviews import scan_limits
from workers.errors import ExplainedError


def limits_context(version: DatasetVersion, membership: Membership) -> dict[str, Any]:
    """What the fragment shows, for a member of the version's team."""
    standings = scan_limits.standings(version, version.dataset.team) if version.is_ready() else []
    # While a reason may be typed, nothing takes the form away.
    is_typing = membership.may(Role.LEAD) and any(one.may_be_waived() for one in standings)
    is_waiting = any(one.state in {ScanState.WAITING, ScanState.RUNNING} for one in standings)
    return {
        "version": version,
        "standings": standings,
        "num_blocking": sum(one.is_blocking for one in standings),
        "asks_again": is_waiting and not is_typing,
        "may_change": membership.may(Role.TRAINER),
        "may_waive": membership.may(Role.LEAD),
    }


def _version(request: TeamRequest, dataset_id: int, number: int) -> DatasetVersion:
    versions = DatasetVersion.objects.filter(dataset__team=request.team).select_related("dataset__team")
    return get_object_or_404(versions, dataset_id=dataset_id, number=number)


@never_cache
@require_safe
@team_page()
def limits(request: TeamRequest, dataset_id: int, number: int) -> HttpResponse:
    """The fragment, which asks for itself again while a scan that may block is not over; a page without scripts."""
    version = _version(request, dataset_id, number)
    page = "reviews/_scan_limits.html" if request.htmx else "reviews/scan_limits.html"  # type: ignore[attr-defined]
    return render(request, page, limits_context(version, request.membership))


@require_POST
@team_page(Role.LEAD)
def waive(request: TeamRequest, dataset_id: int, number: int, name: str) -> HttpResponse:
    """Let the version be trained on in spite of a scan, with a reason; do=end takes it back."""
    version = _version(request, dataset_id, number)
    if request.POST.get("do") == "end":
        scan_limits.take_back(version, request.team, name, by=request.user)
        messages.success(request, "The waiver is taken back.")
        return redirect("datasets:scans", dataset_id, number)
    try:
        scan_limits.waive(version, request.team, name, reason=request.POST.get("reason", ""), by=request.user)
    except ExplainedError as error:
        messages.error(request, f"{error.message} {error.next_step}".strip())
    else:
        messages.success(request, f"Waived: {version} may be trained on.")
    return redirect("datasets:scans", dataset_id, number)

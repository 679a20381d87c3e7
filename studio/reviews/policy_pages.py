"""The page on which a team's leads change its review policy, and everybody reads it."""

from __future__ import annotations

from django.contrib import messages
from django.http import HttpResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_http_methods

from studio.accounts.access import TeamRequest, refuse, team_page
from studio.accounts.models import Role
from studio.query_values import whole_number
from studio.reviews.forms import policy_sections, scan_rows, typed_policy
from studio.reviews.policies import MAX_APPROVALS, PolicyError, PolicySettings, change_policy, current_policy

MAX_VERSIONS = 50


@never_cache
@require_http_methods(["GET", "HEAD", "POST"])
@team_page()
def policy(request: TeamRequest) -> HttpResponse:
    """What the team asks of an adapter; an older version with ?version=3."""
    may_edit = request.membership.may(Role.LEAD)
    shown = current_policy(request.team)
    errors, sent = None, None
    if request.method == "POST":
        if not may_edit:
            return refuse(request, Role.LEAD)
        sent = request.POST
        try:
            changed = change_policy(request.team, typed_policy(sent), by=request.user, note=sent.get("note", ""))
        except PolicyError as error:
            name = (error.field or "").removeprefix("gates.").replace("scans.", "scan.")
            errors = {name: f"{error.message} {error.next_step}".strip()}
        else:
            messages.success(request, f"The policy is version {changed.version} now; reviews that run keep theirs.")
            return redirect("reviews:policy")
    newest = shown.version
    asked = whole_number(request.GET.get("version", ""))
    if asked is not None and asked != newest:
        shown = get_object_or_404(request.team.policies.select_related("created_by"), version=asked)
    settings = PolicySettings.from_dict(shown.settings)
    return render(
        request,
        "reviews/policy.html",
        {
            "policy": shown,
            "newest": newest,
            "settings": settings,
            "approvals": settings.approvals if sent is None else sent.get("approvals", ""),
            "note": "" if sent is None else sent.get("note", ""),
            "max_approvals": MAX_APPROVALS,
            "sections": policy_sections(settings, sent),
            "scan_rows": scan_rows(settings, sent),
            "versions": request.team.policies.select_related("created_by").order_by("-version")[:MAX_VERSIONS],
            "may_edit": may_edit and shown.version == newest,
            "errors": errors,
        },
        status=422 if errors else 200,
    )

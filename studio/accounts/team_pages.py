"""What a team's admin looks after: members, API tokens and the audit log."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlencode

from django.contrib import messages
from django.http import HttpResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.urls import reverse
from django.utils import timezone
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_http_methods, require_POST, require_safe

from studio.accounts.access import TeamRequest, refuse, team_page
from studio.accounts.forms import AuditFilter, InviteForm, RoleForm, TokenForm
from studio.accounts.members import MemberError, change_role, invite_member, remove_member, renew_login_link
from studio.accounts.models import ApiToken, Role, audit_events_of, record

AUDIT_PAGE = 50


@never_cache
@require_http_methods(["GET", "HEAD", "POST"])
@team_page()
def members(request: TeamRequest) -> HttpResponse:
    """Who is in the team; an admin puts people in."""
    if request.method != "POST":
        return _members_page(request)
    if not request.membership.may(Role.ADMIN):
        return refuse(request, Role.ADMIN)
    form = InviteForm(request.POST)
    if not form.is_valid():
        return _members_page(request, form=form, status=422)
    try:
        membership, secret = invite_member(
            team=request.team, by=request.user, username=form.cleaned_data["username"],
            role=Role(form.cleaned_data["role"]),
        )  # fmt: skip
    except MemberError as error:
        form.add_error(error.field, error.message)
        return _members_page(request, form=form, status=422)
    if secret is None:
        messages.success(request, f"{membership.user.username} has an account already and is in the team now.")
        return redirect("accounts:members")
    # No redirect here: the link is shown in this one answer and kept nowhere.
    return _members_page(request, link=_link(request, secret), link_for=membership.user.username)


@require_POST
@team_page(Role.ADMIN)
def member_role(request: TeamRequest, membership_id: int) -> HttpResponse:
    """Give a member another role."""
    membership = get_object_or_404(request.team.memberships.select_related("user", "team"), pk=membership_id)
    form = RoleForm(request.POST)
    if not form.is_valid():
        messages.error(request, "There is no such role. Choose one of the list.")
        return redirect("accounts:members")
    try:
        change_role(membership, Role(form.cleaned_data["role"]), by=request.user)
        messages.success(request, f"{membership.user.username} is a {membership.role} now.")
    except MemberError as error:
        messages.error(request, error.message)
    return redirect("accounts:members")


@require_POST
@team_page(Role.ADMIN)
def member_remove(request: TeamRequest, membership_id: int) -> HttpResponse:
    """Take a person out of the team."""
    membership = get_object_or_404(request.team.memberships.select_related("user", "team"), pk=membership_id)
    try:
        remove_member(membership, by=request.user)
        messages.success(request, f"{membership.user.username} is no longer in the team.")
    except MemberError as error:
        messages.error(request, error.message)
    return redirect("accounts:members")


@never_cache
@require_POST
@team_page(Role.ADMIN)
def member_link(request: TeamRequest, membership_id: int) -> HttpResponse:
    """Show a fresh one-time link for a member."""
    membership = get_object_or_404(request.team.memberships.select_related("user", "team"), pk=membership_id)
    try:
        secret = renew_login_link(membership, by=request.user)
    except MemberError as error:
        messages.error(request, error.message)
        return redirect("accounts:members")
    return _members_page(request, link=_link(request, secret), link_for=membership.user.username)


@never_cache
@require_http_methods(["GET", "HEAD", "POST"])
@team_page(Role.ADMIN)
def tokens(request: TeamRequest) -> HttpResponse:
    """The team's API tokens; a new one is shown once."""
    if request.method != "POST":
        return _tokens_page(request)
    form = TokenForm(request.POST)
    if not form.is_valid():
        return _tokens_page(request, form=form, status=422)
    token, secret = ApiToken.issue(
        team=request.team, user=request.user, name=form.cleaned_data["name"], scopes=form.cleaned_data["scopes"]
    )
    record("token.issued", team=request.team, user=request.user, target=token, scopes=token.scopes)
    url = request.build_absolute_uri("/api/v1/me")
    # No redirect here: the secret is shown in this one answer and kept nowhere.
    return _tokens_page(
        request, issued=token, secret=secret, curl=f'curl --header "Authorization: Bearer {secret}" {url}'
    )


@require_POST
@team_page(Role.ADMIN)
def token_revoke(request: TeamRequest, token_id: int) -> HttpResponse:
    """End a token at once."""
    token = get_object_or_404(request.team.api_tokens, pk=token_id)
    if ApiToken.objects.filter(pk=token.pk, revoked_at=None).update(revoked_at=timezone.now()):
        record("token.revoked", team=request.team, user=request.user, target=token)
        messages.success(request, f"The token {token.name} is revoked.")
    return redirect("accounts:tokens")


@require_safe
@team_page(Role.ADMIN)
def audit(request: TeamRequest) -> HttpResponse:
    """Who did what, the newest first."""
    form = AuditFilter(request.GET)
    chosen: dict[str, Any] = form.cleaned_data if form.is_valid() else {}
    events = audit_events_of(request.team).order_by("-pk")
    if chosen.get("action"):
        events = events.filter(action=chosen["action"])
    if chosen.get("person"):
        events = events.filter(user__username=chosen["person"])
    if chosen.get("before"):
        events = events.filter(pk__lt=chosen["before"])
    found = list(events[: AUDIT_PAGE + 1])
    kept = {key: chosen[key] for key in ("action", "person") if chosen.get(key)}
    older = kept | {"before": found[AUDIT_PAGE - 1].pk} if len(found) > AUDIT_PAGE else None
    return render(
        request,
        "accounts/audit.html",
        {
            "events": found[:AUDIT_PAGE],
            "actions": request.team.audit_events.order_by("action").values_list("action", flat=True).distinct(),
            "people": request.team.memberships.order_by("user__username").values_list("user__username", flat=True),
            "chosen": chosen,
            "newest_url": f"?{urlencode(kept)}" if chosen.get("before") else "",
            "older_url": f"?{urlencode(older)}" if older else "",
        },
    )


def _members_page(request: TeamRequest, *, status: int = 200, **context: Any) -> HttpResponse:
    rows = request.team.memberships.select_related("user").order_by("user__username")
    is_admin = request.membership.may(Role.ADMIN)
    context = {"form": InviteForm(), "rows": rows, "roles": Role.choices, "is_admin": is_admin} | context
    return render(request, "accounts/members.html", context, status=status)


def _tokens_page(request: TeamRequest, *, status: int = 200, **context: Any) -> HttpResponse:
    rows = request.team.api_tokens.select_related("created_by").order_by("revoked_at", "-created_at")
    context = {"form": TokenForm(), "rows": rows, "now": timezone.now()} | context
    return render(request, "accounts/tokens.html", context, status=status)


def _link(request: TeamRequest, secret: str) -> str:
    return request.build_absolute_uri(reverse("accounts:login_link", args=[secret]))

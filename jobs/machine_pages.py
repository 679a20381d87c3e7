"""The page of machines: every device with what it does, and the tokens with which a machine joins."""

from __future__ import annotations

import hashlib
import re
from typing import Any
from urllib.parse import urlsplit

from django.contrib import messages
from django.http import HttpResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.utils import timezone
from django.utils.cache import get_conditional_response, patch_cache_control
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_GET, require_POST

from jobs.join_tokens import LOOPBACK, issue_join_token, may_add_machines, recent_join_tokens, revoke_join_token
from jobs.machines import look_at_machines
from studio.accounts.access import TeamRequest, team_page
from studio.accounts.models import Role
from studio.version import STUDIO_VERSION

# Masked anew in every answer, so it says nothing about whether anything has changed.
_CSRF_VALUE = re.compile(rb'name="csrfmiddlewaretoken" value="[^"]*"')


@never_cache
@require_GET
@team_page(Role.VIEWER)
def list_workers(request: TeamRequest) -> HttpResponse:
    """Every machine and its devices. The list asks for itself again and again."""
    return _page(request)


@require_GET
@team_page(Role.VIEWER)
def worker_list(request: TeamRequest) -> HttpResponse:
    """The list alone; 304 when nothing of it has changed."""
    response = render(request, "jobs/_workers.html", _list_context(request))
    shown = _CSRF_VALUE.sub(b"", response.content)
    etag = f'"{hashlib.sha256(shown).hexdigest()[:32]}"'
    response["ETag"] = etag
    patch_cache_control(response, private=True, no_cache=True)
    return get_conditional_response(request, etag=etag, response=response) or response


@never_cache
@require_POST
@team_page(Role.ADMIN)
def make_join_token(request: TeamRequest) -> HttpResponse:
    """A token for one machine, shown in this one answer and kept nowhere."""
    if not may_add_machines(request.membership):
        return _refuse(request)
    token, secret = issue_join_token(request.team, request.user)
    root = request.build_absolute_uri("/").rstrip("/")
    # No redirect here: the secret is in no other answer.
    command = f"python manage.py join {root} {secret}"
    is_plain = not request.is_secure() and (urlsplit(root).hostname or "") not in LOOPBACK
    return _page(request, issued=token, command=command, is_plain_http=is_plain)


@require_POST
@team_page(Role.ADMIN)
def end_join_token(request: TeamRequest, token_id: int) -> HttpResponse:
    """End a token that no machine has used."""
    token = get_object_or_404(request.team.join_tokens, pk=token_id)
    if not may_add_machines(request.membership):
        return _refuse(request)
    if revoke_join_token(token, request.user):
        messages.success(request, f"The join token {token.hint}… works no more.")
    else:
        messages.info(request, f"The join token {token.hint}… was used or revoked before; nothing has changed.")
    return redirect("workers:list")


def _refuse(request: TeamRequest) -> HttpResponse:
    messages.error(request, "Only an admin of the studio's first team adds machines: a worker reads every team's data.")
    return _page(request, status=403)


def _list_context(request: TeamRequest) -> dict[str, Any]:
    machines = look_at_machines(request.team)
    devices = [device for machine in machines for device in machine.devices]
    return {
        "machines": machines,
        "num_here": sum(device.is_here for device in devices),
        "num_busy": sum(device.job is not None or device.is_foreign for device in devices),
        "num_idle": sum(device.status == "idle" for device in devices),
        "web_version": STUDIO_VERSION,
        "may_lead": request.membership.may(Role.LEAD),
        "may_admin": request.membership.may(Role.ADMIN),
        "may_train": request.membership.may(Role.TRAINER),
    }


def _page(request: TeamRequest, *, status: int = 200, **shown: Any) -> HttpResponse:
    may_join = may_add_machines(request.membership)
    context = {
        **_list_context(request),
        "may_join": may_join,
        "join_tokens": list(recent_join_tokens(request.team)) if may_join else [],
        "now": timezone.now(),
        **shown,
    }
    return render(request, "jobs/workers.html", context, status=status)

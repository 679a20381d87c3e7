"""A person's own pages."""

from __future__ import annotations

from typing import Any, cast

from django.contrib import messages
from django.contrib.auth import update_session_auth_hash
from django.db.models import F
from django.http import HttpRequest, HttpResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.views.decorators.debug import sensitive_post_parameters
from django.views.decorators.http import require_POST, require_safe

from studio.accounts.access import signed_in_page
from studio.accounts.forms import NameForm, password_form
from studio.accounts.middleware import SESSION_KEY
from studio.accounts.models import Team, User, record
from studio.accounts.signed_out import say_on_page


def csrf_failure(request: HttpRequest, reason: str = "") -> HttpResponse:
    """403 for a form without its token."""
    # Asked before the middleware that sets request.htmx has run.
    if request.headers.get("HX-Request") == "true":
        return say_on_page(request, "components/stale_page.html")
    return render(request, "403_csrf.html", {"reason": reason}, status=403)


@signed_in_page
@require_safe
def account(request: HttpRequest) -> HttpResponse:
    """Name, password, sessions."""
    return _account_page(request)


@signed_in_page
@require_POST
def change_name(request: HttpRequest) -> HttpResponse:
    """Take a new name."""
    form = NameForm(request.POST, instance=_fresh(request))
    if not form.is_valid():
        return _account_page(request, name_form=form, status=422)
    form.save()
    messages.success(request, "Your name is saved.")
    return redirect("accounts:account")


@signed_in_page
@sensitive_post_parameters()
@require_POST
def change_password(request: HttpRequest) -> HttpResponse:
    """Set or change the password; every other session ends."""
    user = cast("User", request.user)
    form = password_form(user, request.POST)
    if not form.is_valid():
        return _account_page(request, password_form=form, status=422)
    form.save()
    update_session_auth_hash(request, user)
    record("password.changed", team=_team(request), user=user, target=user)
    messages.success(request, "The password is set. Your other sessions have ended.")
    return redirect("accounts:account")


@signed_in_page
@require_POST
def end_sessions(request: HttpRequest) -> HttpResponse:
    """End every session of this person but this one."""
    user = _fresh(request)
    User.objects.filter(pk=user.pk).update(session_generation=F("session_generation") + 1)
    user.refresh_from_db()
    update_session_auth_hash(request, user)
    record("sessions.ended", team=_team(request), user=user, target=user)
    messages.success(request, "Your other sessions have ended.")
    return redirect("accounts:account")


@signed_in_page
@require_safe
def no_team(request: HttpRequest) -> HttpResponse:
    """For somebody whom no team has taken in yet."""
    if request.team:  # type: ignore[attr-defined]  # set by the middleware
        return redirect("home")
    return render(request, "accounts/no_team.html")


@signed_in_page
@require_POST
def switch_team(request: HttpRequest) -> HttpResponse:
    """Look at another one of one's teams."""
    user = cast("User", request.user)
    wanted = request.POST.get("team", "")
    team = get_object_or_404(user.teams, pk=int(wanted) if wanted.isdecimal() and len(wanted) < 19 else 0)
    request.session[SESSION_KEY] = team.pk
    return redirect("home")


def _account_page(request: HttpRequest, *, status: int = 200, **forms: Any) -> HttpResponse:
    user = _fresh(request)
    context = {"name_form": NameForm(instance=user), "password_form": password_form(user)} | forms
    return render(request, "accounts/account.html", context, status=status)


def _fresh(request: HttpRequest) -> User:
    """The person as the database has them: a form that fails must not leave its values on request.user."""
    return User.objects.get(pk=cast("User", request.user).pk)


def _team(request: HttpRequest) -> Team | None:
    # The middleware's team is a lazy object, which is not None even where it wraps None.
    return request.team or None  # type: ignore[attr-defined]  # set by the middleware

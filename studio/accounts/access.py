"""Who may see and change what. Every object is reached through `request.team`, so nothing else is needed."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from django.http import HttpRequest, HttpResponse, HttpResponseBase
from django.shortcuts import redirect, render

from studio.accounts.models import Membership, Role, Team, User
from studio.accounts.signed_out import ask_to_sign_in


class TeamRequest(HttpRequest):
    """The request that a view behind `team_page` receives."""

    user: User
    team: Team
    membership: Membership


View = Callable[..., HttpResponseBase]


def team_page(role: Role = Role.VIEWER, *, keeps_form: bool = False) -> Callable[[View], View]:
    """A view for members of a team whose role includes `role`. Strangers are sent to the login page.

    With `keeps_form`, what a stranger sent waits for `take_kept_form`: their session ended while they typed.

    The view finds its objects through `request.team` (get_object_or_404(request.team.datasets, pk=...)),
    so that another team's object is a 404 like one that does not exist.
    """

    def decorate(view: View) -> View:
        @wraps(view)
        def guarded(request: Any, *args: Any, **kwargs: Any) -> HttpResponseBase:
            if not request.user.is_authenticated:
                return ask_to_sign_in(request, keeps_form=keeps_form)
            if not request.membership:
                return redirect("accounts:no_team")
            if not request.membership.may(role):
                return refuse(request, role)
            return view(request, *args, **kwargs)

        guarded.required_role = role  # type: ignore[attr-defined]  # read by the access tests
        return guarded

    return decorate


def signed_in_page(view: View) -> View:
    """A view for everybody with an account, in a team or not. Strangers are sent to the login page."""

    @wraps(view)
    def guarded(request: Any, *args: Any, **kwargs: Any) -> HttpResponseBase:
        return view(request, *args, **kwargs) if request.user.is_authenticated else ask_to_sign_in(request)

    return guarded


def refuse(request: TeamRequest, role: Role) -> HttpResponse:
    """403 with a sentence that says which role is needed."""
    return render(request, "403.html", {"needed": role, "membership": request.membership}, status=403)

"""Puts the person's current team on the request."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from asgiref.sync import iscoroutinefunction
from django.http import HttpRequest, HttpResponseBase
from django.utils.decorators import sync_and_async_middleware
from django.utils.functional import SimpleLazyObject

from studio.accounts.models import Membership, Team

SESSION_KEY = "team_id"


def memberships_of(request: HttpRequest) -> list[Membership]:
    """The person's memberships, the oldest first; none of a stranger's."""
    if not request.user.is_authenticated:
        return []
    return list(Membership.objects.select_related("team").filter(user=request.user).order_by("created_at", "pk"))


def current_membership(request: HttpRequest) -> Membership | None:
    """The membership that the session chose, or the person's first; None for a stranger."""
    mine: list[Membership] = request.memberships  # type: ignore[attr-defined]
    chosen = request.session.get(SESSION_KEY) if mine else None
    return next((one for one in mine if one.team_id == chosen), mine[0] if mine else None)


def attach_team(request: HttpRequest) -> None:
    """Set `request.memberships`, `request.membership` and `request.team`; one query finds them when first used."""

    def team() -> Team | None:
        return request.membership.team if request.membership else None  # type: ignore[attr-defined]

    request.memberships = SimpleLazyObject(lambda: memberships_of(request))  # type: ignore[attr-defined]
    request.membership = SimpleLazyObject(lambda: current_membership(request))  # type: ignore[attr-defined]
    request.team = SimpleLazyObject(team)  # type: ignore[attr-defined]


@sync_and_async_middleware
def TeamMiddleware(get_response: Callable[[HttpRequest], Any]) -> Callable[[HttpRequest], Any]:  # noqa: N802
    """Hybrid, so that a progress stream does not hold a thread for its whole life."""
    if iscoroutinefunction(get_response):

        async def asynchronous(request: HttpRequest) -> HttpResponseBase:
            attach_team(request)
            response: Awaitable[HttpResponseBase] = get_response(request)
            return await response

        return asynchronous

    def synchronous(request: HttpRequest) -> HttpResponseBase:
        attach_team(request)
        response: HttpResponseBase = get_response(request)
        return response

    return synchronous

"""What the shell around every page shows."""

from __future__ import annotations

from typing import Any

from django.http import HttpRequest


def shell(request: HttpRequest) -> dict[str, Any]:
    """The current team, the person's role in it and all their teams."""
    membership = getattr(request, "membership", None)
    if not membership:
        return {"team": None}
    teams = [one.team for one in getattr(request, "memberships", [membership])]
    return {"team": membership.team, "membership": membership, "teams": teams}

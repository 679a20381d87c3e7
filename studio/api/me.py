"""Who am I: the first call of every client."""

from __future__ import annotations

from datetime import datetime

from ninja import Router

from studio.api.auth import ApiRequest
from studio.api.errors import ERRORS
from studio.api.schemas import Out

router = Router(tags=["me"])


class TokenOut(Out):
    """The token that made the call."""

    name: str
    scopes: list[str]
    expires_at: datetime


class MeOut(Out):
    """In whose name, in which team and with which rights the token acts."""

    user: str
    team: str
    role: str
    token: TokenOut


@router.get("me", response={200: MeOut, **ERRORS}, summary="Who this token is")
def me(request: ApiRequest) -> dict[str, object]:
    """In whose name, in which team and with which rights this token acts."""
    return {
        "user": request.user.username,
        "team": request.team.name,
        "role": request.membership.role,
        "token": request.token,
    }

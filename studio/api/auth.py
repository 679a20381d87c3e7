"""Who calls the API: a team's token in the Authorization header, and nothing else."""

from __future__ import annotations

from datetime import timedelta

from django.db.models import Q
from django.http import HttpRequest
from django.utils import timezone
from ninja.security import HttpBearer

from studio.accounts.access import TeamRequest
from studio.accounts.models import ApiToken, Membership, Role, Scope, record
from studio.api.errors import CHALLENGE, UNAUTHENTICATED, ApiError

# `last_used_at` is for people: a write per minute is enough, and a busy token does not fight over its row.
LAST_USED_EVERY = timedelta(minutes=1)


class ApiRequest(TeamRequest):
    """The request that an endpoint receives: in the name of the token's maker, in the token's team."""

    token: ApiToken


class Token(HttpBearer):
    """Lets a living token in whose scopes include `scope` and whose maker still has the role."""

    def __init__(self, scope: Scope, role: Role) -> None:
        super().__init__()
        self.scope = scope
        self.role = role

    def __call__(self, request: HttpRequest) -> ApiToken | None:
        _refuse_token_in_url(request)
        scheme, _, secret = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            raise ApiError(401, UNAUTHENTICATED.code, UNAUTHENTICATED.message, help=UNAUTHENTICATED.help,
                           headers=CHALLENGE)  # fmt: skip
        return self.authenticate(request, secret.strip())

    def authenticate(self, request: HttpRequest, token: str) -> ApiToken:
        found = ApiToken.find(token)
        membership = Membership.objects.filter(user=found.created_by, team=found.team).first() if found else None
        if found is None or membership is None:
            raise ApiError(401, UNAUTHENTICATED.code, UNAUTHENTICATED.message, help=UNAUTHENTICATED.help,
                           headers=CHALLENGE | {"WWW-Authenticate": CHALLENGE["WWW-Authenticate"] + ', error="invalid_token"'})  # noqa: E501  # fmt: skip
        if self.scope.value not in found.scopes:
            raise ApiError(
                403,
                "scope_missing",
                f'This token may not do that: it lacks the scope "{self.scope.value}".',
                help="Make a token with this scope on the page API tokens.",
            )
        if not membership.may(self.role):
            raise ApiError(
                403,
                "role_missing",
                f"{found.created_by.display_name()}, who made this token, is a {membership.role} of {found.team}, "
                f"and this needs the role {self.role.value}.",
            )
        _note_use(found)
        for name, value in {
            "token": found, "user": found.created_by, "team": found.team, "membership": membership,
        }.items():  # fmt: skip
            setattr(request, name, value)
        return found


def _refuse_token_in_url(request: HttpRequest) -> None:
    """URLs end up in logs and histories, so a token that was sent in one is revoked."""
    for values in request.GET.lists():
        for value in values[1]:
            if not value.startswith(ApiToken.PREFIX):
                continue
            token = ApiToken.find(value)
            if token is not None:
                ApiToken.objects.filter(pk=token.pk, revoked_at=None).update(revoked_at=timezone.now())
                record("token.revoked", team=token.team, token=token, target=token, reason="sent in a URL")
            raise ApiError(
                400,
                "token_in_url",
                "An API token was sent in the URL, where logs keep it. If it was a living one, it is revoked now.",
                help="Make a new token and send it in the Authorization header.",
            )


def _note_use(token: ApiToken) -> None:
    now = timezone.now()
    ApiToken.objects.filter(Q(last_used_at=None) | Q(last_used_at__lt=now - LAST_USED_EVERY), pk=token.pk).update(
        last_used_at=now
    )


may_read = Token(Scope.READ, Role.VIEWER)
may_write = Token(Scope.WRITE, Role.TRAINER)

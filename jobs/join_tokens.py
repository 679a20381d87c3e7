"""Join tokens: made by an admin for one machine, exchanged once for what a worker needs (studio/joining.py asks)."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from datetime import timedelta
from urllib.parse import unquote, urlsplit

from django.conf import settings
from django.db import transaction
from django.db.models import Q, QuerySet
from django.utils import timezone

from jobs.models import JoinToken
from studio.accounts.models import Membership, Role, Team, User, hash_secret, record
from studio.devices import boot_id
from studio.storage import is_remote
from studio.version import STUDIO_VERSION
from workers.errors import ExplainedError

PREFIX = "pjt_"
LIFETIME = timedelta(hours=1)
LOOPBACK = {"", "localhost", "127.0.0.1", "::1"}

# What a worker is told beside the servers and the storage: whatever must be the same on every machine.
SHARED_SETTINGS = (
    "LEASE_SECONDS", "POLL_SECONDS", "MAX_ATTEMPTS", "STALL_SECONDS",
    "S3_ENDPOINT", "S3_BUCKET", "S3_PREFIX", "S3_REGION", "S3_KEY_ID", "S3_SECRET",
)  # fmt: skip


class CannotJoinError(ExplainedError):
    """A machine cannot become a part of this studio as it is set up; nothing was handed out."""

    code = "cannot_join"


@dataclass(frozen=True)
class Joining:
    """What a machine says of itself when it asks to join."""

    host: str
    boot_id: str
    version: str
    address: str


def may_add_machines(membership: Membership) -> bool:
    """Whether this member may let machines join: an admin of the studio's first team.

    A worker reads the datasets of every team, so the admins of one of the others cannot decide this alone.
    """
    first = Team.objects.order_by("pk").values_list("pk", flat=True).first()
    return membership.may(Role.ADMIN) and membership.team_id == first


def issue_join_token(team: Team, user: User) -> tuple[JoinToken, str]:
    """A new token and its secret; the secret exists nowhere else afterwards."""
    secret = PREFIX + secrets.token_urlsafe(32)
    with transaction.atomic():
        token = JoinToken.objects.create(
            team=team, created_by=user, hint=secret[: len(PREFIX) + 6], secret_sha256=hash_secret(secret),
            expires_at=timezone.now() + LIFETIME,
        )  # fmt: skip
        record("join_token.issued", team=team, user=user, target=token)
    return token, secret


def revoke_join_token(token: JoinToken, user: User) -> bool:
    """End a token that has not been used; False when there was nothing to end."""
    with transaction.atomic():
        ended = JoinToken.objects.filter(pk=token.pk, used_at=None, revoked_at=None).update(revoked_at=timezone.now())
        if ended:
            record("join_token.revoked", team=token.team, user=user, target=token)
    return bool(ended)


def recent_join_tokens(team: Team) -> QuerySet[JoinToken]:
    """A team's tokens of the last day, the newest first."""
    since = timezone.now() - timedelta(days=1)
    return team.join_tokens.filter(created_at__gte=since).select_related("created_by").order_by("-created_at")


def find_join_token(secret: str) -> JoinToken | None:
    """The living token with this secret: unused, in time, and its maker still may make one."""
    found = (
        JoinToken.objects.select_related("team", "created_by")
        .filter(
            Q(created_by__is_active=True), secret_sha256=hash_secret(secret), used_at=None, revoked_at=None,
            expires_at__gt=timezone.now(),
        )
        .first()
    )  # fmt: skip
    if found is None:
        return None
    membership = Membership.objects.filter(user=found.created_by, team=found.team).first()
    return found if membership is not None and may_add_machines(membership) else None


def redeem(token: JoinToken, machine: Joining) -> dict[str, str]:
    """The environment of a worker on a machine that joins; the token is used up with it.

    Handed out is what a worker cannot work without: the database, the broker, the files' storage, and the times that
    all machines must agree on. The studio's secret key is not among it: it signs sessions, and no worker has any.
    The database's URL is the key to every team's data all the same, hence the checks on who may make a token.

    Raises:
        CannotJoinError: this studio's servers or files cannot be reached from there; the token stays as it is.
    """
    _check(machine)
    with transaction.atomic():
        # The row count decides: two machines with one token cannot both win.
        used = JoinToken.objects.filter(pk=token.pk, used_at=None).update(
            used_at=timezone.now(), used_by=f"{machine.host} ({machine.address})"[:200]
        )
        if used != 1:
            raise CannotJoinError("This join token has just been used.", next_step="Make another one.")
        record(
            "machine.joined", team=token.team, user=token.created_by, target=token,
            host=machine.host, address=machine.address, version=machine.version,
        )  # fmt: skip
    values = {f"STUDIO_{name}": str(getattr(settings, name)) for name in SHARED_SETTINGS}
    return {"DATABASE_URL": settings.DATABASE_URL, "REDIS_URL": settings.REDIS_URL, **values}


def _check(machine: Joining) -> None:
    if machine.version != STUDIO_VERSION:
        raise CannotJoinError(
            f"That machine has version {machine.version} of PEFT Studio, and this studio is {STUDIO_VERSION}.",
            next_step="Install the same version there, then ask again with the same token.",
        )
    if not is_remote():
        raise CannotJoinError(
            "This studio keeps its files in a folder of its own machine, which a worker with another data folder"
            " cannot see.",
            next_step="Set STUDIO_S3_ENDPOINT and STUDIO_S3_BUCKET to an S3-compatible storage and restart the studio.",
        )
    if machine.boot_id == boot_id():
        return  # The same machine: sockets and loopback addresses are there as they are here.
    for name, url in (("DATABASE_URL", settings.DATABASE_URL), ("REDIS_URL", settings.REDIS_URL)):
        if _is_only_here(url):
            raise CannotJoinError(
                f"The server of {name} listens on this machine alone, so no other machine can reach it.",
                next_step="Set STUDIO_SERVERS_HOST to an address of this machine that the others reach, or"
                " DATABASE_URL and REDIS_URL to real servers, and restart the studio.",
            )
    # Without an endpoint it is AWS itself.
    if settings.S3_ENDPOINT and (urlsplit(settings.S3_ENDPOINT).hostname or "") in LOOPBACK:
        raise CannotJoinError(
            "The storage of STUDIO_S3_ENDPOINT has a loopback address, so no other machine can reach it.",
            next_step="Set it to the storage's name in the network and restart the studio.",
        )


def _is_only_here(url: str) -> bool:
    parts = urlsplit(url)
    host = unquote(parts.hostname or "")
    return parts.scheme.startswith("unix") or host.startswith("/") or host in LOOPBACK

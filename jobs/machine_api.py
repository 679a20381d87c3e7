"""Machines over REST: the list that the page shows, and the one call with which a machine joins."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

from django.http import HttpRequest
from ninja import Router
from ninja.security import HttpBearer
from pydantic import Field

from jobs.join_tokens import CannotJoinError, Joining, find_join_token, redeem
from jobs.machines import DeviceView, look_at_machines
from jobs.models import JoinToken
from studio.api.auth import ApiRequest
from studio.api.errors import CHALLENGE, ERRORS, ApiError
from studio.api.schemas import Body, Out
from studio.version import STUDIO_VERSION

router = Router(tags=["workers"])


class WorkerOut(Out):
    """A device and what it does. `job` is null while it runs a job of another team: then `is_foreign` is true."""

    id: UUID
    host: str
    slot: int
    device: str
    device_kind: str
    status: str = Field(description="running, idle, draining, quarantined, stopped or gone.")
    job: UUID | None
    is_foreign: bool
    memory_bytes: int
    free_memory_bytes: int | None = Field(description="What a job could use: all but what other programs hold.")
    used_by_own_bytes: int | None
    used_by_others_bytes: int | None
    temperature_celsius: float | None
    utilisation_percent: float | None
    warm_base: str
    quarantined_until: datetime | None
    version: str
    has_other_version: bool
    started_at: datetime
    last_seen: datetime
    reported_at: datetime | None


class JoinIn(Body):
    """What a machine says of itself."""

    host: str = Field(min_length=1, max_length=150)
    boot_id: str = Field(max_length=64)
    version: str = Field(max_length=40)


class JoinOut(Out):
    """What a worker needs, as environment variables."""

    version: str
    environment: dict[str, str]


class JoinRequest(HttpRequest):
    """The request of a machine that joins."""

    join_token: JoinToken


class JoinAuth(HttpBearer):
    """Lets a living join token in, from the Authorization header and nowhere else."""

    def authenticate(self, request: HttpRequest, token: str) -> JoinToken:
        found = find_join_token(token)
        if found is None:
            raise ApiError(
                401, "join_token", "This join token is unknown, used, revoked or too old.",
                help="Make another one on the page Workers and send it as Authorization: Bearer pjt_...",
                headers=CHALLENGE,
            )  # fmt: skip
        request.join_token = found  # type: ignore[attr-defined]
        return found


@router.get("workers/", response={200: list[WorkerOut], **ERRORS}, summary="Machines and their devices")
def list_workers(request: ApiRequest) -> list[dict[str, Any]]:
    """Every device that is there, and those that went within a day."""
    return [_out(device) for machine in look_at_machines(request.team) for device in machine.devices]


@router.post("join/", response={200: JoinOut, **ERRORS}, auth=JoinAuth(), summary="Join as a worker")
def join(request: JoinRequest, body: JoinIn) -> dict[str, Any]:
    """Exchange a join token for what a worker needs; it works once."""
    machine = Joining(body.host, body.boot_id, body.version, request.META.get("REMOTE_ADDR", ""))
    try:
        return {"version": STUDIO_VERSION, "environment": redeem(request.join_token, machine)}
    except CannotJoinError as error:
        raise ApiError(409, error.code, error.message, help=error.next_step) from error


def _out(device: DeviceView) -> dict[str, Any]:
    worker = device.worker
    names = [name for name in WorkerOut.model_fields if hasattr(worker, name)]
    return {
        **{name: getattr(worker, name) for name in names},
        "status": device.status,
        "job": device.job.pk if device.job else None,
        "is_foreign": device.is_foreign,
        "warm_base": device.warm_base,
        "has_other_version": device.other_version,
    }

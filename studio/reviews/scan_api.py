"""REST endpoints for what scans block: how a version stands with the team's policy, and waivers."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from django.shortcuts import get_object_or_404
from ninja import Router, Status
from pydantic import Field

from studio.api.auth import ApiRequest
from studio.api.errors import ERRORS, ApiError
from studio.api.schemas import Body, Out
from studio.datasets.models import DatasetVersion
from studio.reviews import scan_limits
from studio.reviews.api import explained, may_lead
from studio.reviews.reviewing import MAX_REASON
from studio.reviews.scan_limits import Standing, WaiverError

router = Router(tags=["datasets"])
_PATH = "datasets/{int:dataset_id}/versions/{int:number}/scan-limits/"


class StandingOut(Out):
    """How a version stands with one scan that the team's policy lets block training."""

    scan: str = Field(alias="name")
    label: str
    state: str = Field(description='Of the scan; "missing" when it was never asked for.')
    most: float = Field(alias="limit.most")
    unit: str = Field(alias="limit.unit")
    num_found: int | None = Field(description="Rows with findings; null until the scan is done.")
    is_blocking: bool
    sentence: str
    waived_by: str | None
    waived_at: datetime | None
    reason: str

    @staticmethod
    def resolve_waived_by(standing: Standing) -> str | None:
        by = standing.waiver.waived_by if standing.waiver else None
        return by.username if by else None

    @staticmethod
    def resolve_waived_at(standing: Standing) -> datetime | None:
        return standing.waiver.waived_at if standing.waiver else None

    @staticmethod
    def resolve_reason(standing: Standing) -> str:
        return standing.waiver.reason if standing.waiver else ""


class WaiverBody(Body):
    """Why rows may be trained on in spite of what a scan found."""

    reason: str = Field(max_length=MAX_REASON)


def _version(request: ApiRequest, dataset_id: int, number: int) -> DatasetVersion:
    versions = DatasetVersion.objects.filter(dataset__team=request.team).select_related("dataset__team")
    return get_object_or_404(versions, dataset_id=dataset_id, number=number)


@router.get(_PATH, response={200: list[StandingOut], **ERRORS}, summary="What scans block for a version")
def list_limits(request: ApiRequest, dataset_id: int, number: int) -> Any:
    """Every scan that the team's policy lets block; training needs all of them not to."""
    return scan_limits.standings(_version(request, dataset_id, number), request.team)


@router.post(
    _PATH + "{slug:name}/waiver/", response={200: list[StandingOut], **ERRORS}, auth=may_lead, summary="Waive a scan"
)
def waive(request: ApiRequest, dataset_id: int, number: int, name: str, body: WaiverBody) -> Any:
    """Needs a token of a lead or an admin; holds for what the scan found, and not for more rows than these."""
    version = _version(request, dataset_id, number)
    try:
        with explained():
            scan_limits.waive(version, request.team, name, reason=body.reason, by=request.user, token=request.token)
    except WaiverError as error:
        raise ApiError(409, error.code, error.message, field="name") from error
    return scan_limits.standings(version, request.team)


@router.delete(
    _PATH + "{slug:name}/waiver/", response={204: None, **ERRORS}, auth=may_lead, summary="Take a waiver back"
)
def end_waiver(request: ApiRequest, dataset_id: int, number: int, name: str) -> Status[None]:
    """Nothing happens when there is none."""
    version = _version(request, dataset_id, number)
    scan_limits.take_back(version, request.team, name, by=request.user, token=request.token)
    return Status(204, None)

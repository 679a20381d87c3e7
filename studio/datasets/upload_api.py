"""Uploads in pieces over the REST API: tus 1.0 at /api/v1/uploads/, and what became of one as JSON."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

from django.http import HttpResponse
from django.shortcuts import get_object_or_404
from django.urls import reverse
from ninja import Query, Router
from pydantic import Field

from studio.api.auth import ApiRequest, may_write
from studio.api.errors import ERRORS, ApiError
from studio.api.paging import Page, PageQuery, page_of
from studio.api.schemas import Body, Out
from studio.datasets import tus
from studio.datasets.api import VersionOut
from studio.datasets.models import Upload
from studio.datasets.resumable import change_target, settle

router = Router(tags=["uploads"])


class UploadOut(Out):
    """A file on its way to becoming a dataset version; `version` once it is one."""

    id: UUID
    state: str
    file_name: str
    name: str
    licence: str
    dataset_id: int | None
    source: dict[str, Any]
    num_bytes: int | None
    num_received: int
    error_code: str
    error: str
    error_next_step: str
    created_at: datetime
    version: VersionOut | None
    was_stored: bool


class TargetBody(Body):
    """What the new dataset is to be called."""

    name: str = Field("", max_length=120)
    licence: str = Field("", max_length=80)


def _upload(request: ApiRequest, upload_id: UUID) -> Upload:
    uploads = request.team.uploads.select_related("team", "created_by", "dataset", "version")
    return get_object_or_404(uploads, pk=upload_id)


def _call(action: Any) -> HttpResponse:
    """A protocol step; what has no place in the API's own form of errors gets it here."""
    try:
        response: HttpResponse = action()
    except Exception as error:
        status, detail, headers = tus.refusal_of(error)
        raise ApiError(status, detail.code, detail.message, field=detail.field, help=detail.help,
                       headers=headers) from error  # fmt: skip
    return response


@router.get("uploads/", response={200: Page[UploadOut], **ERRORS})
def list_uploads(request: ApiRequest, filters: Query[PageQuery]) -> dict[str, Any]:
    """The team's uploads of the last day, the newest first."""
    return page_of(request.team.uploads.select_related("version"), filters)


@router.get("uploads/{uuid:upload_id}/", response={200: UploadOut, **ERRORS})
def get_upload(request: ApiRequest, upload_id: UUID) -> Upload:
    """What became of an upload."""
    upload = _upload(request, upload_id)
    settle(upload)
    return upload


@router.put("uploads/{uuid:upload_id}/target/", response={200: UploadOut, **ERRORS}, auth=may_write)
def change_upload_target(request: ApiRequest, upload_id: UUID, body: TargetBody) -> Upload:
    """Say what the dataset of an unfinished upload is to be called; a complete one is registered then."""
    upload = _upload(request, upload_id)
    if not upload.is_receiving():
        raise ApiError(409, "upload_is_over", f"This upload is {upload.get_state_display().lower()}.")
    change_target(upload, name=body.name, licence=body.licence)
    return upload


@router.api_operation(["OPTIONS"], "uploads/", response={204: None}, include_in_schema=False)
def upload_options(request: ApiRequest) -> HttpResponse:
    """tus: what this server can do."""
    return tus.options(request)


@router.post("uploads/", response={201: None, **ERRORS}, auth=may_write)
def create_upload(request: ApiRequest) -> HttpResponse:
    """tus: begin an upload. Upload-Length has its bytes, Upload-Metadata filename, name, licence, dataset, sha256."""
    return _call(lambda: tus.create(request, lambda upload: reverse("api:get_upload", args=[upload.pk])))


@router.api_operation(["HEAD"], "uploads/{uuid:upload_id}/", response={200: None, **ERRORS}, auth=may_write)
def upload_offset(request: ApiRequest, upload_id: UUID) -> HttpResponse:
    """tus: where to go on (Upload-Offset)."""
    return _call(lambda: tus.head(request, upload_id))


@router.patch("uploads/{uuid:upload_id}/", response={204: None, **ERRORS}, auth=may_write)
def send_upload(request: ApiRequest, upload_id: UUID) -> HttpResponse:
    """tus: the bytes that follow Upload-Offset, as application/offset+octet-stream."""
    return _call(lambda: tus.patch(request, upload_id))


@router.delete("uploads/{uuid:upload_id}/", response={204: None, **ERRORS}, auth=may_write)
def cancel_upload(request: ApiRequest, upload_id: UUID) -> HttpResponse:
    """tus: throw an upload away."""
    return _call(lambda: tus.delete(request, upload_id))

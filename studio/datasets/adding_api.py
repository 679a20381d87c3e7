"""Other ways in than a file, over the REST API: the same calls as the pages."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime

from django.conf import settings
from django.shortcuts import get_object_or_404
from ninja import Router, Status
from pydantic import Field

from studio.accounts.models import Role, Scope
from studio.api.auth import ApiRequest, Token, may_write
from studio.api.errors import ERRORS, ApiError
from studio.api.schemas import Body, Out
from studio.datasets.api import VersionOut
from studio.datasets.fetching import start_folder_import, start_hub_import
from studio.datasets.folders import OfferedFile, offered_files
from studio.datasets.models import Dataset, DatasetVersion, Upload
from studio.datasets.resumable import TooManyUploadsError, refuse_unknown_licence
from studio.datasets.tus import too_many_uploads
from studio.datasets.upload_api import UploadOut
from studio.datasets.uploads import receive_pasted

router = Router(tags=["datasets"])


class TargetBody(Body):
    """What becomes of the rows: the next version of a dataset, or a new dataset."""

    dataset_id: int | None = Field(None, ge=1, le=2**63 - 1)
    name: str = Field("", max_length=120, description="Of a new dataset.")
    licence: str = Field("", max_length=80, description="Of a new dataset, as the Hugging Face Hub writes it.")

    def dataset(self, request: ApiRequest) -> Dataset | None:
        if self.dataset_id is None:
            return None
        dataset: Dataset = get_object_or_404(request.team.datasets, pk=self.dataset_id)
        return dataset


class RowsBody(TargetBody):
    """Rows as the text of a JSON Lines, JSON, CSV or TSV file."""

    rows: str


class FolderBody(TargetBody):
    """A file of the server's folders by its full path."""

    path: str = Field(max_length=4000)


class OfferedFileOut(Out):
    """A file that may be named."""

    path: str
    num_bytes: int
    changed_at: datetime


def _refuse_without_folders() -> None:
    if not settings.DATASET_ROOTS:
        raise ApiError(404, "no_folders", "This studio offers no files of its server.",
                       help="Whoever runs it can set STUDIO_DATASET_ROOTS.")  # fmt: skip


@router.get("server-files/", response={200: list[OfferedFileOut], **ERRORS}, auth=Token(Scope.READ, Role.ADMIN))
def list_server_files(request: ApiRequest) -> list[OfferedFile]:
    """Files of the server that an admin may make datasets of."""
    _refuse_without_folders()
    return offered_files()[0]


@router.post("datasets/from-server/", response={202: UploadOut, **ERRORS}, auth=Token(Scope.WRITE, Role.ADMIN))
def import_server_file(request: ApiRequest, body: FolderBody) -> Status[Upload]:
    """Have a file of the server become a dataset version; ask for the upload until its state is finished."""
    _refuse_without_folders()
    return _started(request, body, start_folder_import)


class HubBody(TargetBody):
    """A split of a dataset of the Hugging Face Hub."""

    hub_id: str = Field(max_length=200, description="owner/name")
    revision: str = Field("", max_length=120, description="A branch, tag or commit; empty: main.")
    config: str = Field("", max_length=120)
    split: str = Field("train", max_length=120)


@router.post("datasets/from-hub/", response={202: UploadOut, **ERRORS}, auth=may_write)
def import_hub_dataset(request: ApiRequest, body: HubBody) -> Status[Upload]:
    """Have a dataset of the Hub become a version; ask for the upload until its state is finished."""
    return _started(request, body, start_hub_import)


def _started(request: ApiRequest, body: TargetBody, start: Callable[..., Upload]) -> Status[Upload]:
    values = body.model_dump(exclude={"dataset_id"})
    try:
        upload = start(
            team=request.team, user=request.user, dataset=body.dataset(request), token=request.token, **values
        )
    except TooManyUploadsError as error:
        raise too_many_uploads() from error
    return Status(202, upload)


@router.post("datasets/rows/", response={201: VersionOut, 200: VersionOut, **ERRORS}, auth=may_write)
def paste_rows(request: ApiRequest, body: RowsBody) -> Status[DatasetVersion]:
    """Store rows that come as text; 200 with the older version when the team has these very rows."""
    refuse_unknown_licence(body.licence)
    version = receive_pasted(
        body.rows, team=request.team, user=request.user, dataset=body.dataset(request), name=body.name,
        licence=body.licence,
    )  # fmt: skip
    return Status(200 if version.already_stored else 201, version)

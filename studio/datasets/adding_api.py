"""Other ways in than a file, over the REST API: the same calls as the pages."""

from __future__ import annotations

from django.shortcuts import get_object_or_404
from ninja import Router, Status
from pydantic import Field

from studio.api.auth import ApiRequest, may_write
from studio.api.errors import ERRORS
from studio.api.schemas import Body
from studio.datasets.api import VersionOut
from studio.datasets.models import Dataset, DatasetVersion
from studio.datasets.resumable import refuse_unknown_licence
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


@router.post("datasets/rows/", response={201: VersionOut, 200: VersionOut, **ERRORS}, auth=may_write)
def paste_rows(request: ApiRequest, body: RowsBody) -> Status[DatasetVersion]:
    """Store rows that come as text; 200 with the older version when the team has these very rows."""
    refuse_unknown_licence(body.licence)
    version = receive_pasted(
        body.rows, team=request.team, user=request.user, dataset=body.dataset(request), name=body.name,
        licence=body.licence,
    )  # fmt: skip
    return Status(200 if version.already_stored else 201, version)

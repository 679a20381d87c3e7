"""REST endpoints for the splits of a version: what their pages show and do."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from django.http import HttpResponseBase
from django.shortcuts import get_object_or_404
from ninja import Query, Router, Status
from pydantic import Field

from studio.api.auth import ApiRequest, may_write
from studio.api.errors import ERRORS, ApiError
from studio.api.schemas import Body, Out, QueryFields
from studio.datasets.api import ready_version, version_or_404
from studio.datasets.models import DatasetSplit, DatasetVersion
from studio.datasets.split_files import file_response, part_response
from studio.datasets.splitting import SplitRefusedError, ask_split, delete_split, make_default
from workers.splits.asked import Method, Part, SplitRequest, Together

router = Router(tags=["datasets"])
_SPLITS = "datasets/{int:dataset_id}/versions/{int:number}/splits/"
_FIELDS = SplitRequest.model_fields


class SayingOut(Out):
    """Rows of a part, and the exact 95 % interval of a share of one half that is measured on so many."""

    num: int
    low: float
    high: float
    is_too_small: bool = Field(description="The interval reaches further than ten points to either side.")
    rows_needed: int = Field(description="With so many rows it would not.")


class ValueOut(Out):
    """Rows of one value of the column that was stratified by, or that names the parts."""

    value: str
    train: int
    validation: int
    test: int
    left_out: int


class PairOut(Out):
    """Two near duplicates that were kept together. A part may be left_out."""

    line: int
    other_line: int
    share: float = Field(description="Of the phrases that both have, estimated.")
    part: str
    other_part: str


class SplitOut(Out):
    """A split. `sha256` is that of its file, which never changes."""

    id: int
    name: str
    state: Literal["waiting", "running", "done", "failed"]
    percent: int = Field(description="Of the rows to read, while it is made.")
    asked: dict[str, Any] = Field(description="As it was asked for, with every default.")
    sha256: str
    num_train: int
    num_validation: int
    num_test: int
    num_left_out: int
    is_default: bool
    error: str
    created_by: str
    created_at: datetime

    @staticmethod
    def resolve_created_by(split: DatasetSplit | dict[str, Any]) -> str:
        """Who asked for it, as people know them."""
        return str(split["created_by"]) if isinstance(split, dict) else split.created_by.display_name()


class SplitDetailOut(SplitOut):
    """A split with what is to be said of it."""

    parts: dict[str, SayingOut]
    part_values: dict[str, list[str]] = Field(description="Which values of the column were taken for which part.")
    strata: list[ValueOut]
    num_lots: int = Field(description="Lots of several rows that stay together.")
    largest_lot: int
    num_equal: int = Field(description="Rows that say the same as an earlier one.")
    num_near: int = Field(description="Rows that are near another one.")
    pairs: list[PairOut] = Field(description="The first near duplicates.")
    notes: list[str]


class SplitIn(Body):
    """What is asked of a split. Sizes are shares, or numbers of rows with the method count."""

    name: str = Field("", max_length=80, description='Empty: the next "Split 1", "Split 2".')
    method: Method = "share"
    train: float | None = Field(None, description="null: every row that is left.")
    validation: float | None = Field(None, description="null: a tenth by share, and none by count.")
    test: float | None = Field(None, description="null: a tenth by share; by count it has to be given.")
    group_column: str = Field("", max_length=200, description=_FIELDS["group_column"].description)
    stratify_column: str = Field("", max_length=200, description=_FIELDS["stratify_column"].description)
    part_column: str = Field("", max_length=200, description="Of the method column.")
    part_values: dict[Part, list[str]] = Field(
        default_factory=dict, description="Which values of the column mean which part; empty: guessed, and told."
    )
    keep_together: Together = Field("near", description=_FIELDS["keep_together"].description)
    seed: int = Field(17, ge=0, le=2**31 - 1)

    def request(self) -> SplitRequest:
        """What is asked; raises RecipeProblems."""
        values = self.model_dump(exclude={"name"}, exclude_none=True)
        if self.method == "count":
            values.setdefault("validation", 0)
            if "test" not in values:
                raise ApiError(422, "missing", "Say how many rows are to be scored.", field="test")
        return SplitRequest.from_dict(values)


class PartQuery(QueryFields):
    """As which kind of file."""

    kind: Literal["jsonl", "csv"] = "jsonl"


def _split(version: DatasetVersion, split_id: int) -> DatasetSplit:
    split: DatasetSplit = get_object_or_404(version.splits.select_related("created_by"), pk=split_id)
    split.version = version
    return split


def _done(request: ApiRequest, dataset_id: int, number: int, split_id: int) -> DatasetSplit:
    split = _split(version_or_404(request, dataset_id, number), split_id)
    if not split.is_done():
        raise ApiError(409, "not_ready", f"{split} is {split.get_state_display().lower()}.", help=split.error)
    return split


def _detail(split: DatasetSplit) -> dict[str, Any]:
    report: dict[str, Any] = split.report
    names = ("line", "other_line", "share", "part", "other_part")
    return {
        **SplitOut.from_orm(split).model_dump(),
        **{name: report.get(name, {}) for name in ("parts", "part_values")},
        **{name: report.get(name, 0) for name in ("num_lots", "largest_lot", "num_equal", "num_near")},
        **{name: report.get(name, []) for name in ("strata", "notes")},
        "pairs": [dict(zip(names, pair, strict=True)) for pair in report.get("pairs", [])],
    }


@router.get(_SPLITS, response={200: list[SplitOut], **ERRORS})
def list_splits(request: ApiRequest, dataset_id: int, number: int) -> list[DatasetSplit]:
    """The splits of a version, the default first and then the newest."""
    version = version_or_404(request, dataset_id, number)
    found = list(version.splits.select_related("created_by").order_by("-is_default", "-pk"))
    for split in found:
        split.version = version
    return found


@router.post(_SPLITS, response={202: SplitDetailOut, **ERRORS}, auth=may_write)
def make_split(request: ApiRequest, dataset_id: int, number: int, body: SplitIn) -> Status[dict[str, Any]]:
    """Ask for a split. A worker makes it; its state says when it is done."""
    version = ready_version(request, dataset_id, number)
    try:
        split = ask_split(version, body.request(), name=body.name.strip(), user=request.user, token=request.token)
    except SplitRefusedError as error:
        raise ApiError(409, error.code, str(error), field=error.field, help=error.next_step) from error
    return Status(202, _detail(split))


@router.get(_SPLITS + "{int:split_id}/", response={200: SplitDetailOut, **ERRORS})
def get_split(request: ApiRequest, dataset_id: int, number: int, split_id: int) -> dict[str, Any]:
    """A split with the rows of each part, what they can say, and what was kept together."""
    return _detail(_split(version_or_404(request, dataset_id, number), split_id))


@router.post(_SPLITS + "{int:split_id}/default/", response={200: SplitDetailOut, **ERRORS}, auth=may_write)
def choose_default(request: ApiRequest, dataset_id: int, number: int, split_id: int) -> dict[str, Any]:
    """Have new jobs on the version begin with this split."""
    version = version_or_404(request, dataset_id, number)
    split = _split(version, split_id)
    try:
        make_default(split, version, user=request.user, token=request.token)
    except SplitRefusedError as error:
        raise ApiError(409, error.code, str(error), help=error.next_step) from error
    return _detail(_split(version, split_id))


@router.delete(_SPLITS + "{int:split_id}/default/", response={200: SplitDetailOut, **ERRORS}, auth=may_write)
def choose_no_default(request: ApiRequest, dataset_id: int, number: int, split_id: int) -> dict[str, Any]:
    """Have new jobs on the version begin with the plain held-out share again."""
    version = version_or_404(request, dataset_id, number)
    _split(version, split_id)
    make_default(None, version, user=request.user, token=request.token)
    return _detail(_split(version, split_id))


@router.delete(_SPLITS + "{int:split_id}/", response={204: None, **ERRORS}, auth=may_write)
def remove_split(request: ApiRequest, dataset_id: int, number: int, split_id: int) -> Status[None]:
    """Delete a split that no job and no adapter names."""
    split = _split(version_or_404(request, dataset_id, number), split_id)
    try:
        delete_split(split, user=request.user, token=request.token)
    except SplitRefusedError as error:
        raise ApiError(409, error.code, str(error)) from error
    return Status(204, None)


@router.get(_SPLITS + "{int:split_id}/file/")
def download_split(request: ApiRequest, dataset_id: int, number: int, split_id: int) -> HttpResponseBase:
    """The frozen file: JSON Lines with the lines of each part."""
    split = _done(request, dataset_id, number, split_id)
    return file_response(request, split, user=request.user, token=request.token)


@router.get(_SPLITS + "{int:split_id}/parts/{str:part}/")
def download_part(
    request: ApiRequest, dataset_id: int, number: int, split_id: int, part: Part, filters: Query[PartQuery]
) -> HttpResponseBase:
    """The rows of a part as JSON Lines, or as a table with `kind=csv`."""
    split = _done(request, dataset_id, number, split_id)
    return part_response(request, split, part, filters.kind, user=request.user, token=request.token)

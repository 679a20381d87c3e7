"""REST endpoints for datasets: the same calls as the pages."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from django.db.models import QuerySet
from django.shortcuts import get_object_or_404
from ninja import File, Form, Query, Router, Status
from ninja.files import UploadedFile
from pydantic import Field

from studio.accounts.models import record
from studio.api.auth import ApiRequest, may_write
from studio.api.errors import ERRORS, ApiError
from studio.api.paging import Page, PageQuery, page_of
from studio.api.schemas import Body, Out, QueryFields
from studio.cards import MAX_CHARACTERS, CardConflictError, card_version
from studio.datasets import exporting, showing
from studio.datasets.card import edit_card
from studio.datasets.changes import changes_of
from studio.datasets.licensing import set_licence
from studio.datasets.models import Dataset, DatasetVersion
from studio.datasets.removing import DatasetInUseError, delete_dataset
from studio.datasets.repairing import NothingToRepairError, queue_repair
from studio.datasets.uploads import receive_upload
from studio.datasets.views import remap
from workers.formats import get_format
from workers.licences import choices

router = Router(tags=["datasets"])

Upload = Annotated[UploadedFile, File()]


class VersionOut(Out):
    """One uploaded file and what its inspection found."""

    id: int
    dataset_id: int
    number: int
    state: str
    file_name: str
    sha256: str
    num_bytes: int
    source: dict[str, str]
    carrier: str
    format: str
    example_type: str
    why_not_trainable: str
    columns: dict[str, str]
    column_names: list[str]
    num_rows: int
    num_usable: int
    num_quarantined: int
    problem_counts: dict[str, int]
    statistics: dict[str, Any]
    error: str
    error_next_step: str
    correction: dict[str, Any]
    created_at: datetime
    already_stored: bool

    @staticmethod
    def resolve_example_type(version: DatasetVersion) -> str:
        return version.example_type()

    @staticmethod
    def resolve_why_not_trainable(version: DatasetVersion) -> str:
        return version.why_not_trainable()


class DatasetOut(Out):
    """A dataset; `versions` has the newest first."""

    id: int
    name: str
    description: str
    licence: str
    created_at: datetime
    versions: list[VersionOut]

    @staticmethod
    def resolve_versions(dataset: Dataset) -> list[DatasetVersion]:
        return sorted(dataset.versions.all(), key=lambda version: -version.number)


class ProblemOut(Out):
    """Something wrong with a row, at its line."""

    line: int | None
    turn: int | None
    field: str
    rule: str
    level: str
    message: str
    fix: str
    excerpt: str


class ProblemPage(Out):
    """Problems by line; `num_problems` counts all of them, `next` is the `after` of the next page."""

    items: list[ProblemOut]
    num_problems: int
    next: int | None


class ToolCallOut(Out):
    """A call of a tool; `arguments` is JSON as text."""

    id: str
    name: str
    arguments: str


class MessageOut(Out):
    role: str
    content: str
    train: bool | None
    weight: float
    reasoning: str
    tool_call_id: str
    tool_calls: list[ToolCallOut]


class ExampleOut(Out):
    """A usable row. `messages` are all its turns; `prompt`, `chosen` and `rejected` those of a preference pair,
    `prompt`, `completion` and `label` those of an answer with a verdict, `text` that of plain text."""

    line: int
    type: str
    tools: str = ""
    messages: list[MessageOut]
    prompt: list[MessageOut] | None = None
    chosen: list[MessageOut] | None = None
    rejected: list[MessageOut] | None = None
    completion: list[MessageOut] | None = None
    label: bool | None = None
    text: str | None = None


class ChangesOut(Out):
    """What a version changed; lines are the first of each kind, those of removed rows in the version before."""

    state: Literal["first", "waiting", "done", "failed"]
    error: str = ""
    against: int | None = Field(None, description="Number of the version before.")
    key: str = Field("", description="The column that names the rows; empty: they were matched by what they say.")
    num_added: int | None = None
    num_removed: int | None = None
    num_edited: int | None = None
    num_unchanged: int | None = None
    added: list[int] = []
    removed: list[int] = []
    edited: list[int] = []


class DatasetFilters(PageQuery):
    """What the list of datasets may be narrowed by."""

    name: str = Field("", max_length=120, description="Part of the name.")


class ProblemFilters(QueryFields):
    """Which problems to give."""

    rule: str = Field("", max_length=40)
    after: int = Field(0, ge=0, le=2**31 - 1, description="`next` of the page before; 0 for the first page.")
    limit: int = Field(50, ge=1, le=200)


class LicenceBody(Body):
    """A licence as the Hugging Face Hub writes it."""

    licence: Literal[tuple(identifier for identifier, _ in choices())]  # type: ignore[valid-type]


class CardOut(Out):
    """A dataset's card: what people wrote, and a name of this very text."""

    body: str
    version: str = Field(description="What `seen` is to be when the card is edited.")


class CardBody(Body):
    """A new text of a card, in Markdown. Front matter in it is dropped: each export has its own."""

    body: str = Field(max_length=MAX_CHARACTERS)
    seen: str = Field(max_length=64, description="`version` of the card that was read.")


class MappingBody(Body):
    """Which column is which: {"prompt": "question", "completion": "answer"}."""

    columns: dict[str, str] = Field(max_length=10)


def _datasets(request: ApiRequest) -> QuerySet[Dataset]:
    return request.team.datasets.prefetch_related("versions")


def version_or_404(request: ApiRequest, dataset_id: int, number: int) -> DatasetVersion:
    """A version of the team's datasets."""
    versions = DatasetVersion.objects.filter(dataset__team=request.team).select_related("dataset", "row_table")
    return get_object_or_404(versions, dataset_id=dataset_id, number=number)


def ready_version(request: ApiRequest, dataset_id: int, number: int) -> DatasetVersion:
    """A version of the team's datasets whose rows can be read; raises ApiError."""
    version = version_or_404(request, dataset_id, number)
    if not version.is_ready():
        raise ApiError(409, "not_ready", f"{version} is {version.get_state_display().lower()}.")
    return version


@router.get("datasets/", response={200: Page[DatasetOut], **ERRORS})
def list_datasets(request: ApiRequest, filters: Query[DatasetFilters]) -> dict[str, Any]:
    """The team's datasets, the newest first."""
    return page_of(_datasets(request).filter(name__icontains=filters.name), filters)


@router.post("datasets/", response={201: VersionOut, 200: VersionOut, **ERRORS}, auth=may_write)
def upload_dataset(
    request: ApiRequest,
    file: Upload,
    name: Annotated[str, Form(max_length=120)] = "",
    licence: Annotated[str, Form(max_length=80)] = "",
) -> Status[DatasetVersion]:
    """Upload a file as a new dataset; 200 with the older version when the team has this very file."""
    if licence and licence not in dict(choices()):
        raise ApiError(422, "unknown_licence", f'There is no licence "{licence}".', field="licence",
                       help=f"It is one of: {', '.join(dict(choices()))}.")  # fmt: skip
    return _receive(request, file, name=name, licence=licence)


@router.post(
    "datasets/{int:dataset_id}/versions/", response={201: VersionOut, 200: VersionOut, **ERRORS}, auth=may_write
)
def upload_version(
    request: ApiRequest,
    dataset_id: int,
    file: Upload,
) -> Status[DatasetVersion]:
    """Upload a file as the next version of a dataset."""
    return _receive(request, file, dataset=get_object_or_404(request.team.datasets, pk=dataset_id))


def _receive(request: ApiRequest, file: UploadedFile, **target: Any) -> Status[DatasetVersion]:
    version = receive_upload(
        team=request.team, user=request.user, file_name=file.name or "", chunks=file.chunks(1024**2), **target
    )
    return Status(200 if version.already_stored else 201, version)


@router.get("datasets/{int:dataset_id}/", response={200: DatasetOut, **ERRORS})
def get_dataset(request: ApiRequest, dataset_id: int) -> Dataset:
    """A dataset with its versions."""
    return get_object_or_404(_datasets(request), pk=dataset_id)


@router.patch("datasets/{int:dataset_id}/", response={200: DatasetOut, **ERRORS}, auth=may_write)
def change_dataset(request: ApiRequest, dataset_id: int, body: LicenceBody) -> Dataset:
    """Say under which licence the rows came."""
    dataset = get_object_or_404(_datasets(request), pk=dataset_id)
    set_licence(dataset, body.licence, user=request.user, token=request.token)
    return dataset


@router.get("datasets/{int:dataset_id}/card/", response={200: CardOut, **ERRORS}, summary="A dataset's card")
def get_card(request: ApiRequest, dataset_id: int) -> dict[str, str]:
    return _card(get_object_or_404(request.team.datasets, pk=dataset_id))


@router.put(
    "datasets/{int:dataset_id}/card/",
    response={200: CardOut, **ERRORS},
    auth=may_write,
    summary="Edit a dataset's card, unless somebody else did since it was read",
)
def put_card(request: ApiRequest, dataset_id: int, body: CardBody) -> dict[str, str]:
    dataset = get_object_or_404(request.team.datasets.select_related("team"), pk=dataset_id)
    try:
        edit_card(dataset, body.body, request.user, seen=body.seen, token=request.token)
    except CardConflictError as error:
        again = "Read the card again and send yours with its version."
        raise ApiError(409, error.code, error.message, field="seen", help=again) from error
    return _card(dataset)


def _card(dataset: Dataset) -> dict[str, str]:
    return {"body": dataset.description, "version": card_version(dataset.description)}


@router.delete("datasets/{int:dataset_id}/", response={204: None, **ERRORS}, auth=may_write)
def remove_dataset(request: ApiRequest, dataset_id: int) -> Status[None]:
    """Delete a dataset with its versions; 409 when jobs or adapters use it."""
    dataset = get_object_or_404(request.team.datasets, pk=dataset_id)
    try:
        delete_dataset(dataset, user=request.user)
    except DatasetInUseError as error:
        names = ", ".join(str(one) for one in error.users[:5])
        raise ApiError(409, "dataset_in_use", f"{dataset.name} is used by {names}.",
                       help="Delete what uses it first.") from error  # fmt: skip
    return Status(204, None)


@router.get("datasets/{int:dataset_id}/versions/{int:number}/", response={200: VersionOut, **ERRORS})
def get_version(request: ApiRequest, dataset_id: int, number: int) -> DatasetVersion:
    """One version and what its inspection found."""
    return version_or_404(request, dataset_id, number)


@router.get("datasets/{int:dataset_id}/versions/{int:number}/problems/", response={200: ProblemPage, **ERRORS})
def list_problems(request: ApiRequest, dataset_id: int, number: int, filters: Query[ProblemFilters]) -> dict[str, Any]:
    """What is wrong with the version's rows, by line."""
    version = version_or_404(request, dataset_id, number)
    rows = version.problems.filter(pk__gt=filters.after).order_by("pk")
    if filters.rule:
        rows = rows.filter(rule=filters.rule)
    found = list(rows[: filters.limit + 1])
    items = found[: filters.limit]
    return {
        "items": items,
        "num_problems": version.num_problems(),
        "next": items[-1].pk if len(found) > filters.limit else None,
    }


class ExportQuery(QueryFields):
    """How the rows are written."""

    kind: exporting.Kind = Field("parquet", description="Of the file with the rows.")


@router.get("datasets/{int:dataset_id}/versions/{int:number}/export/", response={200: None, **ERRORS})
def export_version(request: ApiRequest, dataset_id: int, number: int, asked: Query[ExportQuery]) -> Any:
    """A zip of a folder that `datasets.load_dataset` reads: usable rows, a card, and why other rows are not used."""
    version = ready_version(request, dataset_id, number)
    return exporting.response(request, version, asked.kind, user=request.user, token=request.token)


@router.get("datasets/{int:dataset_id}/versions/{int:number}/changes/", response={200: ChangesOut, **ERRORS})
def version_changes(request: ApiRequest, dataset_id: int, number: int) -> dict[str, Any]:
    """Rows against those of the version before; ask again while the state is waiting."""
    return changes_of(version_or_404(request, dataset_id, number)) or {"state": "first"}


@router.get("datasets/{int:dataset_id}/versions/{int:number}/preview/", response={200: list[ExampleOut], **ERRORS})
def preview_version(request: ApiRequest, dataset_id: int, number: int) -> Any:
    """The first usable rows, as the format reads them."""
    return showing.preview(ready_version(request, dataset_id, number))


@router.put(
    "datasets/{int:dataset_id}/versions/{int:number}/mapping/", response={202: VersionOut, **ERRORS}, auth=may_write
)
def map_version(request: ApiRequest, dataset_id: int, number: int, body: MappingBody) -> Status[DatasetVersion]:
    """Choose the columns and inspect the version again."""
    version = version_or_404(request, dataset_id, number)
    plugin = get_format("mapped")
    _check_columns(version, body.columns, plugin.fields, plugin.required_fields)
    if version.is_inspecting():
        raise ApiError(409, "inspecting", f"{version} is being inspected.", help="Wait until its state changes.")
    # Asked again under a lock: a job may have begun to use it meanwhile.
    if version.users() or not remap(version, body.columns):
        raise ApiError(409, "dataset_in_use", f"{version} is used by jobs, so it stays as it is.",
                       help="Upload the file as a new dataset.")  # fmt: skip
    record("dataset.mapped", team=request.team, user=request.user, token=request.token, target=version)
    version.refresh_from_db()
    return Status(202, version)


@router.post(
    "datasets/{int:dataset_id}/versions/{int:number}/repair/", response={202: VersionOut, **ERRORS}, auth=may_write
)
def repair_version(request: ApiRequest, dataset_id: int, number: int) -> Status[DatasetVersion]:
    """Ask for a corrected version; `correction` says how it is going, and then its number."""
    version = version_or_404(request, dataset_id, number)
    try:
        queue_repair(version, user=request.user, token=request.token)
    except NothingToRepairError as error:
        raise ApiError(409, "nothing_to_repair", str(error)) from error
    version.refresh_from_db()
    return Status(202, version)


def _check_columns(
    version: DatasetVersion, columns: dict[str, str], fields: dict[str, str], required: tuple[str, ...]
) -> None:
    for field in required:
        if not columns.get(field):
            raise ApiError(422, "missing_column", f'The column for "{field}" is missing.', field=f"columns.{field}")
    for field, column in columns.items():
        if field not in fields:
            raise ApiError(422, "unknown_field", f'There is no field "{field}".', field=f"columns.{field}",
                           help=f"The fields are {', '.join(fields)}.")  # fmt: skip
        if column not in version.column_names:
            raise ApiError(422, "unknown_column", f'The file has no column "{column}".', field=f"columns.{field}",
                           help=f"It has {', '.join(version.column_names[:50])}.")  # fmt: skip

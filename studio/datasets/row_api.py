"""REST endpoints for a version's rows: the search and the filters of the page, and one row with all that is known."""

from __future__ import annotations

from typing import Any, Literal

from django.http import Http404
from ninja import Query, Router, Status
from pydantic import Field

from studio.api.auth import ApiRequest, may_write
from studio.api.errors import ERRORS, ApiError
from studio.api.schemas import Out, QueryFields
from studio.datasets.api import ExampleOut, ProblemOut, ready_version
from studio.datasets.models import DatasetVersion, RowTable, ScanFinding
from studio.datasets.row_form import MAX_NUMBER, MAX_SEARCH, Asked, RowsForm
from studio.datasets.row_searching import find_row, find_rows
from studio.datasets.row_tables import RowTableRunsError, ask_again, ask_for_rows
from workers.row_table import MAX_VALUE

router = Router(tags=["datasets"])
_PATH = "datasets/{int:dataset_id}/versions/{int:number}/rows/"


class RowOut(Out):
    """A row in short. Of a row that is set aside `example` is null and `excerpt` how it begins in the file.

    Texts of more than 8,000 characters are cut, and so are rows of more than 100 turns.
    """

    line: int
    is_usable: bool
    rules: list[str] = Field(description="What is remarked on it; see the problems.")
    num_turns: int
    num_characters: int
    example: ExampleOut | None
    excerpt: str


class RowPageOut(Out):
    """Rows that fit, in the order that was asked for. `next` is the `after` of the next page."""

    items: list[RowOut]
    num_matches: int
    num_rows: int
    is_whole: bool = Field(description="False: the time was over before every row was looked at; there may be more.")
    next: str | None


class RowFindingOut(Out):
    """What a scan found in the row."""

    scan: str
    kind: str
    message: str
    other_line: int | None

    @staticmethod
    def resolve_scan(finding: ScanFinding) -> str:
        return finding.scan.name


class WholeRowOut(RowOut):
    """A row with the text that the file has for it (JSON Lines) or its JSON, and the rows beside it that fit."""

    raw: str
    problems: list[ProblemOut]
    findings: list[RowFindingOut]
    previous: int | None = Field(description="Line of the row before it that fits the filters, in their order.")
    next: int | None


class RowTableOut(Out):
    """How far the rows are prepared for looking through them, and the columns that one may filter by."""

    state: Literal["waiting", "running", "done", "failed"]
    num_read: int
    num_bytes: int
    columns: list[dict[str, Any]]
    error: str
    error_next_step: str


class RowFilters(QueryFields):
    """Which rows are wanted; what is left out asks for nothing."""

    q: str = Field("", max_length=MAX_SEARCH, description="A piece of text, in upper or lower case.")
    state: Literal["", "usable", "set_aside"] = ""
    rule: str = Field("", max_length=40, description="A rule that says something about the row.")
    role: str = Field("", max_length=20, description="Who speaks in it.")
    system: Literal["", "with", "without"] = Field("", description="A system prompt.")
    min_turns: int | None = Field(None, ge=0, le=MAX_NUMBER)
    max_turns: int | None = Field(None, ge=0, le=MAX_NUMBER)
    min_characters: int | None = Field(None, ge=0, le=MAX_NUMBER)
    max_characters: int | None = Field(None, ge=0, le=MAX_NUMBER)
    column: str = Field("", max_length=200, description="One of the columns of `rows/prepared/`.")
    value: str = Field("", max_length=MAX_VALUE)
    order: Literal["line", "longest", "shortest"] = "line"


class RowPageQuery(RowFilters):
    """The same, a page of them."""

    after: str = Field("", max_length=400, description="`next` of the page before; empty for the first page.")
    limit: int = Field(50, ge=1, le=200)


def _table(request: ApiRequest, dataset_id: int, number: int) -> RowTable:
    """The rows at rest of a version of the team; raises ApiError where they are not there yet."""
    version = ready_version(request, dataset_id, number)
    table = ask_for_rows(version)
    if table.state == "failed":
        raise ApiError(409, "rows_not_prepared", f"The rows could not be prepared: {table.error}",
                       help="Ask for them again: POST rows/prepare/.")  # fmt: skip
    if not table.is_done():
        raise ApiError(409, "rows_not_prepared",
                       f"The rows are being prepared: {table.num_read:,} of {version.num_rows:,}.",
                       help="Ask again in a moment.")  # fmt: skip
    return table


def _asked(table: RowTable, filters: RowFilters) -> Asked:
    given = {name: value for name, value in filters.model_dump().items() if value not in ("", None)}
    form = RowsForm(given, version=table.version, columns=table.column_names())
    if not form.is_valid():
        field, errors = next(iter(form.errors.items()))
        raise ApiError(422, "invalid_filter", str(errors[0]), field=field)
    return Asked(form.cleaned_data)


@router.get(_PATH, response={200: RowPageOut, **ERRORS})
def list_rows(request: ApiRequest, dataset_id: int, number: int, filters: Query[RowPageQuery]) -> dict[str, Any]:
    """The rows that fit, by line or by length. 409 while they are being prepared for looking through them."""
    table = _table(request, dataset_id, number)
    asked = _asked(table, filters)
    page = find_rows(table, asked.filters, order=asked.order, limit=filters.limit, after=filters.after)
    return {
        "items": page.rows, "num_matches": page.num_matches, "num_rows": page.num_rows, "is_whole": page.is_whole,
        "next": page.after or None,
    }  # fmt: skip


@router.get(_PATH + "prepared/", response={200: RowTableOut, **ERRORS})
def get_row_table(request: ApiRequest, dataset_id: int, number: int) -> RowTable:
    """How far the rows are prepared; a worker is asked for it where nobody has."""
    return ask_for_rows(ready_version(request, dataset_id, number))


@router.post(_PATH + "prepare/", response={202: RowTableOut, **ERRORS}, auth=may_write)
def prepare_rows(request: ApiRequest, dataset_id: int, number: int) -> Status[RowTable]:
    """Ask once more for rows that could not be prepared."""
    table = ask_for_rows(ready_version(request, dataset_id, number))
    try:
        ask_again(table, user=request.user, token=request.token)
    except RowTableRunsError as error:
        raise ApiError(409, "not_failed", str(error), help="GET rows/prepared/ says how far they are.") from error
    table.refresh_from_db()
    return Status(202, table)


@router.get(_PATH + "{int:line}/", response={200: WholeRowOut, **ERRORS})
def get_row(request: ApiRequest, dataset_id: int, number: int, line: int, filters: Query[RowFilters]) -> dict[str, Any]:
    """The row at a line of the file; 404 where none begins there."""
    table = _table(request, dataset_id, number)
    version: DatasetVersion = table.version
    asked = _asked(table, filters)
    found = find_row(table, line, asked.filters, order=asked.order)
    if found.row is None:
        raise Http404
    return {
        **found.row,
        "problems": list(version.problems.filter(line=line).order_by("pk")),
        "findings": list(ScanFinding.objects.filter(scan__version=version, line=line).select_related("scan")),
        "previous": found.previous,
        "next": found.next,
    }

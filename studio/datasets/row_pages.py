"""Pages of a version's rows: looked through as a table or as chats, and one row with all that is known of it."""

from __future__ import annotations

from typing import Any

from django.contrib import messages
from django.http import Http404, HttpResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.urls import reverse
from django.views.decorators.http import require_GET, require_POST

from studio.accounts.access import TeamRequest, team_page
from studio.accounts.models import Role
from studio.datasets import showing
from studio.datasets.models import DatasetVersion, RowTable, ScanFinding
from studio.datasets.row_form import Asked, RowsForm
from studio.datasets.row_searching import RowSearchError, find_row, find_rows
from studio.datasets.row_tables import RowTableRunsError, ask_again, ask_for_rows
from studio.datasets.views import ask_again as ask_for_inspection
from studio.datasets.views import render_tab, version_or_404
from studio.storage import StorageError
from workers.folding import fold
from workers.rules import CATALOGUE

NUM_ROWS = {"table": 50, "chat": 20}


@team_page()
@require_GET
def version_page(request: TeamRequest, dataset_id: int, number: int) -> HttpResponse:
    """The rows that the query asks for, a page of them; while the version is inspected, how far that is.

    As long as the rows are not prepared for looking through them, the first ones are shown as chats.
    """
    version = version_or_404(request, dataset_id, number)
    if version.is_inspecting():
        ask_for_inspection(version)
    if not version.is_ready():
        return render_tab(request, version, "preview")
    table = ask_for_rows(version)
    context: dict[str, Any] = {"table": table}
    status = 200
    if table.is_done():
        shown = _shown(request, table)
        context |= shown
        status = 422 if shown["form"].errors else 200
    elif version.num_usable:
        context["examples"] = showing.preview(version)
    if request.htmx:  # type: ignore[attr-defined]
        response = render(request, "datasets/_rows.html", {"version": version, **context}, status=status)
        if "asked" in context:  # the address of what is shown, without the fields that ask for nothing
            query = context["asked"].query()
            response["HX-Push-Url"] = f"{version.get_absolute_url()}?{query}" if query else version.get_absolute_url()
        return response
    return render_tab(request, version, "preview", context, status=status)


def _shown(request: TeamRequest, table: RowTable) -> dict[str, Any]:
    """What the page of rows shows: the form, and the rows or why there are none."""
    form = RowsForm(request.GET, version=table.version, columns=table.column_names())
    if not form.is_valid():
        return {"form": form}
    asked = Asked(form.cleaned_data)
    context: dict[str, Any] = {"form": form, "asked": asked, "needle": fold(asked.text), "narrowing": asked.narrowing()}
    try:
        page = find_rows(
            table, asked.filters, order=asked.order, limit=NUM_ROWS[asked.show],
            before=request.GET.get("before", ""), after=request.GET.get("after", ""),
        )  # fmt: skip
    except RowSearchError as error:
        return {**context, "problem": f"{error.message} {error.next_step}".strip()}
    except StorageError as error:
        return {**context, "problem": error.strerror or str(error)}
    return {
        **context,
        "page": page,
        "row_query": asked.query(show=""),
        "shapes": [(value, "?" + asked.query(show=value), value == asked.show) for value in NUM_ROWS],
        "previous_url": "?" + asked.query(before=page.before) if page.before else "",
        "next_url": "?" + asked.query(after=page.after) if page.after else "",
    }


@team_page()
@require_GET
def row_table(request: TeamRequest, dataset_id: int, number: int) -> HttpResponse:
    """The fragment that shows how far the rows are prepared, and asks for itself again until that is over."""
    version = version_or_404(request, dataset_id, number)
    if not version.is_ready():
        raise Http404
    table = ask_for_rows(version)
    may_change = request.membership.may(Role.TRAINER)
    # No redirect when it is over: whoever reads the first rows, or is about to click, would lose their place.
    return render(
        request, "datasets/_row_table.html", {"version": version, "table": table, "may_change": may_change}
    )  # fmt: skip


@team_page(Role.TRAINER)
@require_POST
def prepare_again(request: TeamRequest, dataset_id: int, number: int) -> HttpResponse:
    """Ask once more for rows that could not be prepared."""
    version = version_or_404(request, dataset_id, number)
    try:
        ask_again(get_object_or_404(RowTable, version=version), user=request.user)
    except RowTableRunsError as error:
        messages.error(request, str(error))
    return redirect(version)


@team_page()
@require_GET
def row(request: TeamRequest, dataset_id: int, number: int, line: int) -> HttpResponse:
    """One row as a chat and as the file has it, its problems and findings, and the rows beside it.

    The query is that of the page that one comes from: the rows beside it are those that it found.
    """
    version = version_or_404(request, dataset_id, number)
    if not version.is_ready():
        raise Http404
    table = ask_for_rows(version)
    context: dict[str, Any] = {
        "version": version,
        "line": line,
        "table": table,
        "problems": list(version.problems.filter(line=line).order_by("pk")),
        "findings": list(ScanFinding.objects.filter(scan__version=version, line=line).select_related("scan")),
    }
    if not table.is_done():
        return render(request, "datasets/row.html", {**context, "example": showing.row(version, line)})
    return render(request, "datasets/row.html", {**context, **_one(request, version, table, line, context["problems"])})


def _one(
    request: TeamRequest, version: DatasetVersion, table: RowTable, line: int, problems: list[Any]
) -> dict[str, Any]:  # fmt: skip
    form = RowsForm(request.GET, version=version, columns=table.column_names())
    # An address that was written by hand, or whose filter is gone, still names its row.
    asked = Asked(form.cleaned_data if form.is_valid() else RowsForm.nothing())
    query = asked.query(show="")
    context: dict[str, Any] = {"needle": fold(asked.text), "narrowing": asked.narrowing()}
    try:
        found = find_row(table, line, asked.filters, order=asked.order)
    except RowSearchError as error:
        return {**context, "problem": f"{error.message} {error.next_step}".strip()}
    except StorageError as error:
        return {**context, "problem": error.strerror or str(error)}

    def link(other: int | None) -> str:
        url = reverse("datasets:row", args=[version.dataset_id, version.number, other]) if other else ""
        return f"{url}?{query}" if url and query else url

    known = {problem.rule for problem in problems}
    return {
        **context,
        "row": found.row,
        "example": found.row["example"] if found.row else None,
        # Problems beyond those that are kept with their sentences.
        "more_rules": [CATALOGUE[rule] for rule in (found.row or {}).get("rules", []) if rule not in known],
        "previous_url": link(found.previous),
        "next_url": link(found.next),
        "back_query": query,
        "is_as_in_the_file": version.carrier.partition(".")[0] == "jsonl",
    }

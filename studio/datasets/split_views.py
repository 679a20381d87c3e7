"""Pages of a version's splits: all of them with the form that makes one, one of them, and its files."""

from __future__ import annotations

from typing import Any, get_args

from django.contrib import messages
from django.http import Http404, HttpResponse, StreamingHttpResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.views.decorators.http import require_GET, require_POST

from studio.accounts.access import TeamRequest, refuse, team_page
from studio.accounts.models import Role
from studio.datasets.models import DatasetSplit, DatasetVersion
from studio.datasets.split_files import file_response, part_response
from studio.datasets.split_form import METHODS, TOGETHER, SplitForm
from studio.datasets.splitting import SplitRefusedError, ask_split, delete_split, jobs_of, make_default
from studio.datasets.views import render_tab, version_or_404
from workers.splits.asked import PARTS, Part
from workers.splits.exporting import Kind

MAX_SHOWN = 100
"""Values of a column, and pairs of near duplicates, that a page shows."""
PART_NOTES = {
    "train": "what the adapter learns from",
    "validation": "what early stopping and the best step choose on",
    "test": "what the scores are of",
}


@team_page()
def splits(request: TeamRequest, dataset_id: int, number: int) -> HttpResponse:
    """The splits of a version, and the form that asks for one; the list asks for itself again until all are over."""
    version = version_or_404(request, dataset_id, number)
    if request.method == "POST" and not request.membership.may(Role.TRAINER):
        return refuse(request, Role.TRAINER)
    form = SplitForm(
        request.POST if request.method == "POST" else None, column_names=version.column_names, label_suffix=""
    )  # fmt: skip
    if form.is_bound and form.is_valid():
        try:
            split = ask_split(version, form.request(), name=form.cleaned_data["name"].strip(), user=request.user)
        except SplitRefusedError as error:
            form.add_error(error.field if error.field in form.fields else None, f"{error} {error.next_step}".strip())
        else:
            return redirect(split)
    shown = list(version.splits.select_related("created_by").defer("report").order_by("-is_default", "-pk"))
    for one in shown:
        one.version = version
    context = {"splits": shown, "is_over": all(one.is_over() for one in shown), "form": form}
    if request.htmx:  # type: ignore[attr-defined]
        return render(request, "datasets/_splits.html", {"version": version, **context})
    return render_tab(request, version, "splits", context, status=422 if form.is_bound else 200)


def _split(version: DatasetVersion, split_id: int) -> DatasetSplit:
    split: DatasetSplit = get_object_or_404(version.splits.select_related("created_by"), pk=split_id)
    split.version = version
    return split


@team_page()
@require_GET
def split(request: TeamRequest, dataset_id: int, number: int, split_id: int) -> HttpResponse:
    """What stands in each part of a split, how much that can say, and what was kept together."""
    version = version_or_404(request, dataset_id, number)
    shown = _split(version, split_id)
    report: dict[str, Any] = shown.report
    context = {
        "split": shown,
        "parts": _parts(shown),
        "asked": _asked(shown.asked),
        "report": report,
        "column": shown.asked["stratify_column"] or shown.asked["part_column"],
        "strata": report.get("strata", [])[:MAX_SHOWN],
        "num_more_strata": max(0, len(report.get("strata", [])) - MAX_SHOWN),
        "pairs": report.get("pairs", [])[:MAX_SHOWN],
        "jobs": jobs_of(shown),
    }
    if request.htmx:  # type: ignore[attr-defined]
        answer = render(request, "datasets/_split_progress.html", {"version": version, **context})
        if shown.is_over():
            answer["HX-Refresh"] = "true"
        return answer
    return render_tab(request, version, "split", context)


def _parts(split: DatasetSplit) -> list[dict[str, Any]]:
    """Each part with its rows and what a share measured on them would say."""
    if not split.is_done():
        return []
    return [
        {
            "name": part, "note": PART_NOTES[part], "num": getattr(split, f"num_{part}"),
            "is_measured": part != "train", **split.report["parts"][part],
        }
        for part in PARTS
    ]  # fmt: skip


def _asked(asked: dict[str, Any]) -> list[tuple[str, str]]:
    """What was asked for, in the words of the form."""
    rows = [("Divided", dict(METHODS)[asked["method"]].lower())]
    if asked["method"] == "column":
        rows.append(("Column of parts", asked["part_column"]))
    else:
        shown = [
            f"{part} {f'{100 * size:g} %' if asked['method'] == 'share' else f'{size:,.0f}'}"
            for part in PARTS
            if (size := asked[part]) is not None
        ]
        rows.append(("Sizes", ", ".join(shown if asked["train"] is not None else ["train the rest", *shown])))
    for name, label in (("group_column", "Grouped by"), ("stratify_column", "Stratified by")):
        if asked[name]:
            rows.append((label, asked[name]))
    rows.append(("Kept together", dict(TOGETHER)[asked["keep_together"]].lower()))
    if asked["method"] != "column":
        rows.append(("Seed", str(asked["seed"])))
    return rows


@team_page()
@require_GET
def split_part(
    request: TeamRequest, dataset_id: int, number: int, split_id: int, part: Part, kind: Kind
) -> StreamingHttpResponse:
    """The rows of a part, to download."""
    shown = _done(request, dataset_id, number, split_id)
    if part not in PARTS or kind not in get_args(Kind):
        raise Http404
    return part_response(request, shown, part, kind, user=request.user)


@team_page()
@require_GET
def split_file(request: TeamRequest, dataset_id: int, number: int, split_id: int) -> StreamingHttpResponse:
    """The frozen file, for a training by hand."""
    return file_response(request, _done(request, dataset_id, number, split_id), user=request.user)


def _done(request: TeamRequest, dataset_id: int, number: int, split_id: int) -> DatasetSplit:
    found = _split(version_or_404(request, dataset_id, number), split_id)
    if not found.is_done():
        raise Http404
    return found


@team_page(Role.TRAINER)
@require_POST
def split_default(request: TeamRequest, dataset_id: int, number: int, split_id: int) -> HttpResponse:
    """Have new jobs begin with this split; with off=1, with the plain held-out share."""
    version = version_or_404(request, dataset_id, number)
    chosen = _split(version, split_id)
    try:
        make_default(None if request.POST.get("off") else chosen, version, user=request.user)
    except SplitRefusedError as error:
        messages.error(request, f"{error} {error.next_step}".strip())
    return redirect(chosen)


@team_page(Role.TRAINER)
@require_POST
def split_delete(request: TeamRequest, dataset_id: int, number: int, split_id: int) -> HttpResponse:
    """Delete a split that nothing was made with."""
    version = version_or_404(request, dataset_id, number)
    chosen = _split(version, split_id)
    try:
        delete_split(chosen, user=request.user)
    except SplitRefusedError as error:
        messages.error(request, str(error))
        return redirect(chosen)
    messages.success(request, f"The split “{chosen.name}” is deleted.")
    return redirect("datasets:splits", dataset_id, number)

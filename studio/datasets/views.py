"""Dataset pages: list, upload, one version with its tabs, the mapping form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from urllib.parse import urlencode

from django.contrib import messages
from django.core.paginator import Paginator
from django.db import transaction
from django.db.models import Count, OuterRef, ProtectedError, Q, QuerySet, Subquery
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseBase, StreamingHttpResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.utils import timezone
from django.utils.http import content_disposition_header
from django.views.decorators.csrf import csrf_exempt, csrf_protect
from django.views.decorators.http import require_GET, require_POST

from studio.accounts.access import TeamRequest, team_page
from studio.accounts.models import Role, record
from studio.csv_tables import csv_response
from studio.datasets import exporting, showing
from studio.datasets.adding_views import adding_context, chosen_dataset, explain_in
from studio.datasets.changes import changes_of
from studio.datasets.forms import LicenceForm, MappingForm, UploadForm
from studio.datasets.inspecting import queue_inspection, waiting_versions
from studio.datasets.licensing import set_licence
from studio.datasets.models import Dataset, DatasetVersion, VersionState
from studio.datasets.removing import DatasetInUseError, delete_dataset
from studio.datasets.repairing import NothingToRepairError, is_running, queue_repair
from studio.datasets.scanning import languages_of
from studio.datasets.upload_handlers import SpoolingUploadHandler
from studio.datasets.uploads import receive_upload
from studio.query_values import whole_number
from studio.storage import DiskFullError, StorageError, TooLargeError
from studio.streaming import file_chunks, stream
from workers.errors import DatasetError
from workers.licences import choices as licence_choices
from workers.rules import RULES

PAGE_SIZE = 50


@team_page()
@require_GET
def dataset_list(request: TeamRequest) -> HttpResponse:
    """Every dataset of the team with its newest version, the newest first."""
    shown = DatasetVersion.objects.filter(dataset__team=request.team).select_related("dataset")
    newest = shown.order_by("dataset_id", "-number").distinct("dataset_id").values("pk")
    rows = shown.filter(pk__in=newest).annotate(num_jobs=Count("jobs")).order_by("-created_at", "-pk")
    page = Paginator(rows, PAGE_SIZE).get_page(request.GET.get("page"))
    return render(request, "datasets/dataset_list.html", {"page": page, **page_links(request, page)})


def page_links(request: HttpRequest, page: Any) -> dict[str, str]:
    """Addresses of the pages before and after one of a Paginator, and what stands between them."""

    def link(number: int) -> str:
        return "?" + urlencode({**request.GET.dict(), "page": number})

    first, last = page.start_index(), page.end_index()
    return {
        "previous_url": link(page.previous_page_number()) if page.has_previous() else "",
        "next_url": link(page.next_page_number()) if page.has_next() else "",
        "shown": f"{first:,} to {last:,} of {page.paginator.count:,}",
    }


def _spooling(view: Callable[..., HttpResponseBase]) -> Callable[..., HttpResponseBase]:
    """A view whose file is spooled by our own handler, which must be chosen before the form's token is read."""
    protected = csrf_protect(view)

    def chosen(request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponseBase:
        request.upload_handlers = [SpoolingUploadHandler(request)]
        return protected(request, *args, **kwargs)

    chosen.required_role = view.required_role  # type: ignore[attr-defined]  # read by the access tests
    return csrf_exempt(chosen)


@_spooling
@team_page(Role.TRAINER)
def upload(request: TeamRequest) -> HttpResponse:
    """A form with a file; works without a script. A refusal shows the same form with the sentence, as a 422."""
    dataset = chosen_dataset(request)
    context = adding_context(request, dataset) | {"way": "file"}
    if request.method != "POST":
        return render(request, "datasets/upload.html", {**context, "form": UploadForm()})
    form = UploadForm(request.POST, request.FILES)
    handler = next((one for one in request.upload_handlers if isinstance(one, SpoolingUploadHandler)), None)
    status = 422
    if handler is not None and handler.error is not None:
        form.errors.clear()
        form.add_error("file", handler.error.strerror or str(handler.error))
        status = _status_of(handler.error)
    elif form.is_valid():
        file = form.cleaned_data["file"]
        try:
            version = receive_upload(
                team=request.team, user=request.user, file_name=file.name, chunks=file.chunks(1024**2),
                dataset=dataset, name=form.cleaned_data["name"], licence=form.cleaned_data["licence"],
            )  # fmt: skip
        except DatasetError as error:
            explain_in(form, error, "file")
        except StorageError as error:
            form.add_error("file", error.strerror or str(error))
            status = _status_of(error)
        else:
            if version.already_stored:
                messages.info(request, f"This very file is stored already, as {version}. Nothing was uploaded twice.")
            return redirect(version)
    return render(request, "datasets/upload.html", {**context, "form": form}, status=status)


def _status_of(error: OSError) -> int:
    if isinstance(error, TooLargeError):
        return 413
    return 507 if isinstance(error, DiskFullError) else 422


def version_or_404(request: TeamRequest, dataset_id: int, number: int) -> DatasetVersion:
    """A version of the team's datasets, with how many its dataset has."""
    siblings = DatasetVersion.objects.filter(dataset=OuterRef("dataset")).values("dataset").annotate(num=Count("pk"))
    versions = DatasetVersion.objects.filter(dataset__team=request.team).select_related(
        "dataset", "created_by", "row_table"
    )
    versions = versions.annotate(num_versions=Subquery(siblings.values("num")))
    return get_object_or_404(versions, dataset_id=dataset_id, number=number)


def render_tab(
    request: TeamRequest, version: DatasetVersion, tab: str, context: dict[str, Any] | None = None, status: int = 200
) -> HttpResponse:
    """A tab of a version's page."""
    base = {
        "version": version,
        "dataset": version.dataset,
        "tab": tab,
        "num_versions": version.num_versions,  # type: ignore[attr-defined]  # annotated by version_or_404
        "may_change": request.membership.may(Role.TRAINER),
        "licence_form": LicenceForm(initial={"licence": version.dataset.licence or "unknown"}),
        "licence_label": dict(licence_choices()).get(version.dataset.licence, version.dataset.licence or "not known"),
    }
    return render(request, f"datasets/version_{tab}.html", {**base, **(context or {})}, status=status)


@team_page()
@require_GET
def detail(request: TeamRequest, dataset_id: int) -> HttpResponse:
    """The newest version's page."""
    dataset = get_object_or_404(request.team.datasets, pk=dataset_id)
    return redirect(dataset.versions.order_by("-number")[0])


def ask_again(version: DatasetVersion) -> None:
    """A message that was lost, or a worker that died: whoever looks at the page asks again."""
    if waiting_versions().filter(pk=version.pk).exists():
        queue_inspection(version.pk)


@team_page()
@require_GET
def inspection(request: TeamRequest, dataset_id: int, number: int) -> HttpResponse:
    """The fragment that shows an inspection's stages, and asks for itself again until it is over."""
    version = version_or_404(request, dataset_id, number)
    if version.is_inspecting():
        ask_again(version)
    response = render(request, "datasets/_inspection.html", {"version": version})
    if not version.is_inspecting():
        response["HX-Redirect"] = version.get_absolute_url()
    return response


@team_page()
@require_GET
def statistics(request: TeamRequest, dataset_id: int, number: int) -> HttpResponse:
    """Lengths of the rows in tokens per base model and in characters, of the answers, turns and roles."""
    version = version_or_404(request, dataset_id, number)
    tokens = []
    for base in showing.base_models():
        found = version.tokens_of(base.revision)
        tokens.append(
            {"base": base, "found": found, "histogram": showing.histogram(found, "tokens") if found else None}
        )
    found = version.statistics
    return render_tab(
        request, version, "statistics",
        {
            "tokens": tokens,
            "characters": showing.histogram(found.get("characters", {}), "characters"),
            "answers": showing.histogram(found.get("answers", {}), "characters", "answers"),
            "turns": showing.turns(found),
            "roles": showing.roles(found),
            "languages": showing.language_bars(languages_of(version)),
        },
    )  # fmt: skip


@team_page()
@require_GET
def problems(request: TeamRequest, dataset_id: int, number: int) -> HttpResponse:
    """Every problem with its line, grouped by rule."""
    version = version_or_404(request, dataset_id, number)
    rule = request.GET.get("rule", "")
    rows = version.problems.order_by("line", "pk")
    chosen = Q(rule=rule) if rule in version.problem_counts else Q()
    num_stored, num_chosen = version.problems.aggregate(
        stored=Count("pk"), chosen=Count("pk", filter=chosen) if chosen else Count("pk")
    ).values()
    paginator = Paginator(rows.filter(chosen), PAGE_SIZE)
    paginator.count = num_chosen  # counted already
    page = paginator.get_page(request.GET.get("page"))
    return render_tab(
        request, version, "problems",
        {"page": page, "groups": showing.problem_groups(version), "rule": rule,
         "num_not_stored": max(0, version.num_problems() - num_stored), "num_stored": num_stored,
         "is_repairing": is_running(version),
         **page_links(request, page)},
    )  # fmt: skip


@team_page()
@require_GET
def problems_csv(request: TeamRequest, dataset_id: int, number: int) -> StreamingHttpResponse:
    """The stored problems as a table."""
    version = version_or_404(request, dataset_id, number)
    columns = ("file", "line", "turn", "field", "level", "rule", "title", "message", "fix", "excerpt")
    rows = (
        (version.file_name, problem.line, problem.turn, problem.field, problem.level, problem.rule,
         RULES.get(problem.rule, ""), problem.message, problem.fix, problem.excerpt)
        for problem in version.problems.order_by("line", "pk").iterator(chunk_size=1000)
    )  # fmt: skip
    return csv_response(request, f"problems-{version.dataset_id}-v{version.number}.csv", columns, rows)


@team_page(Role.TRAINER)
@require_POST
def repair(request: TeamRequest, dataset_id: int, number: int) -> HttpResponse:
    """Ask for a corrected version: what has a plain remedy is remedied, and becomes the dataset's next version."""
    version = version_or_404(request, dataset_id, number)
    try:
        queue_repair(version, user=request.user)
    except NothingToRepairError as error:
        messages.error(request, str(error))
    else:
        messages.success(request, "A corrected version is being made. It will stand among this dataset's versions.")
    return redirect("datasets:problems", dataset_id, number)


@team_page()
@require_GET
def corrections(request: TeamRequest, dataset_id: int, number: int) -> HttpResponse:
    """What was changed in a corrected version, row by row: before and after."""
    version = version_or_404(request, dataset_id, number)
    if "changes" not in version.correction:
        raise Http404
    counts = sorted(version.correction["counts"].items(), key=lambda item: (-item[1], item[0]))
    return render_tab(
        request, version, "corrections",
        {"counts": [(code, RULES.get(code, code), num) for code, num in counts],
         "num_not_shown": version.correction["num_changed"] - len(version.correction["changes"])},
    )  # fmt: skip


@team_page()
@require_GET
def versions(request: TeamRequest, dataset_id: int, number: int) -> HttpResponse:
    """Every version of the dataset."""
    version = version_or_404(request, dataset_id, number)
    return render_tab(
        request,
        version,
        "versions",
        {"versions": version.dataset.versions.select_related("created_by").order_by("-number")},
    )


@team_page()
@require_GET
def changes(request: TeamRequest, dataset_id: int, number: int) -> HttpResponse:
    """Which rows were added, removed and edited since the version before; the fragment asks until that is known."""
    version = version_or_404(request, dataset_id, number)
    found = changes_of(version)
    if request.htmx:  # type: ignore[attr-defined]
        return render(request, "datasets/_changes.html", {"version": version, "changes": found})
    return render_tab(request, version, "changes", {"changes": found})


@team_page()
@require_GET
def used_by(request: TeamRequest, dataset_id: int, number: int) -> HttpResponse:
    """Jobs and adapters that use the version."""
    version = version_or_404(request, dataset_id, number)
    # "jobs" and "adapters" are the reverse sides of relations that belong to apps above this one, and so are those of
    # what has the version as a further dataset of a mixture.
    every_job = version.jobs.model.objects.filter(
        Q(dataset_version=version) | Q(pk__in=version.job_mixes.values("job"))
    )
    every_adapter = version.adapters.model.objects.filter(
        Q(dataset_version=version) | Q(pk__in=version.adapter_mixes.values("adapter"))
    )
    jobs = every_job.only("name", "state", "dataset_version").order_by("-created_at", "pk")
    adapters = every_adapter.only("name", "dataset_version").order_by("-created_at", "-pk")
    return render_tab(
        request,
        version,
        "used_by",
        {"jobs": _part_of(request, jobs, "jobs"), "adapters": _part_of(request, adapters, "adapters")},
    )


def _part_of(request: HttpRequest, rows: QuerySet[Any], parameter: str) -> dict[str, Any]:
    """The rows of the page that a parameter of the URL names, and the addresses of those before and after."""
    number = max(1, whole_number(request.GET.get(parameter, "")) or 1)
    found = list(rows[(number - 1) * PAGE_SIZE : number * PAGE_SIZE + 1])

    def link(other: int) -> str:
        return "?" + urlencode({**request.GET.dict(), parameter: other})

    return {
        "rows": found[:PAGE_SIZE],
        "previous_url": link(number - 1) if number > 1 else "",
        "next_url": link(number + 1) if len(found) > PAGE_SIZE else "",
    }


@team_page()
@require_GET
def file(request: TeamRequest, dataset_id: int, number: int) -> StreamingHttpResponse:
    """The file as it was uploaded."""
    version = version_or_404(request, dataset_id, number)
    content = version.path().open("rb")
    record("dataset.downloaded", team=request.team, user=request.user, target=version)
    response = stream(
        request, file_chunks(content), content_type="application/octet-stream", num_bytes=version.num_bytes
    )
    response["Content-Disposition"] = content_disposition_header(True, version.file_name) or "attachment"
    return response


@team_page()
@require_GET
def export(request: TeamRequest, dataset_id: int, number: int) -> HttpResponseBase:
    """The rows as a folder that `datasets.load_dataset` reads, zipped; `kind` says in which kind of file."""
    version = version_or_404(request, dataset_id, number)
    if not version.is_ready():
        messages.error(request, f"{version} is {version.get_state_display().lower()}: there are no rows to export yet.")
        return redirect(version)
    kind: exporting.Kind = "jsonl" if request.GET.get("kind") == "jsonl" else "parquet"
    return exporting.response(request, version, kind, user=request.user)


@team_page(Role.TRAINER)
def mapping(request: TeamRequest, dataset_id: int, number: int) -> HttpResponse:
    """Which column asks and which answers, with the first five rows as that choice reads them.

    "show" re-renders the rows; "use" stores the choice and starts the inspection again.
    """
    version = version_or_404(request, dataset_id, number)
    if version.is_inspecting():
        return redirect(version)
    if not version.column_names:
        messages.error(request, "This file has no columns that could be chosen.")
        return redirect(version)
    in_use = f"{version} is used by jobs, so it stays as it is. Upload the file as a new dataset."
    if version.users():
        messages.error(request, in_use)
        return redirect(version)
    form = MappingForm(request.POST or None, column_names=version.column_names, initial=version.columns)
    columns = version.columns
    if request.method == "POST":
        columns = form.columns() if form.is_valid() else {}
        if form.is_valid() and request.POST.get("action") == "use":
            if remap(version, columns):
                record("dataset.mapped", team=request.team, user=request.user, target=version, columns=columns)
            else:
                messages.error(request, in_use)
            return redirect(version)
    rows = showing.mapped_rows(version, columns) if columns else []
    context = {
        "version": version, "dataset": version.dataset, "form": form, "rows": rows,
        "num_splits": version.splits.count(),
    }  # fmt: skip
    if request.htmx:  # type: ignore[attr-defined]
        return render(request, "datasets/_mapped_rows.html", context)
    status = 422 if form.is_bound and not form.is_valid() else 200
    return render(request, "datasets/mapping.html", context, status=status)


def remap(version: DatasetVersion, columns: dict[str, str]) -> bool:
    """Store chosen columns and inspect the version again; False when a job has begun to use it meanwhile."""
    with transaction.atomic():
        # The lock that queueing a job takes: one of the two comes first, and the other sees it.
        DatasetVersion.objects.select_for_update(no_key=True).filter(pk=version.pk).values_list("pk").first()
        if version.users():
            return False
        DatasetVersion.objects.filter(pk=version.pk).exclude(state=VersionState.INSPECTING).update(
            state=VersionState.INSPECTING, format="mapped", columns=columns, heartbeat_at=None, statistics={},
            error="", error_next_step="", queued_at=timezone.now(),
        )  # fmt: skip
        transaction.on_commit(lambda: queue_inspection(version.pk))
    return True


@team_page(Role.TRAINER)
@require_POST
def change_licence(request: TeamRequest, dataset_id: int) -> HttpResponse:
    """Say under which licence the rows came."""
    dataset: Dataset = get_object_or_404(request.team.datasets, pk=dataset_id)
    form = LicenceForm(request.POST)
    if form.is_valid():
        set_licence(dataset, form.cleaned_data["licence"], user=request.user)
        messages.success(request, f"The licence of {dataset.name} is saved.")
    else:
        messages.error(request, "There is no such licence. Choose one of the list.")
    return redirect("datasets:detail", dataset.pk)


@team_page(Role.TRAINER)
@require_POST
def delete(request: TeamRequest, dataset_id: int) -> HttpResponse:
    """Delete a dataset with its versions, unless something uses one of them."""
    dataset: Dataset = get_object_or_404(request.team.datasets, pk=dataset_id)
    try:
        delete_dataset(dataset, user=request.user)
    except (DatasetInUseError, ProtectedError) as error:
        users = error.users if isinstance(error, DatasetInUseError) else list(error.protected_objects)
        return render(request, "datasets/in_use.html", {"dataset": dataset, "users": users}, status=409)
    messages.success(request, f"{dataset.name} is deleted.")
    return redirect("datasets:list")

"""Uploads in pieces for the pages: tus 1.0 at /datasets/uploads/, and the page that says what became of one."""

from __future__ import annotations

from collections.abc import Callable
from uuid import UUID

from django.contrib import messages
from django.http import HttpRequest, HttpResponse, HttpResponseBase, HttpResponseNotAllowed
from django.shortcuts import get_object_or_404, redirect, render
from django.urls import reverse
from django.views.decorators.http import require_GET, require_POST

from studio.accounts.access import TeamRequest, team_page
from studio.accounts.models import Role
from studio.api.errors import ErrorDetail, error_response
from studio.datasets import tus
from studio.datasets.forms import TargetForm
from studio.datasets.models import Upload
from studio.datasets.resumable import cancel_upload, change_target, has_expired, settle
from studio.storage import StorageError
from workers.errors import DatasetError


def _protocol(view: Callable[..., HttpResponseBase]) -> Callable[..., HttpResponseBase]:
    """A view whose caller may be a script: it gets statuses and sentences where a person gets the login page."""

    def answered(request: HttpRequest, *args: object, **kwargs: object) -> HttpResponseBase:
        if "Tus-Resumable" in request.headers and not request.user.is_authenticated:
            detail = ErrorDetail(
                code="signed_out", message="Your session has ended.",
                help="Sign in again and choose the same file: the upload goes on where it was.",
            )  # fmt: skip
            return error_response(401, [detail])
        try:
            return view(request, *args, **kwargs)
        except Exception as error:
            if request.method in {"GET", "HEAD"} and "Tus-Resumable" not in request.headers:
                raise
            status, detail, headers = tus.refusal_of(error)
            return error_response(status, [detail], headers)

    answered.required_role = view.required_role  # type: ignore[attr-defined]  # read by the access tests
    return answered


@_protocol
@team_page(Role.TRAINER)
def uploads(request: TeamRequest) -> HttpResponse:
    """Begin an upload; what there is already stands on the page with the form."""
    match request.method:
        case "POST":
            return tus.create(request, Upload.get_absolute_url)
        case "OPTIONS":
            return tus.options(request)
        case "GET":
            return redirect("datasets:upload")
    return HttpResponseNotAllowed(["GET", "POST", "OPTIONS"])


@_protocol
@team_page(Role.TRAINER)
def upload_item(request: TeamRequest, upload_id: UUID) -> HttpResponse:
    """An upload: its protocol, and for people the page that says what became of it."""
    match request.method:
        case "PATCH":
            return tus.patch(request, upload_id)
        case "DELETE":
            return tus.delete(request, upload_id)
        case "OPTIONS":
            return tus.options(request)
        case "HEAD":
            return tus.head(request, upload_id)
        case "GET":
            return _show(request, _upload(request, upload_id))
    return HttpResponseNotAllowed(["GET", "HEAD", "PATCH", "DELETE", "OPTIONS"])


def _upload(request: TeamRequest, upload_id: UUID) -> Upload:
    uploads = request.team.uploads.select_related("team", "created_by", "dataset", "version__dataset")
    upload: Upload = get_object_or_404(uploads, pk=upload_id)
    return upload


def _show(request: TeamRequest, upload: Upload, form: TargetForm | None = None) -> HttpResponse:
    """Where an upload has led: its version's page, or why it is none."""
    problem = ""
    try:
        settle(upload)
    except StorageError as error:
        problem = error.strerror or str(error)
    if upload.version is not None:
        if upload.was_stored:
            text = f"This very file is stored already, as {upload.version}. Nothing was stored twice."
            messages.info(request, text)
        return redirect(upload.version)
    if form is None:
        form = TargetForm(initial={"name": upload.name, "licence": upload.licence or "unknown"})
    context = {"upload": upload, "form": form, "problem": problem, "has_expired": has_expired(upload)}
    return render(request, "datasets/upload_item.html", context, status=422 if form.is_bound else 200)


@team_page(Role.TRAINER)
@require_GET
def upload_progress(request: TeamRequest, upload_id: UUID) -> HttpResponse:
    """The fragment that shows how far a worker is with a file, and asks for itself again until it is over."""
    upload = _upload(request, upload_id)
    response = render(request, "datasets/_upload_progress.html", {"upload": upload})
    if not upload.is_receiving():
        response["HX-Redirect"] = upload.get_absolute_url()
    return response


@team_page(Role.TRAINER)
@require_POST
def upload_target(request: TeamRequest, upload_id: UUID) -> HttpResponse:
    """What the new dataset is to be called: for an upload that goes on, or one whose name was taken."""
    upload = _upload(request, upload_id)
    form = TargetForm(request.POST)
    if upload.is_receiving() and form.is_valid():
        try:
            change_target(upload, name=form.cleaned_data["name"], licence=form.cleaned_data["licence"])
        except DatasetError as error:
            form.add_error(error.field, f"{error.message} {error.next_step}".strip())
        except StorageError:
            pass  # it is complete and safe: the page that follows tries again, and says what is the matter
    if upload.is_receiving() and form.errors:
        return _show(request, upload, form)
    return redirect(upload)


@team_page(Role.TRAINER)
@require_POST
def upload_cancel(request: TeamRequest, upload_id: UUID) -> HttpResponse:
    """Throw an upload away, without a script."""
    upload = _upload(request, upload_id)
    cancel_upload(upload)
    messages.success(request, f"The upload of {upload.file_name} is cancelled.")
    return redirect(f"{reverse('datasets:upload')}{f'?dataset={upload.dataset_id}' if upload.dataset_id else ''}")

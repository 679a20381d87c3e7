"""Other ways in than a file of the person's computer: pasted rows, files of the server, datasets of the Hub."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from django.conf import settings
from django.contrib import messages
from django.forms import Form
from django.http import Http404, HttpResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.urls import reverse

from studio.accounts.access import TeamRequest, team_page
from studio.accounts.models import Role
from studio.datasets.fetching import start_folder_import, start_hub_import
from studio.datasets.folders import MAX_OFFERED, offered_files, roots
from studio.datasets.forms import FolderForm, HubForm, PasteForm
from studio.datasets.models import Dataset, Upload
from studio.datasets.resumable import MAX_UNFINISHED, TooManyUploadsError, unfinished_uploads
from studio.datasets.uploads import receive_pasted
from studio.query_values import whole_number
from studio.storage import StorageError
from workers.errors import DatasetError

WAYS = (("file", "File", "upload"), ("paste", "Paste rows", "paste"), ("hub", "Hugging Face Hub", "hub"))
SERVER_WAY = ("folder", "Server folder", "folder")


def chosen_dataset(request: TeamRequest) -> Dataset | None:
    """The dataset that gets a new version, which the form or the URL names; None for a new dataset."""
    chosen = request.POST.get("dataset") or request.GET.get("dataset")
    return get_object_or_404(request.team.datasets, pk=whole_number(chosen) or 0) if chosen else None


def adding_context(request: TeamRequest, dataset: Dataset | None) -> dict[str, Any]:
    """What every page of this kind shows beside its form."""
    is_offered = bool(settings.DATASET_ROOTS) and request.membership.may(Role.ADMIN)
    ways = (*WAYS, SERVER_WAY) if is_offered else WAYS
    return {
        "dataset": dataset,
        "max_bytes": settings.MAX_UPLOAD_BYTES,
        "unfinished": unfinished_uploads(request.team),
        "ways": [{"name": name, "label": label, "url": reverse(f"datasets:{url}")} for name, label, url in ways],
    }


def explain_in(form: Form, error: DatasetError, otherwise: str) -> None:
    """Put what is wrong beside the field that it is about, or beside `otherwise`."""
    field = error.field if error.field in form.fields else otherwise
    form.add_error(field, f"{error.message} {error.next_step}".strip())


@team_page(Role.TRAINER)
def paste(request: TeamRequest) -> HttpResponse:
    """Rows as text. A refusal shows the same form with the sentence and everything that was typed, as a 422."""
    dataset = chosen_dataset(request)
    form = PasteForm(request.POST if request.method == "POST" else None)
    if form.is_valid():
        try:
            version = receive_pasted(
                form.cleaned_data["rows"], team=request.team, user=request.user, dataset=dataset,
                name=form.cleaned_data["name"], licence=form.cleaned_data["licence"],
            )  # fmt: skip
        except DatasetError as error:
            explain_in(form, error, "rows")
        except StorageError as error:
            form.add_error("rows", error.strerror or str(error))
        else:
            if version.already_stored:
                messages.info(request, f"These very rows are stored already, as {version}. Nothing was stored twice.")
            return redirect(version)
    context = {**adding_context(request, dataset), "form": form, "way": "paste"}
    return render(request, "datasets/paste.html", context, status=422 if form.is_bound else 200)


def _started(form: Form, field: str, start: Callable[[], Upload]) -> Upload | None:
    """The upload that a valid form starts; None when it is not valid or refused, which it says then itself."""
    if not form.is_valid():
        return None
    try:
        return start()
    except DatasetError as error:
        explain_in(form, error, field)
    except StorageError as error:
        form.add_error(None, error.strerror or str(error))
    except TooManyUploadsError:
        form.add_error(None, f"{MAX_UNFINISHED} uploads of the team are not finished: finish or cancel one.")
    return None


@team_page(Role.TRAINER)
def hub(request: TeamRequest) -> HttpResponse:
    """A dataset of the Hub by its name; a worker fetches it, and its page says how far that is."""
    dataset = chosen_dataset(request)
    form = HubForm(request.POST if request.method == "POST" else None)
    upload = _started(form, "hub_id", lambda: start_hub_import(
        team=request.team, user=request.user, dataset=dataset, **form.cleaned_data
    ))  # fmt: skip
    if upload is not None:
        return redirect(upload)
    context = {**adding_context(request, dataset), "form": form, "way": "hub"}
    return render(request, "datasets/hub.html", context, status=422 if form.is_bound else 200)


@team_page(Role.ADMIN)
def folder(request: TeamRequest) -> HttpResponse:
    """Files of the server's folders; the chosen one is fetched by a worker, and its page says how far that is."""
    if not settings.DATASET_ROOTS:
        raise Http404
    dataset = chosen_dataset(request)
    form = FolderForm(request.POST if request.method == "POST" else None)
    upload = _started(form, "path", lambda: start_folder_import(
        team=request.team, user=request.user, dataset=dataset, **form.cleaned_data
    ))  # fmt: skip
    if upload is not None:
        return redirect(upload)
    files, has_more = offered_files()
    context = {**adding_context(request, dataset), "form": form, "way": "folder", "files": files, "has_more": has_more,
               "max_offered": MAX_OFFERED, "roots": roots()}  # fmt: skip
    return render(request, "datasets/folder.html", context, status=422 if form.is_bound else 200)

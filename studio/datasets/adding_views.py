"""Other ways in than a file of the person's computer: rows that are pasted."""

from __future__ import annotations

from typing import Any

from django.conf import settings
from django.contrib import messages
from django.forms import Form
from django.http import HttpResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.urls import reverse

from studio.accounts.access import TeamRequest, team_page
from studio.accounts.models import Role
from studio.datasets.forms import PasteForm
from studio.datasets.models import Dataset
from studio.datasets.resumable import unfinished_uploads
from studio.datasets.uploads import receive_pasted
from studio.query_values import whole_number
from studio.storage import StorageError
from workers.errors import DatasetError

WAYS = (("file", "File", "upload"), ("paste", "Paste rows", "paste"))


def chosen_dataset(request: TeamRequest) -> Dataset | None:
    """The dataset that gets a new version, which the form or the URL names; None for a new dataset."""
    chosen = request.POST.get("dataset") or request.GET.get("dataset")
    return get_object_or_404(request.team.datasets, pk=whole_number(chosen) or 0) if chosen else None


def adding_context(request: TeamRequest, dataset: Dataset | None) -> dict[str, Any]:
    """What every page of this kind shows beside its form."""
    return {
        "dataset": dataset,
        "max_bytes": settings.MAX_UPLOAD_BYTES,
        "unfinished": unfinished_uploads(request.team),
        "ways": [{"name": name, "label": label, "url": reverse(f"datasets:{url}")} for name, label, url in WAYS],
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

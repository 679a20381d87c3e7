"""The card of a dataset: as a tab of a version's page, and in a form."""

from __future__ import annotations

from django.contrib import messages
from django.http import HttpResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_GET, require_http_methods

from studio.accounts.access import TeamRequest, team_page
from studio.accounts.models import Role
from studio.cards import MAX_CHARACTERS, CardConflictError, card_version, edits_of
from studio.datasets import exporting
from studio.datasets.card import EDITED, cleaned, edit_card, read_card
from studio.datasets.models import Dataset
from studio.datasets.views import render_tab, version_or_404
from studio.markdown import render_markdown
from workers.errors import ExplainedError


@team_page()
@require_GET
def card(request: TeamRequest, dataset_id: int, number: int) -> HttpResponse:
    """What people wrote about the dataset, and the front matter that goes before it in an export."""
    version = version_or_404(request, dataset_id, number)
    front = exporting.front_matter(version, "parquet") if version.is_ready() else ""
    return render_tab(request, version, "card", {"card": read_card(version.dataset), "front_matter": front})


@never_cache
@team_page(Role.TRAINER)
@require_http_methods(["GET", "POST"])
def edit(request: TeamRequest, dataset_id: int) -> HttpResponse:
    """The card's text in a form, with a preview and who edited it before."""
    dataset: Dataset = get_object_or_404(request.team.datasets.select_related("team"), pk=dataset_id)
    text, seen = dataset.description, request.POST.get("seen", "") or card_version(dataset.description)
    problem: ExplainedError | None = None
    theirs, preview, status = None, None, 200
    if request.method == "POST":
        text = request.POST.get("body", "")
        if "preview" in request.POST:
            preview = render_markdown(cleaned(text))
        else:
            try:
                is_changed = edit_card(dataset, text, request.user, seen=seen)
            except CardConflictError as error:
                # The next save of this form is of somebody who has seen the other text.
                dataset.refresh_from_db(fields=["description"])
                problem, theirs, status = error, dataset.description, 409
                seen = card_version(dataset.description)
            except ExplainedError as error:
                problem, status = error, 422
            else:
                messages.success(request, "The card is saved." if is_changed else "The card was not changed.")
                newest = dataset.versions.order_by("-number").first()
                return redirect("datasets:card", dataset.pk, newest.number) if newest else redirect(dataset)
    context = {
        "dataset": dataset, "text": text, "seen": seen, "problem": problem, "theirs": theirs, "preview": preview,
        "edits": edits_of(request.team, EDITED, dataset), "max_characters": MAX_CHARACTERS,
    }  # fmt: skip
    return render(request, "datasets/card_edit.html", context, status=status)

"""The card of a dataset: as a tab of a version's page, and in a form."""

from __future__ import annotations

from django.http import HttpResponse
from django.shortcuts import get_object_or_404
from django.urls import reverse
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_GET, require_http_methods

from studio.accounts.access import TeamRequest, team_page
from studio.accounts.models import Role
from studio.card_form import card_form
from studio.cards import edits_of
from studio.datasets import exporting
from studio.datasets.card import EDITED, edit_card, read_card
from studio.datasets.models import Dataset
from studio.datasets.views import render_tab, version_or_404


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

    def stored() -> str:
        dataset.refresh_from_db(fields=["description"])
        return dataset.description

    def saved_url() -> str:
        newest = dataset.versions.order_by("-number").first()
        return reverse("datasets:card", args=[dataset.pk, newest.number]) if newest else dataset.get_absolute_url()

    return card_form(
        request, "datasets/card_edit.html", {"dataset": dataset, "edits": edits_of(request.team, EDITED, dataset)},
        stored=stored, save=lambda text, seen: edit_card(dataset, text, request.user, seen=seen), saved_url=saved_url,
    )  # fmt: skip

"""One adapter's pages: what it is worth, its samples, blind choices, where it comes from, and its card."""

from __future__ import annotations

import secrets
from typing import Any

from django.contrib import messages
from django.http import HttpResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.urls import reverse
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_GET, require_http_methods

from studio.accounts.access import TeamRequest, refuse, team_page
from studio.accounts.models import Role
from studio.card_form import card_form
from studio.cards import edits_of
from studio.catalogue import blind, listing
from studio.catalogue.bundles import entries, folder_name, manifest_sha256
from studio.catalogue.findings import Level, evaluation_of, findings_of, shown_details, thresholds_of
from studio.catalogue.lineage import adapters_for_page, repeat_of, repeated_by, training_cost
from studio.catalogue.model_card import EDITED, card_body, edit_card, generated_body, read_card
from studio.catalogue.models import Adapter, Sample, SampleChoice
from studio.catalogue.recipe_table import recipe_sections
from studio.catalogue.samples import DIFFS, LENGTHS, Filters, sample_page
from studio.catalogue.score_groups import score_groups, source_scores, summary
from studio.catalogue.usage import usages
from studio.query_values import whole_number
from workers.errors import ExplainedError


@require_GET
@team_page()
def adapter(request: TeamRequest, adapter_id: int) -> HttpResponse:
    """What one adapter is worth, where it comes from and how to use it."""
    found = get_object_or_404(adapters_for_page(request.team), pk=adapter_id)
    job = getattr(found, "job", None)
    groups = score_groups(found)
    files = entries(found)
    thresholds = thresholds_of(request.team)
    findings = findings_of(found, thresholds)
    faults = {one.code for one in findings if one.level == Level.BAD}
    return render(
        request,
        "catalogue/adapter.html",
        {
            "adapter": found,
            "job": job,
            "method_label": listing.method_label(found.method),
            "product": listing.product_of(found.method),
            "groups": groups,
            "source_scores": source_scores(found),
            "summary": summary(
                groups,
                figure=evaluation_of(found, thresholds.figure),
                allowed_rise=thresholds.allowed_rise,
                is_leaked="overlap" in faults,
                is_damaged="damaged" in faults,
            ),
            **_samples_context(request, found),
            "tally": blind.Tally.from_counts(found.choice_counts),  # type: ignore[attr-defined]
            "sections": recipe_sections(found.recipe, job.asked_recipe if job else None),
            "usages": usages(found),
            "folder_name": folder_name(found),
            "files": files,
            "manifest_sha256": manifest_sha256(found, files),
            "card": read_card(found),
            "findings": findings,
            **shown_details(found, thresholds),
            "repeat_of": repeat_of(found),
            "repeated_by": repeated_by(found),
            "training_cost": training_cost(found),
            "may_train": request.membership.may(Role.TRAINER),
            "again_key": secrets.token_urlsafe(16),
        },
    )


@require_GET
@team_page()
def samples(request: TeamRequest, adapter_id: int) -> HttpResponse:
    """The sample answers alone: the section of the adapter's page, or the rows after those that are shown."""
    found = get_object_or_404(request.team.adapters.all(), pk=adapter_id)
    context = {"adapter": found, "product": listing.product_of(found.method), **_samples_context(request, found)}
    if "HX-Request" not in request.headers:
        return redirect(f"{found.get_absolute_url()}?{context['filters'].query()}#samples")
    if context["filters"].after is not None:
        return render(request, "catalogue/_sample_rows.html", context)
    context["tally"] = blind.tally(found)
    response = render(request, "catalogue/_samples.html", context)
    response["HX-Push-Url"] = f"{found.get_absolute_url()}?{context['filters'].query()}"
    return response


def _samples_context(request: TeamRequest, found: Adapter) -> dict[str, Any]:
    filters = Filters.from_query(request.GET)
    # Null where there are no samples at all.
    counts = (found.sample_counts or {}) if hasattr(found, "sample_counts") else None
    return {
        "filters": filters,
        "page": sample_page(found, filters, counts=counts),
        "lengths": [(value, label) for value, (label, _condition) in LENGTHS.items()],
        "diffs": list(DIFFS.items()),
    }


@never_cache
@require_http_methods(["GET", "POST"])
@team_page()
def blind_choice(request: TeamRequest, adapter_id: int) -> HttpResponse:
    """Two answers to one sample without their names; a POST stores which is better and tells whose they were."""
    found = get_object_or_404(request.team.adapters.select_related("team"), pk=adapter_id)
    may_choose = request.membership.may(Role.TRAINER)
    if request.method == "POST":
        if not may_choose:
            return refuse(request, Role.TRAINER)
        sample = get_object_or_404(
            Sample.objects.select_related("adapter__team"),
            adapter=found, pk=whole_number(request.POST.get("sample", "")) or 0,
        )  # fmt: skip
        try:
            choice = blind.choose(sample, request.user, request.POST.get("choice", ""))
        except ExplainedError as error:
            messages.error(request, f"{error.message} {error.next_step}".strip())
            return redirect("catalogue:blind", found.pk)
        return redirect(f"{reverse('catalogue:blind', args=[found.pk])}?chosen={choice.pk}")
    upcoming = blind.next_sample(found, request.user)
    everybody, mine = blind.tallies(found, request.user)
    return render(
        request,
        "catalogue/blind.html",
        {
            "adapter": found,
            "product": listing.product_of(found.method),
            "pair": blind.blind_pair(upcoming, request.user) if upcoming else None,
            "revealed": _revealed(request, found),
            "tally": everybody,
            "mine": mine,
            "may_choose": may_choose,
        },
    )


def _revealed(request: TeamRequest, found: Adapter) -> dict[str, Any] | None:
    """The choice that was just made, of this person alone, with whose answers they were."""
    choices = SampleChoice.objects.select_related("sample").filter(user=request.user, sample__adapter=found)
    choice = choices.filter(pk=whole_number(request.GET.get("chosen", "")) or 0).first()
    if choice is None:
        return None
    return {"choice": choice, "adapter_is_a": blind.adapter_is_a(request.user, choice.sample_id)}


@never_cache
@require_http_methods(["GET", "POST"])
@team_page(Role.TRAINER)
def edit(request: TeamRequest, adapter_id: int) -> HttpResponse:
    """The card's text in a form, with a preview and who edited it before."""
    rows = request.team.adapters.select_related("base_model", "team")
    found = get_object_or_404(rows, pk=adapter_id)

    def stored() -> str | None:
        found.refresh_from_db(fields=["card"])
        return card_body(found)

    return card_form(
        request,
        "catalogue/card_edit.html",
        {"adapter": found, "edits": edits_of(request.team, EDITED, found), "generated": generated_body(found)},
        stored=stored,
        save=lambda text, seen: edit_card(found, text, request.user, seen=seen),
        saved_url=lambda: f"{found.get_absolute_url()}#card",
    )

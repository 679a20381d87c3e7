"""Catalogue pages: a team's adapters, what they scored and how to use them; the base models of the studio."""

from __future__ import annotations

from django.contrib import messages
from django.db.models import Count, Q
from django.http import HttpResponse, HttpResponseBase
from django.shortcuts import get_object_or_404, redirect, render
from django.views.decorators.http import require_GET, require_http_methods, require_POST

from studio.accounts.access import TeamRequest, team_page
from studio.accounts.models import Role, record
from studio.catalogue import listing
from studio.catalogue.base_facts import method_facts, template_preview
from studio.catalogue.bundles import folder_name, manifest_sha256
from studio.catalogue.downloads import download_response
from studio.catalogue.file_checks import check_now
from studio.catalogue.findings import findings_of, shown_details
from studio.catalogue.forms import RegisterBaseModelForm
from studio.catalogue.importing import allowed_folder, model_roots, register_base_model, suggested_folders
from studio.catalogue.model_card import read_card
from studio.catalogue.models import Adapter, BaseModel
from studio.catalogue.recipe_table import recipe_sections
from studio.catalogue.registering import DamagedAdapterError
from studio.catalogue.usage import usages
from workers.errors import ExplainedError
from workers.evaluations import evaluations
from workers.measured import measured_methods
from workers.methods import methods

# Samples on the adapter's page; the whole list is in the zip (eval/samples.jsonl) and the API.
MAX_SAMPLES = 20


@require_GET
@team_page()
def adapters(request: TeamRequest) -> HttpResponse:
    """The team's adapters, the best first."""
    choices = listing.filter_choices(request.team)
    filters = listing.Filters.from_query(request.GET, choices)
    page = listing.list_adapters(request.team, filters)
    return render(
        request,
        "catalogue/adapters.html",
        {
            "page": page,
            "filters": filters,
            "metric": evaluations()[filters.metric],
            "choices": choices,
            "sorts": listing.sort_choices(),
            "previous_url": listing.page_url(request.GET, filters.page - 1) if filters.page > 1 else "",
            "next_url": listing.page_url(request.GET, filters.page + 1) if page.has_more else "",
        },
    )


@require_GET
@team_page()
def which_method(request: TeamRequest) -> HttpResponse:
    """Which method to choose when: in words, and by our own measurements."""
    return render(
        request,
        "catalogue/methods.html",
        {"methods": list(methods().values()), "measured": measured_methods()},
    )


@require_GET
@team_page()
def adapter(request: TeamRequest, adapter_id: int) -> HttpResponse:
    """What one adapter is worth, where it comes from and how to use it."""
    found = _get_adapter(request, adapter_id)
    scores = sorted(found.held_out_scores(), key=lambda score: (score.evaluation != listing.DEFAULT_SORT, score.label))
    job = getattr(found, "job", None)
    samples = list(found.samples.all()[: MAX_SAMPLES + 1])
    return render(
        request,
        "catalogue/adapter.html",
        {
            "adapter": found,
            "job": job,
            "method_label": listing.method_label(found.method),
            "product": listing.product_of(found.method),
            "scores": scores,
            "primary": scores[0] if scores else None,
            "samples": samples[:MAX_SAMPLES],
            "has_more_samples": len(samples) > MAX_SAMPLES,
            "sections": recipe_sections(found.recipe, job.asked_recipe if job else None),
            "usages": usages(found),
            "folder_name": folder_name(found),
            "manifest_sha256": manifest_sha256(found),
            "card": read_card(found),
            "findings": findings_of(found),
            **shown_details(found),
        },
    )


@require_POST
@team_page(Role.TRAINER)
def check_files_now(request: TeamRequest, adapter_id: int) -> HttpResponse:
    """Read the adapter's files now and say whether they are whole."""
    found = _get_adapter(request, adapter_id)
    check = check_now(found, user=request.user)
    if check.damage:
        messages.error(request, check.damage)
    else:
        messages.success(request, "All files are there and match their checksums.")
    return redirect(found)


@require_GET
@team_page()
def download(request: TeamRequest, adapter_id: int) -> HttpResponseBase:
    """The adapter as a zip, or a page that says which file is damaged."""
    found = _get_adapter(request, adapter_id)
    try:
        return download_response(request, found, user=request.user)
    except DamagedAdapterError as error:
        return render(request, "catalogue/damaged.html", {"adapter": found, "error": error}, status=500)


def _get_adapter(request: TeamRequest, adapter_id: int) -> Adapter:
    # "job" is the reverse side of a relation that belongs to an app above this one.
    rows = request.team.adapters.select_related(
        "base_model", "dataset_version__dataset", "created_by", "team", "job", "file_check"
    ).prefetch_related("scores__run")
    return get_object_or_404(rows, pk=adapter_id)


@require_GET
@team_page()
def base_models(request: TeamRequest) -> HttpResponse:
    """The base models of the studio, with how many of the team's adapters were trained on each."""
    rows = BaseModel.objects.annotate(num_adapters=Count("adapters", filter=Q(adapters__team=request.team)))
    bases = [(base, base.model_shape()) for base in rows.order_by("name").defer("files")]
    return render(
        request,
        "catalogue/base_models.html",
        {"bases": bases, "may_register": request.membership.may(Role.ADMIN)},
    )


@require_GET
@team_page()
def base_model(request: TeamRequest, base_model_id: int) -> HttpResponse:
    """One base model: its numbers, its licence, how it reads a conversation, and what can be trained on it."""
    base = get_object_or_404(BaseModel, pk=base_model_id)
    used_by = request.team.adapters.filter(base_model=base)
    return render(
        request,
        "catalogue/base_model.html",
        {
            "base": base,
            "shape": base.model_shape(),
            "methods": method_facts(base),
            "preview": template_preview(base),
            "adapters": [(one, listing.method_label(one.method)) for one in used_by.order_by("-created_at")[:10]],
            "num_adapters": used_by.count(),
        },
    )


@require_http_methods(["GET", "POST"])
@team_page(Role.ADMIN)
def register_base_model_page(request: TeamRequest) -> HttpResponse:
    """Register a base model from a folder; what is wrong is shown beside its field."""
    form = RegisterBaseModelForm(request.POST or None)
    if request.method == "POST" and form.is_valid():
        base = _try_to_register(request, form)
        if base is not None:
            return redirect(base)
    return render(
        request,
        "catalogue/register_base_model.html",
        {"form": form, "roots": model_roots(), "suggestions": suggested_folders()},
        status=422 if form.errors else 200,
    )


def _try_to_register(request: TeamRequest, form: RegisterBaseModelForm) -> BaseModel | None:
    asked = form.cleaned_data
    known = set(BaseModel.objects.values_list("pk", flat=True))
    try:
        base = register_base_model(
            folder=allowed_folder(asked["folder"]),
            name=asked["name"],
            hub_id=asked["hub_id"],
            licence=asked["licence"],
            user=request.user,
        )
    except ExplainedError as error:
        form.add_error(
            error.field if error.field in form.fields else "folder", f"{error.message} {error.next_step}".strip()
        )
        return None
    if base.pk in known:
        messages.info(request, f"These files are registered already, as {base.name}.")
    else:
        record("base_model.registered", team=request.team, user=request.user, target=base, revision=base.revision)
        messages.success(request, f"{base.name} is registered: its files are safe and complete.")
    return base

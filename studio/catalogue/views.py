"""Catalogue pages: a team's adapters, what they scored and how to use them; the base models of the studio."""

from __future__ import annotations

from django.contrib import messages
from django.db.models import Count, Q
from django.http import HttpResponse, HttpResponseBase
from django.shortcuts import get_object_or_404, redirect, render
from django.views.decorators.http import require_GET, require_http_methods, require_POST

from studio.accounts.access import TeamRequest, refuse, team_page
from studio.accounts.models import Role, record
from studio.catalogue import listing
from studio.catalogue.base_checks import ask_for_check, check_of
from studio.catalogue.base_facts import method_facts, own_runs, template_preview, users_of
from studio.catalogue.downloads import download_response
from studio.catalogue.file_checks import check_now
from studio.catalogue.forms import RegisterBaseModelForm
from studio.catalogue.importing import allowed_folder, model_roots, register_base_model, suggested_folders
from studio.catalogue.models import AdapterState, BaseModel
from workers.errors import DamagedAdapterError, ExplainedError
from workers.evaluations import evaluations
from workers.measured import measured_methods
from workers.methods import methods

ARCHIVED = AdapterState.ARCHIVED


@require_GET
@team_page()
def which_method(request: TeamRequest) -> HttpResponse:
    """Which method to choose when: in words, and by our own measurements."""
    return render(
        request,
        "catalogue/methods.html",
        {"methods": list(methods().values()), "measured": measured_methods()},
    )


@require_POST
@team_page(Role.TRAINER)
def check_files_now(request: TeamRequest, adapter_id: int) -> HttpResponse:
    """Read the adapter's files now and say whether they are whole."""
    found = get_object_or_404(request.team.adapters.all(), pk=adapter_id)
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
    found = get_object_or_404(request.team.adapters.select_related("base_model", "team"), pk=adapter_id)
    try:
        return download_response(request, found, user=request.user)
    except DamagedAdapterError as error:
        return render(request, "catalogue/damaged.html", {"adapter": found, "error": error}, status=500)


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
    # Of other teams' adapters nothing but their number.
    counted = BaseModel.objects.annotate(
        num_adapters=Count("adapters", filter=Q(adapters__team=request.team) & ~Q(adapters__state=ARCHIVED)),
        num_others=Count("adapters", filter=~Q(adapters__team=request.team)),
    )
    base = get_object_or_404(counted.select_related("file_check"), pk=base_model_id)
    used_by = request.team.adapters.filter(base_model=base).exclude(state=ARCHIVED)
    metric = evaluations()[listing.DEFAULT_SORT]
    return render(
        request,
        "catalogue/base_model.html",
        {
            "base": base,
            "shape": base.model_shape(),
            "methods": method_facts(base),
            "preview": template_preview(base),
            "metric": metric,
            "adapters": users_of(used_by, metric.name),
            "runs": own_runs(request.team, base),
            "check": check_of(base),
            "may_train": request.membership.may(Role.TRAINER),
        },
    )


@require_http_methods(["GET", "POST"])
@team_page()
def check_base(request: TeamRequest, base_model_id: int) -> HttpResponse:
    """How the base model's files were found, as a part of its page; a POST has them read again."""
    base = get_object_or_404(BaseModel.objects.select_related("file_check").defer("files"), pk=base_model_id)
    may_train = request.membership.may(Role.TRAINER)
    if request.method == "POST":
        if not may_train:
            return refuse(request, Role.TRAINER)
        ask_for_check(base, team=request.team, user=request.user)
        # What was read with the row is of before.
        base = BaseModel.objects.select_related("file_check").get(pk=base.pk)
    if "HX-Request" not in request.headers:
        return redirect(f"{base.get_absolute_url()}#base-files-title")
    return render(
        request, "catalogue/_base_check.html", {"base": base, "check": check_of(base), "may_train": may_train}
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

"""Evaluations that people queue by hand."""

from __future__ import annotations

import secrets

from django.contrib import messages
from django.http import HttpResponse
from django.shortcuts import get_object_or_404, redirect
from django.views.decorators.http import require_POST

from jobs.evaluating import queue_evaluation
from studio.accounts.access import TeamRequest, team_page
from studio.accounts.models import Role
from studio.catalogue.models import BaseModel
from studio.query_values import whole_number
from workers.errors import ExplainedError


@require_POST
@team_page(Role.TRAINER)
def evaluate(request: TeamRequest) -> HttpResponse:
    """Queue an evaluation of `model` ("adapter-7" or "base-2") on `suite`, and show its job."""
    suite = get_object_or_404(
        request.team.suites.select_related("dataset_version__dataset"), pk=whole_number(request.POST.get("suite", ""))
    )
    kind, _, number = request.POST.get("model", "").partition("-")
    pk = whole_number(number)
    adapter = (
        get_object_or_404(request.team.adapters.select_related("base_model"), pk=pk) if kind == "adapter" else None
    )
    base_model = get_object_or_404(BaseModel, pk=pk) if kind == "base" else None
    try:
        job = queue_evaluation(
            team=request.team, user=request.user, suite=suite, adapter=adapter, base_model=base_model,
            idempotency_key=request.POST.get("key") or secrets.token_urlsafe(16),
        )  # fmt: skip
    except ExplainedError as error:
        messages.error(request, str(error))
        return redirect(suite)
    messages.success(request, f"“{job.name}” is queued.")
    return redirect(job)

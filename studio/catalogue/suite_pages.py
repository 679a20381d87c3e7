"""Pages of a team's benchmark suites."""

from __future__ import annotations

import secrets
from typing import Any

from django import forms
from django.contrib import messages
from django.http import HttpResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.views.decorators.http import require_GET, require_http_methods, require_POST

from studio.accounts.access import TeamRequest, team_page
from studio.accounts.models import Role, Team
from studio.catalogue.models import BaseModel, Suite
from studio.catalogue.suites import archive_suite, make_suite, run_rows, set_guardrail
from studio.catalogue.task_suites import MAX_FEWSHOT, Offer, make_task_suite, offered_tasks
from studio.datasets.models import DatasetVersion, VersionState
from studio.metric_fields import MetricBoxes, chosen_metrics, metric_boxes, metric_field, metric_values, offer_metrics
from studio.query_values import whole_number
from workers.errors import ExplainedError
from workers.formats import formats_of
from workers.recipe import EvaluationSettings

DEFAULTS = EvaluationSettings()
METRICS = "metrics"
MAX_CHOICES = 200


class VersionField(forms.ModelChoiceField):
    """A dataset version by its name and number of rows."""

    def label_from_instance(self, obj: Any) -> str:
        """The version and how many rows it has."""
        return f"{obj} ({obj.num_usable:,} rows)"


class SuiteForm(forms.Form):
    """What a suite measures on which rows."""

    name = forms.CharField(max_length=120, help_text="A name that exists makes its next version.")
    dataset_version = VersionField(
        queryset=DatasetVersion.objects.none(),
        label="Rows",
        help_text="Every usable row of it is scored.",
    )
    max_rows = forms.IntegerField(
        min_value=1,
        required=False,
        label="Rows at most",
        help_text="The first ones; empty for all of them.",
    )
    num_generated = forms.IntegerField(
        min_value=0, max_value=10_000, initial=100, label="Answers to generate",
        help_text="Rows that the model answers; metrics of answers use these.",
    )  # fmt: skip
    max_new_tokens = forms.IntegerField(
        min_value=1, max_value=8192, initial=DEFAULTS.max_new_tokens, label="Answer length",
        help_text="Tokens after which an answer is cut off.",
    )  # fmt: skip
    is_guardrail = forms.BooleanField(
        required=False, label="Guardrail", help_text="Every new adapter of the team is scored on it by itself."
    )
    description = forms.CharField(required=False, max_length=2000, widget=forms.Textarea(attrs={"rows": 2}))

    def __init__(self, *args: Any, team: Team, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        ready = DatasetVersion.objects.filter(
            dataset__team=team, state=VersionState.READY, format__in=formats_of("chat")
        )
        fields: dict[str, Any] = self.fields
        fields["dataset_version"].queryset = ready.select_related("dataset").order_by("dataset__name", "-number")
        offer_metrics(self, METRICS, self.initial.get(METRICS, ()))

    def boxes(self) -> MetricBoxes:
        """The choice of metrics, for the page."""
        return metric_boxes(self, METRICS)

    def to_evaluation(self) -> dict[str, Any]:
        """What a valid form asks to be measured, as an EvaluationSettings in JSON types."""
        values = self.cleaned_data
        return {
            "metrics": chosen_metrics(self, METRICS),
            "num_generated": values["num_generated"],
            "max_new_tokens": values["max_new_tokens"],
        }

    def add_explained(self, error: ExplainedError) -> None:
        """Put an explained error, with what to do, beside the fields that it names."""
        for field, sentence in error.by_field():
            name = (field or "").removeprefix("evaluation.")
            if name.startswith(f"{METRICS}."):
                name = metric_field(self, METRICS, name.removeprefix(f"{METRICS}."))
            self.add_error(name if name in self.fields else None, sentence)


@require_GET
@team_page()
def suites(request: TeamRequest) -> HttpResponse:
    """The team's suites, the newest version of each first."""
    found = request.team.suites.select_related("dataset_version__dataset", "created_by").order_by("name", "-version")
    is_all = "all" in request.GET
    shown = list((found if is_all else found.filter(archived_at=None))[:MAX_CHOICES])
    return render(
        request, "catalogue/suites.html",
        {"suites": shown, "is_all": is_all, "may_train": request.membership.may(Role.TRAINER)},
    )  # fmt: skip


@require_http_methods(["GET", "POST"])
@team_page(Role.TRAINER)
def new_suite(request: TeamRequest) -> HttpResponse:
    """Make a suite, or the next version of one."""
    before = request.team.suites.filter(tasks=[], pk=whole_number(request.GET.get("from", "")) or 0).first()
    form = SuiteForm(request.POST or None, team=request.team, initial=_initial(before))
    if request.method == "POST" and form.is_valid():
        values = form.cleaned_data
        try:
            suite = make_suite(
                team=request.team, user=request.user, name=values["name"], dataset_version=values["dataset_version"],
                description=values["description"], max_rows=values["max_rows"], is_guardrail=values["is_guardrail"],
                evaluation=form.to_evaluation(),
            )  # fmt: skip
        except ExplainedError as error:
            form.add_explained(error)
        else:
            messages.success(request, f"{suite} is made. Run it on an adapter or a base model.")
            return redirect("catalogue:suite", suite.pk)
    status = 422 if request.method == "POST" else 200
    return render(request, "catalogue/new_suite.html", {"form": form, "before": before}, status=status)


class TaskSuiteForm(forms.Form):
    """Which standard tasks a suite measures, and how they are asked."""

    name = forms.CharField(max_length=120, help_text="A name that exists makes its next version.")
    tasks = forms.MultipleChoiceField(error_messages={"required": "Choose at least one task."})
    num_fewshot = forms.IntegerField(
        min_value=0, max_value=MAX_FEWSHOT, required=False, label="Examples before a question",
        help_text="Empty: as many as each task says.",
    )  # fmt: skip
    max_rows = forms.IntegerField(
        min_value=1, required=False, label="Rows at most", help_text="The first ones of each task; empty for all."
    )
    with_chat_template = forms.BooleanField(
        required=False, initial=True, label="As a conversation",
        help_text="Questions stand in the model's chat template, as the adapter was trained. Published figures of base "
        "models are often measured without.",
    )  # fmt: skip
    is_guardrail = forms.BooleanField(
        required=False, label="Guardrail", help_text="Every new adapter of the team is scored on it by itself."
    )
    description = forms.CharField(required=False, max_length=2000, widget=forms.Textarea(attrs={"rows": 2}))

    def __init__(self, *args: Any, offer: Offer, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.offer = offer
        self.fields["tasks"].choices = [(one.name, one.name) for one in offer.tasks]  # type: ignore[attr-defined]

    def chosen(self) -> set[str]:
        """The tasks that are ticked."""
        return set(self["tasks"].value() or ())


@require_http_methods(["GET", "POST"])
@team_page(Role.TRAINER)
def new_task_suite(request: TeamRequest) -> HttpResponse:
    """Make a suite of standard tasks, or the next version of one."""
    before = request.team.suites.exclude(tasks=[]).filter(pk=whole_number(request.GET.get("from", "")) or 0).first()
    initial = {}
    if before is not None:
        names = ("name", "tasks", "description", "max_rows", "is_guardrail")
        initial = {name: getattr(before, name) for name in names} | before.evaluation
    form = TaskSuiteForm(request.POST or None, offer=offered_tasks(), initial=initial)
    if request.method == "POST" and form.is_valid():
        try:
            suite = make_task_suite(team=request.team, user=request.user, **form.cleaned_data)
        except ExplainedError as error:
            for field, sentence in error.by_field():
                form.add_error(field if field in form.fields else None, sentence)
        else:
            messages.success(request, f"{suite} is made. Run it on an adapter or a base model.")
            return redirect("catalogue:suite", suite.pk)
    status = 422 if request.method == "POST" else 200
    return render(request, "catalogue/new_task_suite.html", {"form": form, "before": before}, status=status)


@require_GET
@team_page()
def suite(request: TeamRequest, suite_id: int) -> HttpResponse:
    """A suite with everything that ran on it."""
    found = _get(request, suite_id)
    columns, rows = run_rows(found)
    adapters = request.team.adapters.only("pk", "name", "version").order_by("-created_at")[:MAX_CHOICES]
    return render(
        request, "catalogue/suite.html",
        {
            "suite": found, "rows": rows, "metrics": [one.label for one in columns],
            "adapters": list(adapters), "bases": list(BaseModel.objects.only("pk", "name").order_by("name")),
            "may_train": request.membership.may(Role.TRAINER), "key": secrets.token_urlsafe(16),
        },
    )  # fmt: skip


@require_POST
@team_page(Role.TRAINER)
def change_suite(request: TeamRequest, suite_id: int) -> HttpResponse:
    """Archive a suite or bring it back, make it a guardrail or not: `do` says which."""
    found = _get(request, suite_id)
    acts = {
        "archive": (lambda: archive_suite(found, request.user), f"{found} is archived; its runs stay."),
        "bring_back": (lambda: archive_suite(found, request.user, is_archived=False), f"{found} is back."),
        "guard": (
            lambda: set_guardrail(found, request.user, is_guardrail=True),
            f"Every new adapter will be scored on {found}.",
        ),
        "unguard": (
            lambda: set_guardrail(found, request.user, is_guardrail=False),
            f"New adapters are not scored on {found} any more.",
        ),
    }
    act = acts.get(request.POST.get("do", ""))
    if act is None:
        messages.error(request, "Nothing was done: the form did not say what to do.")
    elif act[0]():
        messages.success(request, act[1])
    return redirect("catalogue:suite", found.pk)


def _get(request: TeamRequest, suite_id: int) -> Suite:
    rows = request.team.suites.select_related("dataset_version__dataset", "created_by", "team")
    return get_object_or_404(rows, pk=suite_id)


def _initial(before: Suite | None) -> dict[str, Any]:
    if before is None:
        return {METRICS: DEFAULTS.metrics}
    evaluation = EvaluationSettings.model_validate(before.evaluation)
    return {
        "name": before.name, "dataset_version": before.dataset_version_id, "description": before.description,
        "max_rows": before.max_rows, "is_guardrail": before.is_guardrail,
        "num_generated": evaluation.num_generated, "max_new_tokens": evaluation.max_new_tokens,
        **metric_values(evaluation.metrics, METRICS),
    }  # fmt: skip

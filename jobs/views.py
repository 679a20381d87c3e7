"""Pages of jobs: the queue, a new job, and one job from the moment it is queued to its adapter."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any
from uuid import UUID

from django.contrib import messages
from django.core.exceptions import BadRequest
from django.db.models import Count, F, OuterRef, Q, Subquery
from django.db.models.functions import JSONObject
from django.http import HttpResponse, JsonResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_GET, require_POST

from jobs import samples, series, showing
from jobs.buttons import mark_ends
from jobs.estimating import Plan, estimate_values, plan_for, suggestions_for
from jobs.forms import GOALS, JobForm, bound_copy, fresh_form, with_changes
from jobs.mending import actions_for
from jobs.mix_field import WEIGHT_SETTING, mix_rows, with_rows_changed
from jobs.mixes import mixed_rows
from jobs.models import ACTIVE_STATES, FINAL_STATES, LEASED_STATES, Job, JobState
from jobs.prices import cost_of_attempts, costs_of_jobs
from jobs.queueing import IdempotencyConflictError, key_for_another, queue_job
from jobs.scheduling import QUEUE_ORDER, WAITING_STATES, QueueSnapshot, explain_wait, look_at_queue
from studio.accounts.access import TeamRequest, team_page
from studio.accounts.models import Role
from studio.accounts.signed_out import take_kept_form
from studio.catalogue.models import Score
from studio.catalogue.recipe_table import recipe_sections
from studio.conditional import unchanged_is_304
from studio.costs import Cost, money_per_hour, money_range
from studio.reviews.scan_limits import blocking
from studio.setting_fields import form_name
from studio.templatetags.components import significant
from workers.errors import DoesNotFitError, ExplainedError
from workers.methods import get_method
from workers.recipe import MAX_MIXED
from workers.splits.saying import Saying, rows_needed, saying_of

MAX_LISTED = 50
"""Rows of finished jobs on a page."""

FILTERS = {
    "": ("All", Q()),
    "active": ("Running and queued", ~Q(state__in=FINAL_STATES)),
    "paused": ("Paused", Q(state=JobState.PAUSED)),
    "succeeded": ("Succeeded", Q(state=JobState.SUCCEEDED)),
    "failed": ("Failed", Q(state=JobState.FAILED)),
    "cancelled": ("Cancelled", Q(state=JobState.CANCELLED)),
}


@dataclass(frozen=True)
class JobRow:
    """A job as a row of a list."""

    job: Job
    position: int
    waits: str
    percent: int
    colour: str
    elapsed_seconds: float | None
    phase_label: str
    starts_at: datetime | None = None
    cost: Cost | None = None


def job_row(job: Job, queue: QueueSnapshot | None, cost: Cost | None = None) -> JobRow:
    """A job with its place in the queue and why it waits, or what it has cost."""
    return JobRow(
        job=job,
        position=queue.position(job) if queue else 0,
        waits=explain_wait(job, queue) if queue else "",
        percent=showing.percent_of(job),
        colour=showing.colour_of(job),
        elapsed_seconds=showing.elapsed_seconds(job),
        phase_label=showing.PHASE_LABELS.get(job.phase, ""),
        starts_at=queue.starts_at(job) if queue else None,
        cost=cost,
    )


@require_GET
@team_page(Role.VIEWER)
@unchanged_is_304
def list_jobs(request: TeamRequest) -> HttpResponse:
    """The team's queue and what ran before. The list refreshes itself with the same URL."""
    state = request.GET.get("state", "")
    is_mine = request.GET.get("mine") == "1"
    if state not in FILTERS:
        state = ""
    jobs = showing.listed_jobs(request.team.jobs.filter(FILTERS[state][1]))
    if is_mine:
        jobs = jobs.filter(created_by=request.user)
    # What runs or waits is never cut: hiding the next job would make the queue wrong.
    active = list(jobs.filter(state__in=ACTIVE_STATES).order_by(*QUEUE_ORDER))
    ended = jobs.filter(state__in=FINAL_STATES).order_by("-created_at")
    older_than = _moment(request.GET.get("older_than", ""))
    if older_than is not None:
        ended = ended.filter(created_at__lt=older_than)
    ended = ended[: MAX_LISTED + 1]
    queue = look_at_queue(active)
    if not (state or is_mine):
        in_team = [job for job in active if job.state in WAITING_STATES]
        mark_ends(sorted(in_team, key=queue.position))
    rows = [job_row(job, queue) for job in active]
    ended_jobs = list(ended)
    costs = costs_of_jobs(ended_jobs)
    finished = [job_row(job, None, costs.get(job.pk)) for job in ended_jobs]
    older = request.GET.copy()
    if len(finished) > MAX_LISTED:
        older["older_than"] = finished[MAX_LISTED - 1].job.created_at.isoformat()
    context = {
        "running": [row for row in rows if row.job.state in LEASED_STATES],
        "waiting": sorted(
            (row for row in rows if row.job.state in WAITING_STATES), key=lambda row: row.position or len(rows) + 1
        ),
        "paused": [row for row in rows if row.job.state == JobState.PAUSED],
        "finished": finished[:MAX_LISTED],
        "has_costs": any(cost.amounts for cost in costs.values()),
        "num_waiting": queue.num_waiting,
        "num_busy": queue.num_busy,
        "has_workers": queue.has_workers,
        "older_url": f"?{older.urlencode()}" if len(finished) > MAX_LISTED else "",
        "is_older": older_than is not None,
        "state": state,
        "is_mine": is_mine,
        "is_filtered": bool(state or is_mine),
        "filters": [(name, label) for name, (label, _condition) in FILTERS.items()],
        "may_train": request.membership.may(Role.TRAINER),
        "here": request.get_full_path(),
    }
    name = "jobs/_job_list.html" if request.headers.get("HX-Target", "").endswith("job-list") else "jobs/job_list.html"
    return render(request, name, context)


def _moment(text: str) -> datetime | None:
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        return None
    # A moment without a time zone, or in a year that no zone reaches, is none of ours.
    return found if found.tzinfo is not None and 1900 < found.year < 9000 else None


@dataclass(frozen=True)
class PanelProblem:
    """Why there is no estimate, with a link to the field."""

    label: str
    message: str
    html_id: str


def _make_plan(form: JobForm) -> Plan | None:
    """The plan of a form's choices; None with the reasons on the form."""
    if not form.is_valid():
        return None
    recipe = form.to_recipe()
    base_model, version = form.cleaned_data["base_model"], form.cleaned_data["dataset_version"]
    try:
        plan = plan_for(recipe, base_model, version, form.mixed_versions())
        form.suggestions = plan.suggestions
        return plan
    except DoesNotFitError as error:
        form.suggestions = suggestions_for(recipe, base_model, version, form.mixed_versions())
        form.add_explained(error)
    except ExplainedError as error:
        form.add_explained(error)
    return None


@dataclass(frozen=True)
class ShownSuggestion:
    """A change with which a job fits, and the value of the button that fills it into the form."""

    words: str
    cost: str
    memory: str
    time: str
    changes: str


def _shown_suggestions(form: JobForm) -> list[ShownSuggestion]:
    return [
        ShownSuggestion(
            one.words, one.cost, showing.gibibytes(one.num_bytes), _times_as_long(one.slowdown), json.dumps(changes)
        )
        for one, changes in form.suggested_changes()
    ]


def _times_as_long(slowdown: float) -> str:
    if abs(slowdown - 1) < 0.05:
        return "as fast"
    return f"{significant(slowdown, 2)} times as long"


def _form_context(request: TeamRequest, form: JobForm, plan: Plan | None, *, show_errors: bool) -> dict[str, Any]:
    """What the New job page and its "this run" panel show; without `show_errors` an untouched field is no error."""
    resolved = plan.recipe if plan else None
    own = form.method_section(resolved)
    sections = form.sections(resolved)
    every = [*sections, own] if own else sections
    problems = _problems(form, show_errors=show_errors)
    versions = form.dataset_versions.rows
    version = versions.get(form.text_of("dataset_version"))
    dataset_errors: Any = form.errors.get("dataset_version", []) if form.is_bound and (version or show_errors) else []
    context = {
        "form": form,
        "plan": plan,
        "method": form.chosen_method(),
        "method_facts": _method_facts(form),
        "method_section": own,
        "sections": sections,
        "num_changed": sum(section.num_changed for section in every),
        "has_advanced_errors": any(section.has_errors for section in every),
        "goals": GOALS.values(),
        "goal": form.text_of("goal"),
        "key": form.text_of("idempotency_key") or secrets.token_urlsafe(16),
        "parent_key": form.text_of("parent"),
        "chosen_base_model": form.text_of("base_model"),
        "chosen_dataset": form.text_of("dataset_version"),
        "dataset_shown": version,
        "mix_rows": list(
            mix_rows(form.mix_pairs(), form.cleaned_data["mix"] if plan else (), plan, versions, request.team)
        ),
        "mix_problems": form.errors.get("mix", []) if form.is_bound else [],
        "max_mixed": MAX_MIXED,
        "weight_setting": WEIGHT_SETTING,
        "dataset_blocks": blocking(version, request.team) if version is not None else [],
        "splits": form.splits.rows,
        "chosen_split": form.text_of("dataset_split"),
        "test_saying": _test_saying(form),
        "split_problem": " ".join(map(str, form.errors.get("dataset_split", []))) if form.is_bound else "",
        "dataset_problem": " ".join(str(message) for message in dataset_errors),
        "name_text": form.text_of("name"),
        "missing": form.missing(),
        "problems": problems,
        "show_errors": show_errors,
    }
    context["suggestions"] = _shown_suggestions(form)
    if plan is not None:
        context |= {
            "cost_range": _cost_words(plan),
            "price": money_per_hour(plan.price.amount, plan.price.currency) if plan.price is not None else "",
            "free_there": showing.gibibytes(plan.device.free_bytes),
            "arithmetic_memory": showing.gibibytes(plan.estimate.arithmetic_bytes),
            "memory_parts": _memory_parts(plan),
            "memory_needed": showing.gibibytes(plan.estimate.total_bytes),
            "memory_least": showing.gibibytes(plan.estimate.least_bytes),
            "memory_starting": showing.gibibytes(plan.estimate.starting_bytes),
            "slower_percent": significant(100 * ((plan.estimate.slowdown or 1) - 1), 2),
            "memory_there": showing.gibibytes(plan.device.facts.memory_bytes),
            "trainable_percent": significant(100 * plan.estimate.trainable_share),
            "cut_percent": significant(100 * plan.cut_share, 2),
            "product_noun": get_method(plan.recipe.method).product.noun,
        }
        if plan.instead is not None:
            context |= {
                "instead_memory": showing.gibibytes(plan.instead.estimate.total_bytes),
                "instead_percent": significant(100 * plan.instead.estimate.trainable_share),
            }
    return context


def _cost_words(plan: Plan) -> str:
    """What a run will cost, "0.40 to 1.20 EUR"; empty where the team has set no price."""
    if plan.cost_range is None or plan.price is None:
        return ""
    return money_range(*plan.cost_range, plan.price.currency)


def _test_saying(form: JobForm) -> Saying | None:
    """What the chosen split's test rows can say when that is too little; None otherwise."""
    split = form.splits.rows.get(form.text_of("dataset_split"))
    return saying_of(split.num_test) if split is not None and split.num_test < rows_needed() else None


def _problems(form: JobForm, *, show_errors: bool) -> list[PanelProblem]:
    if not form.is_bound:
        return []
    found: list[PanelProblem] = []
    for name, sentences in form.errors.items():
        if not show_errors and not form.text_of(name) and name in {"base_model", "dataset_version", "name"}:
            continue
        known = name in form.fields
        label = str(form.fields[name].label or name.replace("_", " ").capitalize()) if known else ""
        html_id = f"id_{form_name(name)}" if known else ""
        found.extend(PanelProblem(label, str(sentence), html_id) for sentence in sentences)
    return found


def _method_facts(form: JobForm) -> list[dict[str, Any]]:
    """Every method with the share of the chosen base's parameters that it trains at its defaults."""
    base = form.base_models.rows.get(form.text_of("base_model"))
    facts = []
    for method in form.methods.values():
        share = ""
        if base is not None and base.shape:
            shape = base.model_shape()
            num_trainable = method.num_trainable(method.read_settings({}), shape)
            share = f"{significant(100 * num_trainable / max(1, shape.num_parameters), 2)} % trainable"
        facts.append({"method": method, "is_chosen": method.name == form.method_name(), "share": share})
    return facts


MEMORY_COLOURS = ("fill-primary", "fill-secondary", "fill-accent", "fill-info", "fill-neutral")


def _memory_parts(plan: Plan) -> list[dict[str, str]]:
    needed = plan.estimate
    whole = max(needed.total_bytes, plan.device.facts.memory_bytes, 1)
    # The parts are arithmetic; what finished runs correct is spread over them, so that they add up to what is shown.
    corrected = needed.total_bytes / max(1, needed.arithmetic_bytes)
    parts = [
        ("Base weights", needed.weights_bytes),
        (get_method(plan.recipe.method).product.noun.capitalize(), needed.adapter_bytes),
        ("Optimizer", needed.optimizer_bytes),
        ("Activations", needed.activations_bytes),
        ("Runtime", needed.runtime_bytes),
    ]
    found: list[dict[str, str]] = []
    left = 0.0
    for index, (label, arithmetic_bytes) in enumerate(parts):
        num_bytes = corrected * arithmetic_bytes
        if not num_bytes:
            continue  # full fine-tuning has no weights of a base beside its own
        width = 100 * num_bytes / whole
        found.append(
            {
                "label": label,
                "size": showing.gibibytes(num_bytes),
                "x": f"{left:.3f}",
                "width": f"{width:.3f}",
                "colour": MEMORY_COLOURS[index],
            }
        )
        left += width
    return found


@team_page(Role.TRAINER, keeps_form=True)
def new_job(request: TeamRequest) -> HttpResponse:
    """The New job form; a POST queues the job or says what to mend, with every value kept."""
    if request.method == "POST":
        return _queue(request)
    if (kept := take_kept_form(request)) is not None:
        messages.info(request, "You were signed out, so nothing was started. What you had chosen is filled in again.")
        form = JobForm(kept, team=request.team)
        return render(request, "jobs/new_job.html", _form_context(request, form, _make_plan(form), show_errors=False))
    parent = None
    if asked := request.GET.get("from"):
        parent = get_object_or_404(
            request.team.jobs.annotate(num_again=Count("children"), mixed=mixed_rows()), pk=_uuid(asked)
        )
    form = fresh_form(
        request.team,
        dataset_version=request.GET.get("dataset", ""),
        split=request.GET.get("split"),
        base_model=request.GET.get("base_model", ""),
        parent=parent,
        num_again=getattr(parent, "num_again", 0),
    )
    # A complete form shows its estimate at once; an incomplete one shows no errors before it was touched.
    if not form.missing():
        form = bound_copy(form)
        plan = _make_plan(form)
    else:
        plan = None
    return render(request, "jobs/new_job.html", _form_context(request, form, plan, show_errors=False))


def _queue(request: TeamRequest) -> HttpResponse:
    if (changed := with_rows_changed(request.POST)) is not None:
        form = JobForm(changed, team=request.team)
        return render(request, "jobs/new_job.html", _form_context(request, form, _make_plan(form), show_errors=False))
    form = JobForm(request.POST, team=request.team)
    if "apply" in request.POST:
        try:
            form = with_changes(form, json.loads(request.POST["apply"]))
        except ValueError as error:
            raise BadRequest(str(error)) from error
        messages.info(request, "The change is filled in. Nothing has started.")
    plan = _make_plan(form)
    if "update" in request.POST or "apply" in request.POST:
        return render(request, "jobs/new_job.html", _form_context(request, form, plan, show_errors=True))
    if plan is None:
        return render(request, "jobs/new_job.html", _form_context(request, form, None, show_errors=True), status=422)
    parent = None
    if form.cleaned_data["parent"]:
        parent = request.team.jobs.filter(pk=form.cleaned_data["parent"]).first()
    queue = partial(
        queue_job,
        team=request.team,
        user=request.user,
        recipe=plan.recipe,
        asked_recipe=form.to_recipe(),
        estimate=estimate_values(plan),
        base_model=form.cleaned_data["base_model"],
        dataset_version=form.cleaned_data["dataset_version"],
        mixed=form.mixed_versions(),
        parent=parent,
    )
    key = form.cleaned_data["idempotency_key"] or secrets.token_urlsafe(16)
    try:
        try:
            job = queue(idempotency_key=key)
        except IdempotencyConflictError:
            # The form came back through the Back button and was changed: another job is meant, and only one.
            job = queue(idempotency_key=key_for_another(key, form.to_recipe()))
    except ExplainedError as error:
        form.add_explained(error)
        return render(request, "jobs/new_job.html", _form_context(request, form, plan, show_errors=True), status=422)
    return redirect(job)


@require_POST
@team_page(Role.TRAINER)
def estimate(request: TeamRequest) -> HttpResponse:
    """The "this run" panel for the form as it stands, and whatever else depends on it. Changes nothing."""
    changed = with_rows_changed(request.POST)
    form = JobForm(changed if changed is not None else request.POST, team=request.team)
    plan = _make_plan(form)
    context = _form_context(request, form, plan, show_errors=False)
    own, method_changed = context["method_section"], form.text_of("shown_method") != form.method_name()
    # A method that was just chosen brings its own settings along, with their resolved values in them.
    sections = [*context["sections"], *([own] if own and not method_changed else [])]
    context |= {
        "method_changed": method_changed,
        "mix_changed": changed is not None,
        "resolved_rows": [row for section in sections for row in section.rows],
    }
    return render(request, "jobs/_estimate.html", context)


@require_GET
@team_page(Role.VIEWER)
def job_detail(request: TeamRequest, job_id: UUID) -> HttpResponse:
    """One job, complete without scripts."""
    job = job_for_page(request, job_id)
    return render(request, "jobs/job_detail.html", job_context(request, job))


def job_for_page(request: TeamRequest, job_id: UUID) -> Job:
    """A job of the team with all that its page shows of it, the newest job that was made from it too."""
    copies = Job.objects.filter(parent=OuterRef("pk")).order_by("-created_at")
    newest = Subquery(copies.values(json=JSONObject(id=F("id"), name=F("name")))[:1])
    jobs = showing.job_for_page(request.team.jobs.all()).annotate(newest_copy=newest)
    found: Job = get_object_or_404(jobs, pk=job_id)
    return found


def job_context(request: TeamRequest, job: Job) -> dict[str, Any]:
    """What a job's page shows, of a job from `job_for_page`."""
    queue = look_at_queue([job]) if job.state in WAITING_STATES else None
    context = showing.live_context(job)
    attempts = list(job.attempts.select_related("worker").order_by("-number")) if job.attempt else []
    for attempt in attempts:
        attempt.cost = cost_of_attempts([attempt], job.num_gpus)  # type: ignore[attr-defined]
    return {
        **context,
        **samples.samples_context(job, job.newest_sample_at),  # type: ignore[attr-defined]
        "row": job_row(job, queue),
        "attempts": attempts,
        "cost": cost_of_attempts(attempts, job.num_gpus),
        "attempt_line": showing.attempt_line(job, attempts),
        "failure_actions": [action for action in actions_for(job) if action.name != "as_it_is"],
        "scores": _scores(job),
        "recipe_sections": recipe_sections(job.recipe, job.asked_recipe),
        "recipe_json": json.dumps(job.recipe, indent=2, ensure_ascii=False),
        "may_train": request.membership.may(Role.TRAINER),
        "newest_copy": job.newest_copy,  # type: ignore[attr-defined]
        "retry_key": secrets.token_urlsafe(16),
        "is_live": not job.is_final(),
    }


def _scores(job: Job) -> list[Score]:
    if job.adapter is not None:
        return job.adapter.held_out_scores()
    return list(job.evaluation_run.scores.order_by("evaluation")) if job.evaluation_run is not None else []


@require_GET
@never_cache
@team_page(Role.VIEWER)
def job_header(request: TeamRequest, job_id: UUID) -> HttpResponse:
    """The parts of a job page that depend on its state: state, buttons, failure, scores."""
    job = job_for_page(request, job_id)
    return render(request, "jobs/_job_header_swap.html", job_context(request, job))


@require_GET
@never_cache
@team_page(Role.VIEWER)
def points(request: TeamRequest, job_id: UUID) -> JsonResponse:
    """The job's curves for its charts."""
    job = get_object_or_404(request.team.jobs.only("pk", "state"), pk=job_id)
    return JsonResponse(series.points(job))


@require_GET
@never_cache
@team_page(Role.VIEWER)
def point_table(request: TeamRequest, job_id: UUID) -> HttpResponse:
    """The job's curves as a table, for those who do not see charts."""
    job = get_object_or_404(request.team.jobs, pk=job_id)
    rows = series.downsample(series.curve(job), limit=200)
    return render(request, "jobs/point_table.html", {"job": job, "points": rows})


def _uuid(text: str) -> UUID | None:
    try:
        return UUID(text)
    except ValueError:
        return None

"""Review pages: the inbox, one review with its gates, who is asked, and submitting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from django.contrib import messages
from django.http import HttpResponse, HttpResponseBase, QueryDict
from django.shortcuts import get_object_or_404, redirect, render
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_http_methods, require_POST, require_safe

from studio.accounts.access import TeamRequest, team_page
from studio.accounts.models import Role
from studio.catalogue.findings import findings_of
from studio.catalogue.models import Adapter
from studio.keyset import read_cursor, read_page
from studio.reviews import reviewing, showing
from studio.reviews.forms import AssignForm, SubmitForm
from studio.reviews.models import Review, Reviewer, ReviewState
from studio.reviews.policies import PolicySettings, thresholds_in
from studio.reviews.reviewing import Action, Actor, MissingReasonError, ReviewError, allowed_actions

PAGE_SIZE = 30


def actor_of(request: TeamRequest) -> Actor:
    """The person who asks, in the team that they have chosen."""
    return Actor(request.user, Role(request.membership.role), request.team.pk, getattr(request, "token", None))


def find_review(request: TeamRequest, review_id: int) -> Review:
    """A review of the team, or 404."""
    return get_object_or_404(showing.reviews_of(request.team), pk=review_id)


def refused(request: TeamRequest, error: ReviewError, back: str) -> HttpResponse:
    """A page that says why nothing was done."""
    return render(request, "reviews/refused.html", {"error": error, "back": back}, status=error.status)


@never_cache
@require_safe
@team_page()
def inbox(request: TeamRequest) -> HttpResponse:
    """The team's reviews: assigned to me, waiting, done."""
    counts = showing.inbox_counts(request.team, request.user)
    first = showing.ASSIGNED if counts[showing.ASSIGNED] else showing.WAITING
    tab = request.GET.get("tab", first)
    tab = tab if tab in showing.TABS else first
    rows = showing.inbox(request.team, request.user, tab)
    keys, after = showing.inbox_order(tab), request.GET.get("after", "")
    if after and read_cursor(after, keys) is None:
        return redirect("reviews:inbox")
    page = read_page(rows, keys, {"after": after}, size=PAGE_SIZE)
    next_url = ""
    if page.after:
        query = QueryDict(mutable=True)
        query.update({"tab": tab, "after": page.after})
        next_url = f"?{query.urlencode()}"
    return render(
        request,
        "reviews/inbox.html",
        {
            "tab": tab,
            "tabs": [(name, label, counts.get(name)) for name, label in showing.TABS.items()],
            "rows": [(review, showing.summarise(review)) for review in page.rows],
            "next_url": next_url,
            "first_url": f"?tab={tab}" if after else "",
        },
    )


@never_cache
@require_safe
@team_page()
def count(request: TeamRequest) -> HttpResponse:
    """How many reviews wait for a lead, as a fragment for the navigation; empty for others and for none."""
    number = 0
    if request.membership.may(Role.LEAD):
        number = request.team.reviews.filter(state=ReviewState.OPEN).exclude(adapter__created_by=request.user).count()
    return render(request, "reviews/_nav_count.html", {"number": number})


@never_cache
@require_safe
@team_page()
def review(request: TeamRequest, review_id: int) -> HttpResponse:
    """One review: what was found in the adapter, then gates, scores and people."""
    return _review_page(request, review_id)


@never_cache
@require_safe
@team_page()
def gates(request: TeamRequest, review_id: int) -> HttpResponse:
    """The gates alone, for a page that is open while they are being checked."""
    found = find_review(request, review_id)
    if "HX-Request" not in request.headers:
        return redirect(f"{found.get_absolute_url()}#gates")
    return render(request, "reviews/_gates_swap.html", _gates_context(request, found))


def _gates_context(request: TeamRequest, found: Review) -> dict[str, Any]:
    rows = showing.gate_rows(found, list(found.outcomes.select_related("waived_by")))
    people = list(found.reviewers.select_related("user").order_by("user__username"))
    return {
        "review": found,
        "gates": rows,
        "num_hindrances": sum(row.is_hindrance for row in rows),
        "num_failed": sum(row.has_failed for row in rows),
        "num_waived": sum(row.outcome is not None and row.outcome.is_waived() for row in rows),
        "num_open": sum(row.is_hindrance and not row.has_failed for row in rows),
        "people": people,
        "has_approved": any(one.user_id == request.user.pk and one.approved_at for one in people),
        "may": allowed_actions(actor_of(request), found.adapter, found.state),
    }


def _review_page(
    request: TeamRequest, review_id: int, *, errors: dict[str, str] | None = None, status: int = 200
) -> HttpResponse:
    found = get_object_or_404(showing.reviews_for_page(request.team), pk=review_id)
    context = _gates_context(request, found)
    people: list[Reviewer] = context["people"]
    settings = PolicySettings.from_dict(found.policy.settings)
    return render(
        request,
        "reviews/review.html",
        {
            **context,
            "adapter": found.adapter,
            "tab": "gates",
            "approvals_needed": settings.approvals,
            "approvals": [one for one in people if one.approved_at],
            "assigned": [one for one in people if one.is_assigned],
            "findings": findings_of(found.adapter, thresholds_in(settings)),
            "scores": showing.scores_worst_first(found.adapter),
            "errors": errors,
        },
        status=status,
    )


Act = Callable[[int, Actor, QueryDict], Any]


def _does(act: Act, done: str) -> Callable[..., HttpResponseBase]:
    """A view that does one thing with a review and goes back to its page."""

    @require_POST
    @team_page(Role.VIEWER)
    def view(request: TeamRequest, review_id: int) -> HttpResponse:
        found = find_review(request, review_id)
        try:
            act(found.pk, actor_of(request), request.POST)
        except MissingReasonError as error:
            return _review_page(request, review_id, errors={error.field or "": error.message}, status=422)
        except ReviewError as error:
            return refused(request, error, found.get_absolute_url())
        messages.success(request, done)
        return redirect(found)

    return view


approve = _does(
    lambda pk, actor, sent: reviewing.approve(pk, actor, comment=sent.get("reason", "")), "Your approval is recorded."
)
reject = _does(lambda pk, actor, sent: reviewing.reject(pk, actor, reason=sent.get("reason", "")), "It is rejected.")
ask_changes = _does(
    lambda pk, actor, sent: reviewing.ask_changes(pk, actor, reason=sent.get("reason", "")),
    "Its author is asked for changes.",
)
withdraw = _does(
    lambda pk, actor, sent: reviewing.withdraw(pk, actor, reason=sent.get("reason", "")), "It is withdrawn."
)
waive = _does(
    lambda pk, actor, sent: reviewing.waive(pk, actor, gate=sent.get("gate", ""), reason=sent.get("reason", "")),
    "The gate is waived, with your name and reason.",
)
recheck = _does(lambda pk, actor, _sent: reviewing.ask_gates(pk, actor), "The gates are being checked again.")
roll_back = _does(lambda pk, actor, _sent: reviewing.roll_back(pk, actor), "The alias is back at the version before.")


@never_cache
@require_http_methods(["GET", "HEAD", "POST"])
@team_page(Role.VIEWER)
def people(request: TeamRequest, review_id: int) -> HttpResponse:
    """Who is asked to review, and until when."""
    found = find_review(request, review_id)
    actor = actor_of(request)
    try:
        reviewing.require(Action.ASSIGN, actor, found.adapter, found.state)
        assigned = [str(one.user_id) for one in found.reviewers.all() if one.is_assigned]
        form = AssignForm(request.POST or None, initial={"reviewers": assigned, "due_on": found.due_on})
        form.fields["reviewers"].choices = [  # type: ignore[attr-defined]
            (str(one.user_id), f"{one.user.display_name()} ({one.role})")
            for one in reviewing.may_review(request.team, found.adapter)
        ]
        # An empty form is a form, too: it asks nobody.
        if request.method == "POST":
            form = _bound(form, request.POST)
            if form.is_valid():
                chosen = form.cleaned_data
                reviewing.assign(
                    found.pk, actor, user_ids=[int(one) for one in chosen["reviewers"]], due_on=chosen["due_on"]
                )
                messages.success(request, "Reviewers and due date are saved.")
                return redirect(found)
    except ReviewError as error:
        return refused(request, error, found.get_absolute_url())
    context = {"review": found, "adapter": found.adapter, "form": form}
    return render(request, "reviews/people.html", context, status=422 if form.errors else 200)


def _bound(form: AssignForm, sent: QueryDict) -> AssignForm:
    bound = AssignForm(sent)
    bound.fields["reviewers"].choices = form.fields["reviewers"].choices  # type: ignore[attr-defined]
    return bound


@never_cache
@require_http_methods(["GET", "HEAD", "POST"])
@team_page(Role.VIEWER)
def submit(request: TeamRequest, adapter_id: int) -> HttpResponse:
    """Submit an adapter for review."""
    adapter = get_object_or_404(request.team.adapters.select_related("base_model", "created_by"), pk=adapter_id)
    actor = actor_of(request)
    try:
        latest = latest_review(adapter)
        reviewing.require(Action.SUBMIT, actor, adapter, latest.state if latest else reviewing.NOT_REVIEWED)
        form = SubmitForm(request.POST if request.method == "POST" else None)
        if request.method == "POST" and form.is_valid():
            made = reviewing.submit(adapter, actor, **form.cleaned_data)
            messages.success(request, "It is submitted. Its gates are being checked.")
            return redirect(made)
    except ReviewError as error:
        return refused(request, error, adapter.get_absolute_url())
    context = {"adapter": adapter, "form": form}
    return render(request, "reviews/submit.html", context, status=422 if form.errors else 200)


@never_cache
@require_safe
@team_page()
def adapter_review(request: TeamRequest, adapter_id: int) -> HttpResponse:
    """How an adapter stands in review, as a fragment for its page."""
    adapter = get_object_or_404(request.team.adapters, pk=adapter_id)
    return render(request, "reviews/_adapter_review.html", adapter_context(adapter, actor_of(request)))


def latest_review(adapter: Adapter) -> Review | None:
    """The newest review of an adapter."""
    return adapter.reviews.select_related("policy", "team").order_by("-pk").first()


def adapter_context(adapter: Adapter, actor: Actor) -> dict[str, Any]:
    """What `_adapter_review.html` shows; one query."""
    latest = latest_review(adapter)
    may = allowed_actions(actor, adapter, latest.state if latest else reviewing.NOT_REVIEWED)
    return {"adapter": adapter, "review": latest, "may": may}

"""Blind A/B samples of a review: one at a time, by keys or buttons, with or without JavaScript."""

from __future__ import annotations

from django.http import HttpResponse
from django.shortcuts import redirect, render
from django.utils.text import slugify
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_POST, require_safe

from studio.accounts.access import TeamRequest, team_page
from studio.accounts.models import record
from studio.reviews import judging
from studio.reviews.models import Choice, Review
from studio.reviews.reviewing import ReviewError, allowed_actions
from studio.reviews.views import actor_of, find_review, refused

KEYS = {Choice.A: "1", Choice.SAME: "2", Choice.B: "3", Choice.BAD: "4"}


@never_cache
@require_safe
@team_page()
def samples(request: TeamRequest, review_id: int) -> HttpResponse:
    """The sample that this person judges now, what they judged last, and how the verdicts stand."""
    return _page(request, find_review(request, review_id))


@require_POST
@team_page()
def next_sample(request: TeamRequest, review_id: int) -> HttpResponse:
    """Take the next sample, kept from others for a quarter of an hour."""
    found = find_review(request, review_id)
    try:
        judging.reserve_next(found, actor_of(request))
    except ReviewError as error:
        return refused(request, error, found.get_absolute_url())
    return _answer(request, found)


@require_POST
@team_page()
def judge(request: TeamRequest, review_id: int, item_id: int) -> HttpResponse:
    """Judge a sample, and take the next one."""
    found = find_review(request, review_id)
    actor = actor_of(request)
    try:
        judging.judge(found.pk, item_id, request.POST.get("choice", ""), actor)
        judging.reserve_next(found, actor)
    except ReviewError as error:
        return refused(request, error, found.get_absolute_url())
    return _answer(request, found)


@require_POST
@team_page()
def undo(request: TeamRequest, review_id: int) -> HttpResponse:
    """Take back one's newest verdict."""
    found = find_review(request, review_id)
    try:
        judging.undo(found.pk, actor_of(request))
    except ReviewError as error:
        return refused(request, error, found.get_absolute_url())
    return _answer(request, found)


@require_POST
@team_page()
def annotate(request: TeamRequest, review_id: int, item_id: int) -> HttpResponse:
    """Flag a sample, or write a note on it."""
    found = find_review(request, review_id)
    sent = request.POST
    try:
        judging.annotate(
            found.pk, item_id, actor_of(request),
            is_flagged=sent["is_flagged"] == "1" if "is_flagged" in sent else None, note=sent.get("note"),
        )  # fmt: skip
    except ReviewError as error:
        return refused(request, error, found.get_absolute_url())
    return _answer(request, found)


@require_safe
@team_page()
def export(request: TeamRequest, review_id: int) -> HttpResponse:
    """All verdicts as JSON Lines; with ?only=preferences the pairs that preference training reads."""
    found = find_review(request, review_id)
    only = request.GET.get("only") == "preferences"
    return export_response(request, found, preferences_only=only)


def export_response(request: TeamRequest, found: Review, *, preferences_only: bool) -> HttpResponse:
    """The verdicts of a review as a file, with an audit event."""
    lines = "".join(judging.verdict_lines(found, preferences_only=preferences_only))
    record("review.verdicts_exported", team=request.team, user=request.user, token=getattr(request, "token", None),
           target=found, preferences_only=preferences_only)  # fmt: skip
    name = f"{slugify(found.adapter.name)[:80] or 'adapter'}-v{found.adapter.version}-review-{found.pk}"
    kind = "preferences" if preferences_only else "verdicts"
    return HttpResponse(
        lines,
        content_type="application/x-ndjson; charset=utf-8",
        headers={"Content-Disposition": f'attachment; filename="{name}-{kind}.jsonl"'},
    )


def _answer(request: TeamRequest, found: Review) -> HttpResponse:
    return _page(request, found) if request.htmx else redirect("reviews:samples", found.pk)  # type: ignore[attr-defined]


def _page(request: TeamRequest, found: Review) -> HttpResponse:
    actor = actor_of(request)
    may = allowed_actions(actor, found.adapter, found.state)
    item = judging.reserved_item(found, actor) if "judge" in may else None
    context = {
        "review": found,
        "adapter": found.adapter,
        "tab": "samples",
        "item": item,
        "answer_a": item.answer("a") if item else "",
        "answer_b": item.answer("b") if item else "",
        "choices": [(choice.value, choice.label, KEYS[choice]) for choice in Choice],
        "last": judging.last_judged(found, actor),
        "tally": judging.tally_of(found),
        "may": may,
    }
    return render(request, "reviews/_blind.html" if request.htmx else "reviews/samples.html", context)  # type: ignore[attr-defined]

"""The discussion of a review: threads on it and on its samples."""

from __future__ import annotations

from django.http import HttpResponse
from django.shortcuts import redirect, render
from django.urls import reverse
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_http_methods, require_POST

from studio.accounts.access import TeamRequest, team_page
from studio.query_values import whole_number
from studio.reviews import commenting
from studio.reviews.commenting import CommentError
from studio.reviews.models import Review
from studio.reviews.reviewing import ReviewError, allowed_actions
from studio.reviews.views import actor_of, find_review, refused


@never_cache
@require_http_methods(["GET", "HEAD", "POST"])
@team_page()
def threads(request: TeamRequest, review_id: int) -> HttpResponse:
    """What was said, open threads first; a POST says something."""
    found = find_review(request, review_id)
    if request.method != "POST":
        return _page(request, found)
    sent = request.POST
    try:
        said = commenting.comment(
            found, actor_of(request), sent.get("text", ""), sample_id=whole_number(sent.get("sample", "")),
            answers=whole_number(sent.get("answers", "")),
        )  # fmt: skip
    except CommentError as error:
        return _page(request, found, errors={"text": error.message}, typed=sent.get("text", ""), status=422)
    except ReviewError as error:
        return refused(request, error, found.get_absolute_url())
    return _to(found, said.pk)


@require_POST
@team_page()
def edit(request: TeamRequest, review_id: int, comment_id: int) -> HttpResponse:
    """Change one's own comment."""
    found = find_review(request, review_id)
    try:
        commenting.edit(found, comment_id, actor_of(request), request.POST.get("text", ""))
    except CommentError as error:
        return _page(request, found, errors={"": error.message}, status=422)
    except ReviewError as error:
        return refused(request, error, found.get_absolute_url())
    return _to(found, comment_id)


@require_POST
@team_page()
def resolve(request: TeamRequest, review_id: int, comment_id: int) -> HttpResponse:
    """Settle a thread, or open it again (resolved=0)."""
    found = find_review(request, review_id)
    try:
        commenting.resolve(found, comment_id, actor_of(request), is_resolved=request.POST.get("resolved") != "0")
    except ReviewError as error:
        return refused(request, error, found.get_absolute_url())
    return _to(found, comment_id)


def _to(found: Review, comment_id: int) -> HttpResponse:
    return redirect(f"{reverse('reviews:threads', args=[found.pk])}#comment-{comment_id}")


def _page(
    request: TeamRequest, found: Review, *, errors: dict[str, str] | None = None, typed: str = "", status: int = 200
) -> HttpResponse:
    return render(
        request,
        "reviews/threads.html",
        {
            "review": found,
            "adapter": found.adapter,
            "tab": "threads",
            "threads": commenting.threads_of(found),
            "sample_id": request.GET.get("sample", ""),
            "may": allowed_actions(actor_of(request), found.adapter, found.state),
            "errors": errors,
            "typed": typed,
        },
        status=status,
    )

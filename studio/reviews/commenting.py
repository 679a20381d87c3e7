"""Threads on a review and on its samples: comments, answers, mentions, and whether a thread is settled."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from django.db import transaction
from django.utils import timezone
from django.utils.safestring import SafeString

from studio.accounts.models import Membership, record
from studio.markdown import render_markdown
from studio.reviews.models import Comment, Review
from studio.reviews.reviewing import Action, Actor, NotAllowedError, NotTheirsError, ReviewError, require

MAX_TEXT = 10_000
MAX_MENTIONS = 20
MAX_COMMENTS = 500
# Not in the middle of a word: an e-mail address mentions nobody.
_MENTION = re.compile(r"(?<![\w@.])@([\w.+-]{1,150})")


class CommentError(ReviewError):
    """A text that is no comment."""

    code = "invalid_comment"
    status = 422


@dataclass
class Thread:
    """A comment, its answers in order, and their text as HTML that is safe to show."""

    first: Comment
    html: SafeString
    answers: list[tuple[Comment, SafeString]] = field(default_factory=list)


def comment(
    review: Review, actor: Actor, text: str, *, sample_id: int | None = None, answers: int | None = None
) -> Comment:
    """A new comment, with an audit event for every member whom it mentions.

    Raises:
        CommentError: it is empty or too long.
        ReviewError: there is no such sample, or no such comment to answer.
    """
    require(Action.COMMENT, actor, review.adapter, review.state)
    text = _cleaned(text)
    if sample_id is not None and not review.adapter.samples.filter(pk=sample_id).exists():
        raise ReviewError("This review has no such sample.", field="sample_id")
    first = None
    if answers is not None:
        first = review.comments.filter(pk=answers).first()
        if first is None:
            raise ReviewError("There is no such comment to answer.", field="answers")
        # An answer to an answer belongs to the same thread.
        first = first if first.answers_id is None else first.answers
    with transaction.atomic():
        said = Comment.objects.create(
            review=review, author=actor.user, text=text, answers=first,
            sample_id=first.sample_id if first else sample_id,
        )  # fmt: skip
        record("review.commented", team=review.team, user=actor.user, token=actor.token, target=review, comment=said.pk)
        _tell_mentioned(review, actor, said, already=set())
    return said


def edit(review: Review, comment_id: int, actor: Actor, text: str) -> Comment:
    """One's own comment with another text; who is mentioned anew hears of it.

    Raises:
        NotAllowedError: it is somebody else's.
    """
    require(Action.COMMENT, actor, review.adapter, review.state)
    text = _cleaned(text)
    with transaction.atomic():
        said = _locked(review, comment_id)
        if said.author_id != actor.user.pk:
            raise NotAllowedError("Only who wrote a comment can change it.")
        already = mentioned_names(said.text)
        said.text, said.edited_at = text, timezone.now()
        said.save(update_fields=["text", "edited_at"])
        record("review.comment_edited", team=review.team, user=actor.user, token=actor.token, target=review,
               comment=said.pk)  # fmt: skip
        _tell_mentioned(review, actor, said, already=already)
    return said


def resolve(review: Review, comment_id: int, actor: Actor, *, is_resolved: bool = True) -> Comment:
    """A thread is settled, or not any more. Asking twice is harmless.

    Raises:
        ReviewError: the comment begins no thread.
    """
    require(Action.RESOLVE, actor, review.adapter, review.state)
    with transaction.atomic():
        said = _locked(review, comment_id)
        if said.answers_id is not None:
            raise ReviewError("This is an answer: resolve the comment that it answers.")
        if (said.resolved_at is not None) == is_resolved:
            return said
        said.resolved_at = timezone.now() if is_resolved else None
        said.resolved_by = actor.user if is_resolved else None
        said.save(update_fields=["resolved_at", "resolved_by"])
        action = "review.thread_resolved" if is_resolved else "review.thread_reopened"
        record(action, team=review.team, user=actor.user, token=actor.token, target=review, comment=said.pk)
    return said


def threads_of(review: Review) -> list[Thread]:
    """A review's threads, open ones first, in the order in which they began; one query."""
    rows = review.comments.select_related("author", "sample", "resolved_by").order_by("created_at", "pk")
    threads: dict[int, Thread] = {}
    for said in rows[:MAX_COMMENTS]:
        html = render_markdown(said.text)
        if said.answers_id is None:
            threads[said.pk] = Thread(said, html)
        elif said.answers_id in threads:
            threads[said.answers_id].answers.append((said, html))
    return sorted(threads.values(), key=lambda thread: thread.first.resolved_at is not None)


def mentioned_names(text: str) -> set[str]:
    """The user names that a text mentions, whoever they are."""
    return {found.rstrip(".-+").lower() for found in _MENTION.findall(text)}


def _tell_mentioned(review: Review, actor: Actor, said: Comment, *, already: set[str]) -> None:
    names = sorted(mentioned_names(said.text) - already)[:MAX_MENTIONS]
    if not names:
        return
    members = Membership.objects.filter(team=review.team).select_related("user").order_by("user__username")
    for member in members:
        if member.user.username.lower() in names and member.user_id != actor.user.pk:
            record("review.mentioned", team=review.team, user=actor.user, token=actor.token, target=review,
                   mentioned=member.user.username, mentioned_id=member.user_id, comment=said.pk)  # fmt: skip


def _locked(review: Review, comment_id: int) -> Comment:
    found = review.comments.select_for_update(of=("self",)).filter(pk=comment_id).first()
    if found is None:
        raise NotTheirsError("There is no such comment in this review.")
    return found


def _cleaned(text: str) -> str:
    text = text.replace("\r\n", "\n").strip()
    if not text:
        raise CommentError("A comment needs words.", field="text")
    if len(text) > MAX_TEXT:
        raise CommentError(f"A comment has at most {MAX_TEXT:,} characters; this one has {len(text):,}.", field="text")
    return text

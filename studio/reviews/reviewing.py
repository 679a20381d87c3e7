"""Everything that a review can become, and who may make it so.

    open -> approved | rejected | changes_asked | withdrawn | superseded

Every transition locks the review's row, looks at what is allowed in the state that it has by then, and changes it once:
of two people at once the second is told what the first did. The adapter's state and its alias move in the same
transaction.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from enum import StrEnum
from functools import partial
from typing import Any, Literal

from django.db import connection, transaction
from django.utils import timezone

from studio.accounts.models import ApiToken, Membership, Role, Team, User, record
from studio.catalogue.aliases import AliasError, move_alias, roll_back_alias
from studio.catalogue.models import Adapter, AdapterState, Alias
from studio.reviews import checking
from studio.reviews.gates import label_of
from studio.reviews.models import BlindItem, Review, Reviewer, ReviewState
from studio.reviews.policies import PolicySettings, stored_policy
from workers.errors import ExplainedError

MAX_ITEMS = 200
MAX_REASON = 4000
NOT_REVIEWED = ""
"""The state of an adapter that has no review."""


class Action(StrEnum):
    """What a person can do with a review."""

    SUBMIT = "submit"
    WITHDRAW = "withdraw"
    APPROVE = "approve"
    REJECT = "reject"
    ASK_CHANGES = "ask_changes"
    WAIVE = "waive"
    ASSIGN = "assign"
    JUDGE = "judge"
    RECHECK = "recheck"
    COMMENT = "comment"
    RESOLVE = "resolve"
    ROLL_BACK = "roll_back"


@dataclass(frozen=True)
class Rule:
    """Who may do something, and in which states of the review. `author`: of the adapter."""

    role: Role
    author: Literal["anybody", "the author", "not the author"]
    states: frozenset[str]


_OPEN = frozenset({ReviewState.OPEN.value})
_ANY = frozenset(state.value for state in ReviewState)
_CAN_BE_ASKED = frozenset({NOT_REVIEWED}) | (_ANY - {ReviewState.OPEN.value, ReviewState.APPROVED.value})

RULES: dict[Action, Rule] = {
    Action.SUBMIT: Rule(Role.TRAINER, "anybody", _CAN_BE_ASKED),
    Action.WITHDRAW: Rule(Role.TRAINER, "the author", _OPEN),
    Action.APPROVE: Rule(Role.LEAD, "not the author", _OPEN),
    Action.REJECT: Rule(Role.LEAD, "not the author", _OPEN),
    Action.ASK_CHANGES: Rule(Role.LEAD, "not the author", _OPEN),
    Action.WAIVE: Rule(Role.LEAD, "not the author", _OPEN),
    Action.JUDGE: Rule(Role.LEAD, "not the author", _OPEN),
    Action.ASSIGN: Rule(Role.LEAD, "anybody", _OPEN),
    Action.RECHECK: Rule(Role.TRAINER, "anybody", _OPEN | {ReviewState.APPROVED.value}),
    Action.COMMENT: Rule(Role.TRAINER, "anybody", _ANY),
    Action.RESOLVE: Rule(Role.TRAINER, "anybody", _ANY),
    Action.ROLL_BACK: Rule(Role.LEAD, "anybody", frozenset({ReviewState.APPROVED.value})),
}

_VERBS = {
    Action.SUBMIT: "submitted for review", Action.WITHDRAW: "withdrawn", Action.APPROVE: "approved",
    Action.REJECT: "rejected", Action.ASK_CHANGES: "sent back", Action.WAIVE: "waived", Action.JUDGE: "judged",
    Action.ASSIGN: "assigned", Action.RECHECK: "checked again", Action.COMMENT: "commented on",
    Action.RESOLVE: "resolved", Action.ROLL_BACK: "rolled back",
}  # fmt: skip


class ReviewError(ExplainedError):
    """What was asked of a review is not possible now; nothing was changed."""

    code = "review_state"
    status = 409


class NotAllowedError(ReviewError):
    """This person may not do this, whatever the review's state."""

    code = "not_allowed"
    status = 403


class NotTheirsError(ReviewError):
    """The review belongs to another team, of which nothing may be known."""

    code = "not_found"
    status = 404


@dataclass(frozen=True)
class Actor:
    """Who does something: a person in a team, by a page or by a token."""

    user: User
    role: Role
    team_id: int
    token: ApiToken | None = None


def allowed(action: Action, role: Role, *, is_author: bool, same_team: bool, state: str) -> bool:
    """Whether a person may do this with a review in this state."""
    rule = RULES[action]
    return same_team and role.includes(rule.role) and _fits_author(rule, is_author) and state in rule.states


def allowed_actions(actor: Actor, adapter: Adapter, state: str) -> set[str]:
    """What a page offers this person."""
    is_author, same_team = adapter.created_by_id == actor.user.pk, adapter.team_id == actor.team_id
    return {
        action.value for action in Action
        if allowed(action, actor.role, is_author=is_author, same_team=same_team, state=state)
    }  # fmt: skip


def _fits_author(rule: Rule, is_author: bool) -> bool:
    return rule.author == "anybody" or is_author == (rule.author == "the author")


def require(action: Action, actor: Actor, adapter: Adapter, state: str) -> None:
    """Nothing when it is allowed.

    Raises:
        NotTheirsError: it is another team's.
        NotAllowedError: not for this role, or not for the author, or for the author alone.
        ReviewError: not in this state.
    """
    rule = RULES[action]
    name = f"{adapter.name} v{adapter.version}"
    if adapter.team_id != actor.team_id:
        raise NotTheirsError("There is no such review.")
    if not actor.role.includes(rule.role):
        raise NotAllowedError(
            f"{name} was not {_VERBS[action]}: this needs the role {rule.role.value}, and yours is {actor.role.value}."
        )
    if not _fits_author(rule, adapter.created_by_id == actor.user.pk):
        why = (
            "you made this adapter, and nobody reviews their own work"
            if rule.author == "not the author"
            else f"only {adapter.created_by.display_name()}, who made it, may do that"
        )
        raise NotAllowedError(f"{name} was not {_VERBS[action]}: {why}.")
    if state not in rule.states:
        is_now = ReviewState(state).label.lower() if state else "not in review"
        raise ReviewError(f"{name} was not {_VERBS[action]}: it is {is_now}.", field="state")


@contextmanager
def locked(review_id: int, action: Action, actor: Actor) -> Iterator[Review]:
    """The review, its row locked until the block ends, once it is known that the person may do this now."""
    with transaction.atomic():
        rows = Review.objects.select_for_update(of=("self",)).select_related("adapter__created_by", "policy", "team")
        review = rows.get(pk=review_id)
        require(action, actor, review.adapter, review.state)
        yield review


def submit(
    adapter: Adapter, actor: Actor, *, alias: str = "champion", note: str = "", due_on: date | None = None
) -> Review:
    """A new open review of an adapter by the policy of today; open reviews of its older versions are superseded.

    Raises:
        ReviewError: it is in review or approved already, archived, or a newer version is in review.
    """
    with transaction.atomic():
        _one_at_a_time(adapter)
        adapter = Adapter.objects.select_related("created_by", "team").get(pk=adapter.pk)
        latest = adapter.reviews.order_by("-pk").first()
        require(Action.SUBMIT, actor, adapter, latest.state if latest else NOT_REVIEWED)
        if adapter.state == AdapterState.ARCHIVED:
            raise ReviewError(f"{adapter.name} v{adapter.version} is archived.", next_step="Take it out first.")
        others = Review.objects.filter(team=adapter.team, adapter__name=adapter.name, state=ReviewState.OPEN)
        newer = others.filter(adapter__version__gt=adapter.version).select_related("adapter").first()
        if newer is not None:
            raise ReviewError(f"A newer version, {newer}, is in review.", next_step="Withdraw that one first.")
        for older in others.select_for_update(of=("self",)).select_related("adapter"):
            _end(older, ReviewState.SUPERSEDED, AdapterState.DRAFT, reason=f"v{adapter.version} was submitted.")
            record("review.superseded", team=adapter.team, user=actor.user, token=actor.token, target=older,
                   by_version=adapter.version)  # fmt: skip
        review = Review.objects.create(
            team=adapter.team, adapter=adapter, policy=stored_policy(adapter.team), alias=alias, note=note.strip(),
            submitted_by=actor.user, due_on=due_on, gates_queued_at=timezone.now(),
        )  # fmt: skip
        Adapter.objects.filter(pk=adapter.pk).update(state=AdapterState.IN_REVIEW)
        _draw_items(review)
        record("review.submitted", team=adapter.team, user=actor.user, token=actor.token, target=review,
               adapter=adapter.pk, alias=alias, policy=review.policy.version)  # fmt: skip
        transaction.on_commit(partial(checking.queue_check, review.pk))
    return review


def withdraw(review_id: int, actor: Actor, *, reason: str = "") -> Review:
    """The author takes it back."""
    with locked(review_id, Action.WITHDRAW, actor) as review:
        _end(review, ReviewState.WITHDRAWN, AdapterState.DRAFT, by=actor.user, reason=reason)
        _record("review.withdrawn", review, actor)
    return review


def reject(review_id: int, actor: Actor, *, reason: str) -> Review:
    """It is not good enough; the reason is for the author."""
    reason = _required(reason, "Say why it is rejected.")
    with locked(review_id, Action.REJECT, actor) as review:
        _end(review, ReviewState.REJECTED, AdapterState.REJECTED, by=actor.user, reason=reason)
        _record("review.rejected", review, actor, reason=reason)
    return review


def ask_changes(review_id: int, actor: Actor, *, reason: str) -> Review:
    """Not yet: the reason says what is to change before it is submitted again."""
    reason = _required(reason, "Say what is to change.")
    with locked(review_id, Action.ASK_CHANGES, actor) as review:
        _end(review, ReviewState.CHANGES_ASKED, AdapterState.DRAFT, by=actor.user, reason=reason)
        _record("review.changes_asked", review, actor, reason=reason)
    return review


def approve(review_id: int, actor: Actor, *, comment: str = "") -> Review:
    """One reviewer's approval; the last one that the policy needs makes the adapter approved and moves the alias.

    Raises:
        ReviewError: gates do not pass and are not waived, or are being checked; or this person approved it already.
    """
    with locked(review_id, Action.APPROVE, actor) as review:
        if review.adapter.state != AdapterState.IN_REVIEW:
            raise ReviewError(
                f"{review} was not approved: the adapter is {review.adapter.get_state_display().lower()}."
            )
        _require_gates(review)
        part, _ = Reviewer.objects.get_or_create(review=review, user=actor.user)
        if part.approved_at is not None:
            raise ReviewError("You have approved it already: it needs the approval of somebody else, too.")
        part.approved_at, part.comment = timezone.now(), comment.strip()[:MAX_REASON]
        part.save(update_fields=["approved_at", "comment"])
        num_approvals = review.reviewers.filter(approved_at__isnull=False).count()
        needed = PolicySettings.from_dict(review.policy.settings).approvals
        _record("review.approval_given", review, actor, num_approvals=num_approvals, num_needed=needed)
        if num_approvals >= needed:
            _conclude(review, actor)
    return review


def waive(review_id: int, actor: Actor, *, gate: str, reason: str) -> Review:
    """A lead lets a gate that did not pass be no hindrance, with a written reason.

    Raises:
        ReviewError: the review has no such gate, or it passed.
    """
    reason = _required(reason, "Say why this gate may be passed over.")
    with locked(review_id, Action.WAIVE, actor) as review:
        if review.gates_are_due():
            raise ReviewError("The gates are being checked at this moment.", next_step="Wait a few seconds.")
        outcome = review.outcomes.filter(gate=gate).first()
        if outcome is None:
            raise ReviewError(f'This review has no gate called "{gate}".', field="gate")
        if outcome.lets_pass():
            raise ReviewError(f"“{label_of(gate)}” is no hindrance: there is nothing to waive.", field="gate")
        outcome.waived_by, outcome.waived_at, outcome.waiver_reason = actor.user, timezone.now(), reason
        outcome.save(update_fields=["waived_by", "waived_at", "waiver_reason"])
        _record("review.gate_waived", review, actor, gate=gate, found=outcome.sentence, reason=reason)
    return review


def assign(
    review_id: int, actor: Actor, *, user_ids: Collection[int] | None = None, due_on: date | Literal[""] | None = ""
) -> Review:
    """Ask these people to review it, and no others; set a due date. What is left out stays as it is.

    Raises:
        ReviewError: a person may not review it: no lead of the team, or its author.
    """
    with locked(review_id, Action.ASSIGN, actor) as review:
        if user_ids is not None:
            _assign(review, actor, set(user_ids))
        if due_on != "" and due_on != review.due_on:
            Review.objects.filter(pk=review.pk).update(due_on=due_on)
            review.due_on = due_on
            _record("review.due_changed", review, actor, due_on=due_on.isoformat() if due_on else None)
    return review


def ask_gates(review_id: int, actor: Actor) -> Review:
    """Have all gates checked again."""
    with locked(review_id, Action.RECHECK, actor) as review:
        checking.ask_again(review.pk)
        _record("review.gates_asked", review, actor)
    review.refresh_from_db()
    return review


def roll_back(review_id: int, actor: Actor) -> Review:
    """The alias that this review moved goes back to the version before.

    Raises:
        ReviewError: the alias points elsewhere by now, or there is no version before.
    """
    with locked(review_id, Action.ROLL_BACK, actor) as review:
        adapter = review.adapter
        if not Alias.objects.filter(team=review.team, adapter=adapter, name=review.alias).exists():
            raise ReviewError(f"The alias {review.alias} does not point at {review} any more.")
        try:
            moved_to = roll_back_alias(adapter, review.alias, by=actor.user, token=actor.token)
        except AliasError as error:
            raise ReviewError(error.message, next_step=error.next_step) from error
        _record("review.rolled_back", review, actor, alias=review.alias, moved_to=moved_to.version)
    return review


def may_review(team: Team, adapter: Adapter) -> list[Membership]:
    """The members who may review an adapter."""
    roles = [role for role in Role if role.includes(RULES[Action.APPROVE].role)]
    found = team.memberships.filter(role__in=roles, user__is_active=True).exclude(user_id=adapter.created_by_id)
    return list(found.select_related("user").order_by("user__username"))


def _assign(review: Review, actor: Actor, wanted: set[int]) -> None:
    possible = {member.user_id: member.user for member in may_review(review.team, review.adapter)}
    if wanted - set(possible):
        raise ReviewError(
            "Only leads and admins of the team who did not make the adapter can review it.", field="reviewers"
        )
    now = set(review.reviewers.filter(is_assigned=True).values_list("user_id", flat=True))
    review.reviewers.filter(user_id__in=now - wanted).update(is_assigned=False)
    for user_id in sorted(wanted - now):
        Reviewer.objects.update_or_create(review=review, user_id=user_id, defaults={"is_assigned": True})
        _record("review.assigned", review, actor, reviewer=possible[user_id].username, reviewer_id=user_id)
    for user in User.objects.filter(pk__in=now - wanted).order_by("pk"):
        _record("review.unassigned", review, actor, reviewer=user.username, reviewer_id=user.pk)


def _require_gates(review: Review) -> None:
    if review.gates_are_due():
        raise ReviewError(
            "The gates are being checked at this moment, so nothing was approved.", next_step="Wait a few seconds."
        )
    hindering = [label_of(one.gate) for one in review.outcomes.all() if not one.lets_pass()]
    if hindering:
        raise ReviewError(
            f"{review} was not approved: {len(hindering)} gate{'s' * (len(hindering) > 1)} did not pass "
            f"({'; '.join(hindering)}).",
            next_step="Waive them with a reason, ask for changes, or reject it.",
        )


def _conclude(review: Review, actor: Actor) -> None:
    review.decided_gates = [
        {"gate": one.gate, "state": one.state, "sentence": one.sentence, "waived": one.is_waived()}
        for one in review.outcomes.order_by("pk")
    ]
    _end(review, ReviewState.APPROVED, AdapterState.APPROVED, by=actor.user)
    move_alias(review.adapter, review.alias, by=actor.user, token=actor.token, reason=f"Approved in review {review.pk}")
    _record("review.approved", review, actor, alias=review.alias)


def _end(
    review: Review, state: ReviewState, adapter_state: AdapterState, *, by: User | None = None, reason: str = ""
) -> None:
    """The one place where a review ends; its row is locked."""
    review.state, review.decided_by, review.decided_at = state, by, timezone.now()
    review.reason = reason.strip()[:MAX_REASON]
    review.save(update_fields=["state", "decided_by", "decided_at", "reason", "decided_gates"])
    # An adapter that was archived meanwhile stays so.
    Adapter.objects.filter(pk=review.adapter_id, state=AdapterState.IN_REVIEW).update(state=adapter_state)
    review.adapter.refresh_from_db(fields=["state"])


def _draw_items(review: Review) -> None:
    """The samples in an order of this review's own, base and adapter on sides that were drawn."""
    # Seeded by nothing: who can guess the order would not be blind.
    draw = random.SystemRandom()
    samples = list(review.adapter.samples.values_list("pk", flat=True))
    draw.shuffle(samples)
    BlindItem.objects.bulk_create(
        BlindItem(review=review, sample_id=sample_id, position=position, adapter_is_a=draw.random() < 0.5)
        for position, sample_id in enumerate(samples[:MAX_ITEMS], start=1)
    )


def _one_at_a_time(adapter: Adapter) -> None:
    """Others that submit an adapter of this name wait for this transaction."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT pg_advisory_xact_lock(hashtextextended(%s, %s))", [f"review {adapter.name}", adapter.team_id]
        )


def _required(reason: str, sentence: str) -> str:
    if not reason.strip():
        raise MissingReasonError(sentence, field="reason")
    return reason.strip()[:MAX_REASON]


class MissingReasonError(ReviewError):
    """This needs a reason in words."""

    code = "reason_missing"
    status = 422


def _record(action: str, review: Review, actor: Actor, **details: Any) -> None:
    record(action, team=review.team, user=actor.user, token=actor.token, target=review,
           adapter=review.adapter_id, **details)  # fmt: skip

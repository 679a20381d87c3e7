"""What the pages and the API show of reviews: inboxes, gates with the failing ones first, and who is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

from django.db.models import Count, Exists, OuterRef, Prefetch, Q, QuerySet, Value
from django.db.models.functions import Coalesce

from studio.accounts.models import Team, User
from studio.catalogue.models import Adapter, Score
from studio.keyset import Key
from studio.reviews.gates import gates, label_of
from studio.reviews.models import GateOutcome, GateState, Review, Reviewer, ReviewState
from studio.reviews.policies import PolicySettings
from workers.verdicts import Verdict

ASSIGNED, WAITING, DONE = "assigned", "waiting", "done"
TABS = {ASSIGNED: "Assigned to me", WAITING: "Waiting", DONE: "Done"}
_GATE_ORDER = {GateState.FAILED: 0, GateState.UNKNOWN: 1, GateState.PASSED: 3}
_WORST_FIRST = [Verdict.WORSE, Verdict.TOO_FEW_ROWS, Verdict.NO_DIFFERENCE, Verdict.BETTER]


@dataclass(frozen=True)
class GateRow:
    """A gate of a review's policy as the page shows it; `outcome` is None before it was checked."""

    name: str
    label: str
    help: str
    outcome: GateOutcome | None
    was: str
    """Its state at the approval, where it is another now; else empty."""

    @property
    def is_hindrance(self) -> bool:
        return self.outcome is None or not self.outcome.lets_pass()

    @property
    def has_failed(self) -> bool:
        return self.outcome is not None and self.outcome.state == GateState.FAILED and not self.outcome.is_waived()


def gate_rows(review: Review, outcomes: Sequence[GateOutcome]) -> list[GateRow]:
    """The gates of a review: failing first, then those that are not known, waived ones, and those that passed."""
    found = {one.gate: one for one in outcomes}
    then = {one["gate"]: one["state"] for one in review.decided_gates}
    rows = []
    for name in PolicySettings.from_dict(review.policy.settings).gates:
        outcome = found.get(name)
        was = then.get(name, "")
        changed = was if outcome is not None and was and was != outcome.state else ""
        rows.append(
            GateRow(name, label_of(name), gates()[name].help, outcome, GateState(changed).label if changed else "")
        )
    return sorted(rows, key=_gate_rank)


def _gate_rank(row: GateRow) -> int:
    if row.outcome is None:
        return 1
    return 2 if row.outcome.is_waived() else _GATE_ORDER[GateState(row.outcome.state)]


def reviews_of(team: Team) -> QuerySet[Review]:
    """A team's reviews with what every list and page shows of them."""
    return team.reviews.select_related(
        "adapter__base_model", "adapter__created_by", "policy", "submitted_by", "decided_by", "team"
    ).defer("adapter__recipe", "adapter__files", "adapter__suspicious")


def reviews_for_page(team: Team) -> QuerySet[Review]:
    """A team's reviews with what one's own page shows besides: what was measured of the adapter and found in it."""
    scores = Prefetch("adapter__scores", Score.objects.select_related("run__suite").order_by("pk"))
    return (
        reviews_of(team)
        .select_related("adapter__file_check")
        .prefetch_related(scores)
        .defer(None)
        .defer("adapter__recipe", "adapter__files", "adapter__card", "adapter__search")
    )


def inbox(team: Team, user: User, tab: str) -> QuerySet[Review]:
    """The reviews of a tab, with their outcomes and reviewers at hand, in the order of `inbox_order`."""
    rows = reviews_of(team).prefetch_related(
        "outcomes", Prefetch("reviewers", Reviewer.objects.select_related("user").order_by("user__username"))
    )
    if tab == DONE:
        return rows.exclude(state=ReviewState.OPEN)
    # Those that nobody has set a date for come after all that have one.
    rows = rows.filter(state=ReviewState.OPEN).annotate(wanted_on=Coalesce("due_on", Value(date.max)))
    return rows.filter(_assigned_to(user)) if tab == ASSIGNED else rows


def inbox_order(tab: str) -> list[Key]:
    """What waits: by the date that it is wanted on, then the longest waiting first. What is done: the last first."""
    if tab == DONE:
        return [Key("decided_at", is_descending=True), Key("pk", is_descending=True)]
    return [Key("wanted_on"), Key("created_at"), Key("pk")]


def inbox_counts(team: Team, user: User) -> dict[str, int]:
    """How many open reviews there are, and how many of them this person was asked to look at; one query."""
    is_open = Q(state=ReviewState.OPEN)
    found = team.reviews.filter(is_open).aggregate(
        waiting=Count("pk"), assigned=Count("pk", filter=Q(_assigned_to(user)))
    )
    return {WAITING: found["waiting"], ASSIGNED: found["assigned"]}


def _assigned_to(user: User) -> Exists:
    return Exists(Reviewer.objects.filter(review=OuterRef("pk"), user=user, is_assigned=True))


def summarise(review: Review) -> dict[str, Any]:
    """A review's gates and approvals as numbers, from what was prefetched."""
    outcomes, people = list(review.outcomes.all()), list(review.reviewers.all())
    settings = PolicySettings.from_dict(review.policy.settings)
    return {
        "num_gates": len(settings.gates),
        "num_passing": sum(one.lets_pass() for one in outcomes),
        "hindering": [label_of(one.gate) for one in outcomes if not one.lets_pass()],
        "num_approvals": sum(one.approved_at is not None for one in people),
        "approvals_needed": settings.approvals,
        "assigned": [one.user for one in people if one.is_assigned],
    }


def scores_worst_first(adapter: Adapter) -> list[Score]:
    """Every score of an adapter's newest runs, regressions first; from the scores that `reviews_for_page` fetched."""
    newest: dict[tuple[str, int | None, str], Score] = {}
    for score in adapter.scores.all():
        newest[score.test_set, score.run.suite_id, score.evaluation] = score
    return sorted(newest.values(), key=lambda score: (_WORST_FIRST.index(score.verdict()), score.test_set, score.label))

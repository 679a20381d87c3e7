"""Every (role, team, author or not, state, action), held to a table that was written by hand, on pages and by API."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest
from django.db import transaction
from django.test import Client
from django.utils import timezone

from studio.accounts.models import ApiToken, AuditEvent, Membership, Role, Team, User
from studio.catalogue.aliases import move_alias
from studio.catalogue.models import Adapter, AdapterState
from studio.reviews.models import BlindItem, Comment, GateOutcome, Review, ReviewState
from studio.reviews.reviewing import Action, allowed
from tests.conftest import signed_in
from tests.studio.reviews.conftest import submitted

# Written from the issue, not from the code. Rows: what; by whom of the adapter's own team ("+" made it, "-" did not);
# in which states of its newest review ("none": it has none).
TABLE = """
submit      | trainer+ trainer- lead+ lead- admin+ admin- | none changes_asked rejected withdrawn superseded
withdraw    | trainer+ lead+ admin+                       | open
approve     | lead- admin-                                | open
reject      | lead- admin-                                | open
ask_changes | lead- admin-                                | open
waive       | lead- admin-                                | open
judge       | lead- admin-                                | open
assign      | lead+ lead- admin+ admin-                   | open
recheck     | trainer+ trainer- lead+ lead- admin+ admin- | open approved
comment     | trainer+ trainer- lead+ lead- admin+ admin- | open changes_asked approved rejected withdrawn superseded
resolve     | trainer+ trainer- lead+ lead- admin+ admin- | open changes_asked approved rejected withdrawn superseded
roll_back   | lead+ lead- admin+ admin-                   | approved
"""
ROWS = {
    action.strip(): (set(who.split()), set(states.split()))
    for action, who, states in (line.split("|") for line in TABLE.strip().splitlines())
}
ACTIONS = tuple(ROWS)
ROLES = ("viewer", "trainer", "lead", "admin")
STATES = ("none", "open", "changes_asked", "approved", "rejected", "withdrawn", "superseded")


@dataclass(frozen=True)
class Case:
    action: str
    role: str
    same_team: bool
    is_author: bool
    state: str

    def is_allowed(self) -> bool:
        who, states = ROWS[self.action]
        return self.same_team and f"{self.role}{'+' if self.is_author else '-'}" in who and self.state in states


def cases() -> Iterator[Case]:
    for action, role, same_team, is_author, state in itertools.product(
        ACTIONS, ROLES, (True, False), (True, False), STATES
    ):
        # Without a review there is nothing but submitting.
        if state != "none" or action == "submit":
            yield Case(action, role, same_team, is_author, state)


def test_the_table_is_about_every_action_role_and_state() -> None:
    assert set(ACTIONS) == {action.value for action in Action}
    assert set(ROLES) == set(Role.values)
    assert set(STATES) == {"none", *ReviewState.values}
    assert len(list(cases())) == 12 * 4 * 2 * 2 * 6 + 4 * 2 * 2


def test_the_code_allows_what_the_table_allows() -> None:
    for case in cases():
        said = allowed(
            Action(case.action), Role(case.role), is_author=case.is_author, same_team=case.same_team,
            state="" if case.state == "none" else case.state,
        )  # fmt: skip
        assert said == case.is_allowed(), case


@dataclass
class Stage:
    """One adapter with a review, and a person whose place in it changes from case to case."""

    adapter: Adapter
    review: Review
    pat: User
    member: Membership
    team: Team
    other_team: Team
    author: User
    item: BlindItem
    comment: Comment
    older: Adapter
    client: Client
    tokens: dict[bool, str]

    def set(self, case: Case) -> None:
        team = self.team if case.same_team else self.other_team
        Membership.objects.filter(pk=self.member.pk).update(team=team, role=case.role)
        Adapter.objects.filter(pk=self.adapter.pk).update(
            created_by=self.pat if case.is_author else self.author,
            state={"open": AdapterState.IN_REVIEW, "approved": AdapterState.APPROVED}.get(
                case.state, AdapterState.DRAFT
            ),
        )
        if case.state == "none":
            Review.objects.all().delete()
            return
        ended = None if case.state == "open" else timezone.now()
        Review.objects.filter(pk=self.review.pk).update(state=case.state, decided_at=ended)
        if case.action == "waive":
            GateOutcome.objects.filter(review=self.review, gate="overlap").update(state="failed")
        if case.action == "roll_back":
            move_alias(self.older, "champion", by=None)
            move_alias(self.adapter, "champion", by=None)

    def paths(self, case: Case) -> tuple[str, dict[str, Any], str, dict[str, Any]]:
        """(page, form, API, body) of an action."""
        one = f"/reviews/{self.review.pk}"
        slug = case.action.replace("_", "-")
        reason = {"reason": "Because."}
        match case.action:
            case "submit":
                return (f"/reviews/submit/{self.adapter.pk}/", {"alias": "champion"},
                        "/reviews/", {"adapter_id": self.adapter.pk})  # fmt: skip
            case "withdraw" | "reject" | "ask_changes":
                return f"{one}/{slug}/", reason, f"{one}/{slug}/", reason
            case "approve" | "recheck" | "roll_back":
                return f"{one}/{slug}/", {}, f"{one}/{slug}/", {}
            case "waive":
                waiver = reason | {"gate": "overlap"}
                return f"{one}/waive/", waiver, f"{one}/waive/", waiver
            case "judge":
                verdict = {"choice": "a"}
                path = f"{one}/samples/{self.item.pk}/judge/"
                return path, verdict, path, verdict
            case "assign":
                due = {"due_on": "2030-01-02"}
                return f"{one}/people/", due, f"{one}/assign/", due
            case "comment":
                text = {"text": "Look here."}
                return f"{one}/threads/", text, f"{one}/comments/", text
            case "resolve":
                return (f"{one}/threads/{self.comment.pk}/resolve/", {"resolved": "1"},
                        f"{one}/comments/{self.comment.pk}/resolve/", {"is_resolved": True})  # fmt: skip
        raise AssertionError(case.action)


@pytest.fixture
def stage(team: Team, other_team: Team, bob: User, make_good: Any) -> Stage:
    older, adapter = make_good(), make_good()
    review = submitted(adapter)
    assert {one.state for one in review.outcomes.all()} == {"passed"}
    pat = User.objects.create_user("pat")
    member = Membership.objects.create(user=pat, team=team, role=Role.LEAD)
    item = review.items.order_by("position").first()
    later = timezone.now() + timedelta(hours=1)
    BlindItem.objects.filter(pk=item.pk).update(reserved_by=pat, reserved_until=later)
    comment = Comment.objects.create(review=review, author=bob, text="Hm.")
    tokens = {
        same: ApiToken.issue(team=one, user=pat, name="x", scopes=["read", "write"])[1]
        for same, one in ((True, team), (False, other_team))
    }
    return Stage(adapter, review, pat, member, team, other_team, bob, item, comment, older, signed_in(pat), tokens)


@pytest.mark.parametrize("channel", ["page", "API"])
@pytest.mark.parametrize("action", ACTIONS)
def test_a_request_does_what_the_table_allows_and_nothing_else(stage: Stage, action: str, channel: str) -> None:
    for case in (one for one in cases() if one.action == action):
        page, form, path, body = stage.paths(case)
        with transaction.atomic():
            stage.set(case)
            before, was = AuditEvent.objects.count(), list(Review.objects.order_by("pk").values("pk", "state"))
            if channel == "page":
                answer = stage.client.post(page, form)
            else:
                token = {"Authorization": f"Bearer {stage.tokens[case.same_team]}"}
                answer = stage.client.post(f"/api/v1{path}", body, content_type="application/json", headers=token)
            num_events = AuditEvent.objects.count() - before
            now = list(Review.objects.order_by("pk").values("pk", "state"))
            transaction.set_rollback(True)
        if case.is_allowed():
            assert answer.status_code == 302 if channel == "page" else answer.status_code in {200, 201, 202}, case
            assert num_events >= 1, case
        else:
            expected = {403, 409} if case.same_team else {404} if channel == "page" or case.role != "viewer" else {403}
            assert answer.status_code in expected, (case, answer.status_code)
            assert (num_events, now) == (0, was), case

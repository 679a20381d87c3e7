"""REST endpoints of reviews and policies: the same verbs as the pages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date, datetime
from typing import Any, Literal

from django.http import HttpResponse
from django.shortcuts import get_object_or_404
from ninja import Query, Router
from pydantic import Field

from studio.accounts.models import Role, Scope
from studio.api.auth import ApiRequest, Token, may_write
from studio.api.errors import ERRORS, ApiError
from studio.api.paging import Page, PageQuery, page_of, require_cursor
from studio.api.schemas import Body, Out, QueryFields
from studio.catalogue.api import FindingOut
from studio.catalogue.findings import Finding, findings_of
from studio.keyset import read_page
from studio.reviews import commenting, judging, reviewing, showing
from studio.reviews.blind_pages import export_response
from studio.reviews.gates import gates, label_of
from studio.reviews.models import BlindItem, Comment, Policy, Review
from studio.reviews.policies import PolicySettings, change_policy, current_policy, thresholds_in
from studio.reviews.reviewing import MAX_REASON, ReviewError
from studio.reviews.views import actor_of

router = Router(tags=["reviews"])
may_lead = Token(Scope.WRITE, Role.LEAD)


@contextmanager
def explained() -> Iterator[None]:
    """A refusal of `reviewing` in the API's form, with its own status."""
    try:
        yield
    except ReviewError as error:
        raise ApiError(error.status, error.code, error.message, field=error.field, help=error.next_step) from error


class PolicyOut(Out):
    """A version of what the team asks of an adapter."""

    version: int
    approvals: int
    gates: dict[str, dict[str, Any]] = Field(description="Settings of the gates that are on, by name.")
    scans: dict[str, dict[str, Any]] = Field(description="Scans that block training, and above what.")
    note: str
    created_by: str | None
    created_at: datetime | None = Field(description="null: the defaults, which nobody has changed")

    @staticmethod
    def resolve_approvals(policy: Policy) -> int:
        return PolicySettings.from_dict(policy.settings).approvals

    @staticmethod
    def resolve_gates(policy: Policy) -> dict[str, dict[str, Any]]:
        return PolicySettings.from_dict(policy.settings).gates

    @staticmethod
    def resolve_scans(policy: Policy) -> dict[str, dict[str, Any]]:
        return PolicySettings.from_dict(policy.settings).to_dict()["scans"]

    @staticmethod
    def resolve_created_by(policy: Policy) -> str | None:
        return policy.created_by.username if policy.created_by else None


class PolicyBody(Body):
    """The whole policy: a gate that is left out is off, a threshold that is left out has its default."""

    approvals: int = 1
    gates: dict[str, dict[str, Any]]
    scans: dict[str, dict[str, Any]] | None = Field(
        None,
        description='Scans that block training, by name: {"secrets": {"most": 0, "unit": "rows"}}; the unit may be '
        '"percent". A scan that is left out blocks nothing; without the field all stay as they are.',
    )
    note: str = Field("", max_length=200)


class GateOut(Out):
    """A gate that there is, with what can be set."""

    name: str
    label: str
    help: str
    settings: dict[str, Any] = Field(description="Its thresholds with their defaults.")


class OutcomeOut(Out):
    """What a gate said of the adapter; "unknown" is no pass."""

    gate: str
    label: str
    state: str = Field(description="passed, failed or unknown")
    sentence: str
    figures: dict[str, Any]
    waived_by: str | None
    waiver_reason: str
    checked_at: datetime

    @staticmethod
    def resolve_label(outcome: Any) -> str:
        return label_of(outcome.gate)

    @staticmethod
    def resolve_waived_by(outcome: Any) -> str | None:
        return outcome.waived_by.username if outcome.waived_by else None


class ReviewOut(Out):
    """A review as it stands."""

    id: int
    adapter_id: int
    adapter_name: str = Field(alias="adapter.name")
    adapter_version: int = Field(alias="adapter.version")
    state: str
    alias: str
    note: str
    due_on: date | None
    policy_version: int = Field(alias="policy.version")
    reason: str
    submitted_by: str | None
    decided_by: str | None
    created_at: datetime
    decided_at: datetime | None
    gates_are_due: bool = Field(description="Whether the gates are being checked, so that nothing can be approved yet.")

    @staticmethod
    def resolve_submitted_by(review: Review) -> str | None:
        return review.submitted_by.username if review.submitted_by else None

    @staticmethod
    def resolve_decided_by(review: Review) -> str | None:
        return review.decided_by.username if review.decided_by else None

    @staticmethod
    def resolve_gates_are_due(review: Review) -> bool:
        return review.gates_are_due()


class TallyOut(Out):
    """Blind verdicts: how often each side won, and the exact 95 % interval of the adapter's share of the decided."""

    num_items: int
    num_judged: int
    adapter: int
    base: int
    same: int
    bad: int
    share: float | None
    low: float | None
    high: float | None


class ReviewDetailOut(ReviewOut):
    """A review with its gates, failing ones first, and its people."""

    gates: list[OutcomeOut]
    approvals_needed: int
    approved_by: list[str]
    assigned: list[str]
    blind: TallyOut
    decided_gates: list[dict[str, Any]] = Field(description="The gates as they stood at the approval.")
    findings: list[FindingOut] = Field(description="What can be wrong with the adapter, the worst first.")

    @staticmethod
    def resolve_findings(review: Review) -> list[Finding]:
        return findings_of(review.adapter, thresholds_in(PolicySettings.from_dict(review.policy.settings)))

    @staticmethod
    def resolve_gates(review: Review) -> list[Any]:
        rows = showing.gate_rows(review, list(review.outcomes.select_related("waived_by")))
        return [row.outcome for row in rows if row.outcome is not None]

    @staticmethod
    def resolve_approvals_needed(review: Review) -> int:
        return PolicySettings.from_dict(review.policy.settings).approvals

    @staticmethod
    def resolve_approved_by(review: Review) -> list[str]:
        return [one.user.username for one in review.reviewers.select_related("user") if one.approved_at]

    @staticmethod
    def resolve_assigned(review: Review) -> list[str]:
        return [one.user.username for one in review.reviewers.select_related("user") if one.is_assigned]

    @staticmethod
    def resolve_blind(review: Review) -> Any:
        return judging.tally_of(review)


class ReviewFilters(PageQuery):
    """Which reviews: assigned to the token's maker, waiting, done; all without."""

    tab: Literal["assigned", "waiting", "done", ""] = ""
    adapter_id: int | None = None


class SubmitBody(Body):
    """An adapter to be reviewed."""

    adapter_id: int
    alias: str = Field("champion", pattern=r"^[-a-zA-Z0-9_]{1,40}$", description="Moves to the adapter on approval.")
    note: str = Field("", max_length=MAX_REASON)
    due_on: date | None = None


class ReasonBody(Body):
    """Why."""

    reason: str = Field("", max_length=MAX_REASON)


class ApproveBody(Body):
    """What to say with an approval."""

    comment: str = Field("", max_length=MAX_REASON)


class WaiveBody(Body):
    """A gate that did not pass, and why it may be passed over."""

    gate: str
    reason: str = Field("", max_length=MAX_REASON)


class AssignBody(Body):
    """Who is asked, by user name, and nobody else; until when. What is left out stays as it is."""

    reviewers: list[str] | None = None
    due_on: date | None = None


class ItemOut(Out):
    """A sample to judge: two answers of which nobody knows whose they are until there is a verdict."""

    id: int
    line: int = Field(alias="sample.line")
    prompt: str = Field(alias="sample.prompt")
    reference: str = Field(alias="sample.reference")
    a: str
    b: str
    reserved_until: datetime | None
    choice: str
    winner: str = Field(description="adapter, base, same or bad; empty before the verdict")
    is_flagged: bool
    note: str

    @staticmethod
    def resolve_a(item: BlindItem) -> str:
        return item.answer("a")

    @staticmethod
    def resolve_b(item: BlindItem) -> str:
        return item.answer("b")

    @staticmethod
    def resolve_winner(item: BlindItem) -> str:
        return item.winner()


class JudgeBody(Body):
    """A verdict: a (A better), same, b (B better) or bad (both bad)."""

    choice: str


class AnnotateBody(Body):
    """A flag or a note on a sample."""

    is_flagged: bool | None = None
    note: str | None = Field(None, max_length=MAX_REASON)


class CommentOut(Out):
    """Something that was said; `answers` is the id of the thread's first comment."""

    id: int
    author: str = Field(alias="author.username")
    text: str
    sample_id: int | None
    answers: int | None = Field(alias="answers_id")
    created_at: datetime
    edited_at: datetime | None
    resolved_at: datetime | None


class CommentBody(Body):
    """Markdown; @name tells a member of the team."""

    text: str
    sample_id: int | None = None
    answers: int | None = None


class TextBody(Body):
    """Another text for a comment."""

    text: str


class ResolveBody(Body):
    """Whether a thread is settled."""

    is_resolved: bool = True


class ExportQuery(QueryFields):
    """Which verdicts."""

    only: Literal["preferences", ""] = ""


def _find(request: ApiRequest, review_id: int) -> Review:
    return get_object_or_404(showing.reviews_of(request.team), pk=review_id)


def _shown(request: ApiRequest, review_id: int) -> Review:
    return get_object_or_404(showing.reviews_for_page(request.team), pk=review_id)


@router.get("policies/", response={200: Page[PolicyOut], **ERRORS}, summary="Versions of the review policy")
def list_policies(request: ApiRequest, filters: Query[PageQuery]) -> dict[str, Any]:
    """The newest first; empty while the team has the defaults, which policies/current/ shows."""
    return page_of(request.team.policies.select_related("created_by"), filters)


@router.get("policies/gates/", response={200: list[GateOut], **ERRORS}, summary="The gates that a policy may have")
def list_gates(request: ApiRequest) -> list[dict[str, Any]]:
    return [
        {"name": name, "label": gate.label, "help": gate.help,
         "settings": {one.name: one.default for one in gate.thresholds}}
        for name, gate in gates().items()
    ]  # fmt: skip


@router.get("policies/current/", response={200: PolicyOut, **ERRORS}, summary="The policy that holds now")
def get_policy(request: ApiRequest) -> Policy:
    return current_policy(request.team)


@router.post("policies/", response={201: PolicyOut, **ERRORS}, auth=may_lead, summary="A new version of the policy")
def post_policy(request: ApiRequest, body: PolicyBody) -> tuple[int, Policy]:
    """Reviews that run keep theirs. Needs a token of a lead or an admin."""
    scans = body.scans
    if scans is None:
        scans = PolicySettings.from_dict(current_policy(request.team).settings).to_dict()["scans"]
    settings = PolicySettings.cleaned(body.approvals, body.gates, scans)
    return 201, change_policy(request.team, settings, by=request.user, note=body.note, token=request.token)


@router.get("reviews/", response={200: Page[ReviewOut], **ERRORS}, summary="The team's reviews")
def list_reviews(request: ApiRequest, filters: Query[ReviewFilters]) -> dict[str, Any]:
    """The newest first; with a `tab` in its order on the page: what waits by due date, then the longest waiting."""
    rows = showing.inbox(request.team, request.user, filters.tab) if filters.tab else showing.reviews_of(request.team)
    if filters.adapter_id is not None:
        rows = rows.filter(adapter_id=filters.adapter_id)
    if not filters.tab:
        return page_of(rows, filters)
    keys = showing.inbox_order(filters.tab)
    require_cursor(filters.after, keys)
    page = read_page(rows, keys, {"after": filters.after}, size=filters.limit)
    return {"items": page.rows, "next": page.after or None}


@router.post("reviews/", response={201: ReviewDetailOut, **ERRORS}, auth=may_write, summary="Submit an adapter")
def post_review(request: ApiRequest, body: SubmitBody) -> tuple[int, Review]:
    """Its gates are checked in the background; open reviews of older versions are superseded."""
    adapter = get_object_or_404(request.team.adapters, pk=body.adapter_id)
    with explained():
        made = reviewing.submit(adapter, actor_of(request), alias=body.alias, note=body.note, due_on=body.due_on)
    return 201, _shown(request, made.pk)


@router.get("reviews/{int:review_id}/", response={200: ReviewDetailOut, **ERRORS}, summary="One review")
def get_review(request: ApiRequest, review_id: int) -> Review:
    return _shown(request, review_id)


@router.post("reviews/{int:review_id}/approve/", response={200: ReviewDetailOut, **ERRORS}, auth=may_write,
             summary="Approve")  # fmt: skip
def approve(request: ApiRequest, review_id: int, body: ApproveBody) -> Review:
    found = _find(request, review_id)
    with explained():
        reviewing.approve(found.pk, actor_of(request), comment=body.comment)
    return _shown(request, review_id)


@router.post("reviews/{int:review_id}/reject/", response={200: ReviewDetailOut, **ERRORS}, auth=may_write,
             summary="Reject, with a reason")  # fmt: skip
def reject(request: ApiRequest, review_id: int, body: ReasonBody) -> Review:
    found = _find(request, review_id)
    with explained():
        reviewing.reject(found.pk, actor_of(request), reason=body.reason)
    return _shown(request, review_id)


@router.post("reviews/{int:review_id}/ask-changes/", response={200: ReviewDetailOut, **ERRORS}, auth=may_write,
             summary="Ask for changes, with a reason")  # fmt: skip
def ask_changes(request: ApiRequest, review_id: int, body: ReasonBody) -> Review:
    found = _find(request, review_id)
    with explained():
        reviewing.ask_changes(found.pk, actor_of(request), reason=body.reason)
    return _shown(request, review_id)


@router.post("reviews/{int:review_id}/withdraw/", response={200: ReviewDetailOut, **ERRORS}, auth=may_write,
             summary="Take one's own adapter back")  # fmt: skip
def withdraw(request: ApiRequest, review_id: int, body: ReasonBody) -> Review:
    found = _find(request, review_id)
    with explained():
        reviewing.withdraw(found.pk, actor_of(request), reason=body.reason)
    return _shown(request, review_id)


@router.post("reviews/{int:review_id}/waive/", response={200: ReviewDetailOut, **ERRORS}, auth=may_write,
             summary="Waive a gate, with a reason")  # fmt: skip
def waive(request: ApiRequest, review_id: int, body: WaiveBody) -> Review:
    found = _find(request, review_id)
    with explained():
        reviewing.waive(found.pk, actor_of(request), gate=body.gate, reason=body.reason)
    return _shown(request, review_id)


@router.post("reviews/{int:review_id}/assign/", response={200: ReviewDetailOut, **ERRORS}, auth=may_write,
             summary="Ask people to review, and set a due date")  # fmt: skip
def assign(request: ApiRequest, review_id: int, body: AssignBody) -> Review:
    found = _find(request, review_id)
    user_ids = None
    if body.reviewers is not None:
        known = dict(request.team.memberships.values_list("user__username", "user_id"))
        if unknown := [name for name in body.reviewers if name not in known]:
            raise ApiError(422, "unknown_member", f'Nobody in this team is called "{unknown[0]}".', field="reviewers")
        user_ids = [known[name] for name in body.reviewers]
    with explained():
        reviewing.assign(
            found.pk, actor_of(request), user_ids=user_ids,
            due_on=body.due_on if "due_on" in body.model_fields_set else "",
        )  # fmt: skip
    return _shown(request, review_id)


@router.post("reviews/{int:review_id}/recheck/", response={202: ReviewDetailOut, **ERRORS}, auth=may_write,
             summary="Check the gates again")  # fmt: skip
def recheck(request: ApiRequest, review_id: int) -> tuple[int, Review]:
    found = _find(request, review_id)
    with explained():
        reviewing.ask_gates(found.pk, actor_of(request))
    return 202, _shown(request, review_id)


@router.post("reviews/{int:review_id}/roll-back/", response={200: ReviewDetailOut, **ERRORS}, auth=may_write,
             summary="Move the alias back to the version before")  # fmt: skip
def roll_back(request: ApiRequest, review_id: int) -> Review:
    found = _find(request, review_id)
    with explained():
        reviewing.roll_back(found.pk, actor_of(request))
    return _shown(request, review_id)


@router.post("reviews/{int:review_id}/samples/next/", response={200: ItemOut, 204: None, **ERRORS}, auth=may_write,
             summary="Take the next sample to judge, reserved for 15 minutes")  # fmt: skip
def next_sample(request: ApiRequest, review_id: int) -> Any:
    """204: none is left that nobody else has."""
    found = _find(request, review_id)
    with explained():
        item = judging.reserve_next(found, actor_of(request))
    return item if item is not None else (204, None)


@router.post("reviews/{int:review_id}/samples/undo/", response={200: ItemOut, **ERRORS}, auth=may_write,
             summary="Take back one's newest verdict")  # fmt: skip
def undo(request: ApiRequest, review_id: int) -> BlindItem:
    found = _find(request, review_id)
    with explained():
        return judging.undo(found.pk, actor_of(request))


@router.post("reviews/{int:review_id}/samples/{int:item_id}/judge/", response={200: ItemOut, **ERRORS}, auth=may_write,
             summary="Judge a sample that one has taken")  # fmt: skip
def judge(request: ApiRequest, review_id: int, item_id: int, body: JudgeBody) -> BlindItem:
    found = _find(request, review_id)
    with explained():
        return judging.judge(found.pk, item_id, body.choice, actor_of(request))


@router.post("reviews/{int:review_id}/samples/{int:item_id}/annotate/", response={200: ItemOut, **ERRORS},
             auth=may_write, summary="Flag a sample or note something")  # fmt: skip
def annotate(request: ApiRequest, review_id: int, item_id: int, body: AnnotateBody) -> BlindItem:
    found = _find(request, review_id)
    with explained():
        return judging.annotate(
            found.pk, item_id, actor_of(request), is_flagged=body.is_flagged, note=body.note
        )  # fmt: skip


@router.get("reviews/{int:review_id}/verdicts/", response={200: bytes, **ERRORS}, summary="Verdicts as JSON Lines")
def verdicts(request: ApiRequest, review_id: int, query: Query[ExportQuery]) -> HttpResponse:
    """With only=preferences: prompt, chosen and rejected of every decided sample, for preference training."""
    return export_response(request, _find(request, review_id), preferences_only=query.only == "preferences")


@router.get("reviews/{int:review_id}/comments/", response={200: list[CommentOut], **ERRORS}, summary="What was said")
def list_comments(request: ApiRequest, review_id: int) -> Any:
    rows = _find(request, review_id).comments.select_related("author").order_by("created_at", "pk")
    return rows[: commenting.MAX_COMMENTS]


@router.post("reviews/{int:review_id}/comments/", response={201: CommentOut, **ERRORS}, auth=may_write,
             summary="Say something")  # fmt: skip
def post_comment(request: ApiRequest, review_id: int, body: CommentBody) -> tuple[int, Comment]:
    found = _find(request, review_id)
    with explained():
        return 201, commenting.comment(
            found, actor_of(request), body.text, sample_id=body.sample_id, answers=body.answers
        )  # fmt: skip


@router.patch("reviews/{int:review_id}/comments/{int:comment_id}/", response={200: CommentOut, **ERRORS},
              auth=may_write, summary="Change one's own comment")  # fmt: skip
def patch_comment(request: ApiRequest, review_id: int, comment_id: int, body: TextBody) -> Comment:
    found = _find(request, review_id)
    with explained():
        return commenting.edit(found, comment_id, actor_of(request), body.text)


@router.post("reviews/{int:review_id}/comments/{int:comment_id}/resolve/", response={200: CommentOut, **ERRORS},
             auth=may_write, summary="Settle a thread, or open it again")  # fmt: skip
def resolve(request: ApiRequest, review_id: int, comment_id: int, body: ResolveBody) -> Comment:
    found = _find(request, review_id)
    with explained():
        return commenting.resolve(found, comment_id, actor_of(request), is_resolved=body.is_resolved)

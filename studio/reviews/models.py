"""Reviews: what a team asks of an adapter before it is used, who looked at it, and what they said."""

from __future__ import annotations

from typing import ClassVar

from django.conf import settings as django_settings
from django.db import models
from django.db.models import Q
from django.urls import reverse

from studio.accounts.models import Team
from studio.catalogue.models import Adapter, Sample
from studio.datasets.models import DatasetScan


class Policy(models.Model):
    """A version of what a team asks of an adapter. Never changed once made: a change is a new version."""

    team = models.ForeignKey(Team, on_delete=models.CASCADE, related_name="policies")
    version = models.PositiveIntegerField()
    settings = models.JSONField(help_text="studio.reviews.policies.PolicySettings as JSON.")
    note = models.CharField(max_length=200, blank=True, help_text="Why it was changed.")
    created_by = models.ForeignKey(
        django_settings.AUTH_USER_MODEL, on_delete=models.SET_NULL, null=True, related_name="+"
    )
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        constraints: ClassVar = [
            models.UniqueConstraint(fields=["team", "version"], name="one_policy_per_version"),
        ]

    def __str__(self) -> str:
        return f"policy v{self.version}"


class ReviewState(models.TextChoices):
    """How a review stands. Only an open one can change; every other state is its end."""

    OPEN = "open", "Waiting for review"
    CHANGES_ASKED = "changes_asked", "Changes asked for"
    APPROVED = "approved", "Approved"
    REJECTED = "rejected", "Rejected"
    WITHDRAWN = "withdrawn", "Withdrawn"
    SUPERSEDED = "superseded", "Superseded"


class Review(models.Model):
    """One adapter before its team: asked once, decided once, by the policy that held when it was asked.

    Its rows change in `reviewing` alone, under a lock on this row.
    """

    team = models.ForeignKey(Team, on_delete=models.CASCADE, related_name="reviews")
    adapter = models.ForeignKey(Adapter, on_delete=models.CASCADE, related_name="reviews")
    policy = models.ForeignKey(Policy, on_delete=models.PROTECT, related_name="reviews")
    state = models.CharField(max_length=14, choices=ReviewState.choices, default=ReviewState.OPEN)
    alias = models.SlugField(max_length=40, default="champion", help_text="What moves to the adapter on approval.")
    note = models.TextField(blank=True, help_text="What the submitter wants the reviewers to know.")
    submitted_by = models.ForeignKey(
        django_settings.AUTH_USER_MODEL, on_delete=models.SET_NULL, null=True, related_name="+"
    )
    due_on = models.DateField(null=True)
    gates_asked = models.PositiveIntegerField(default=1, help_text="How often the gates were to be checked.")
    gates_checked = models.PositiveIntegerField(default=0, help_text="The newest of these that was answered.")
    gates_queued_at = models.DateTimeField(null=True, help_text="When a worker was last asked.")
    gates_checked_at = models.DateTimeField(null=True)
    decided_gates = models.JSONField(
        default=list, help_text="[{gate, state, sentence, waived}] as they stood at the approval."
    )
    decided_by = models.ForeignKey(
        django_settings.AUTH_USER_MODEL, on_delete=models.SET_NULL, null=True, related_name="+"
    )
    decided_at = models.DateTimeField(null=True)
    reason = models.TextField(blank=True, help_text="Why it was rejected, or what is to change.")
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        constraints: ClassVar = [
            models.UniqueConstraint(fields=["adapter"], condition=Q(state="open"), name="one_open_review_per_adapter"),
        ]
        indexes: ClassVar = [
            models.Index(fields=["team", "state", "-created_at"], name="review_inbox"),
            models.Index(fields=["gates_queued_at"], condition=Q(gates_checked__lt=models.F("gates_asked")),
                         name="reviews_with_gates_to_check"),
        ]  # fmt: skip

    def __str__(self) -> str:
        return f"{self.adapter.name} v{self.adapter.version}"

    def get_absolute_url(self) -> str:
        return reverse("reviews:review", args=[self.pk])

    def gates_are_due(self) -> bool:
        """Whether the gates shown are older than what was asked for."""
        return self.gates_checked < self.gates_asked


class GateState(models.TextChoices):
    """What a gate found."""

    PASSED = "passed", "Passed"
    FAILED = "failed", "Failed"
    UNKNOWN = "unknown", "Not known"  # a measurement is missing, which is no pass


class GateOutcome(models.Model):
    """What one gate of the policy last said of a review's adapter, and whether a lead let it pass all the same."""

    review = models.ForeignKey(Review, on_delete=models.CASCADE, related_name="outcomes")
    gate = models.CharField(max_length=40)
    state = models.CharField(max_length=8, choices=GateState.choices)
    sentence = models.TextField()
    figures = models.JSONField(default=dict)
    checked_at = models.DateTimeField()
    waived_by = models.ForeignKey(
        django_settings.AUTH_USER_MODEL, on_delete=models.SET_NULL, null=True, related_name="+"
    )
    waived_at = models.DateTimeField(null=True)
    waiver_reason = models.TextField(blank=True)

    class Meta:
        constraints: ClassVar = [models.UniqueConstraint(fields=["review", "gate"], name="one_outcome_per_gate")]

    def __str__(self) -> str:
        return f"{self.gate} of {self.review_id}: {self.state}"

    def is_waived(self) -> bool:
        return self.waived_at is not None

    def lets_pass(self) -> bool:
        """Whether this gate is no hindrance: it passed, or a lead waived it."""
        return self.state == GateState.PASSED or self.is_waived()


class Reviewer(models.Model):
    """A person's part in a review: asked to look at it, or approved it, or both."""

    review = models.ForeignKey(Review, on_delete=models.CASCADE, related_name="reviewers")
    user = models.ForeignKey(django_settings.AUTH_USER_MODEL, on_delete=models.CASCADE, related_name="+")
    is_assigned = models.BooleanField(default=False)
    approved_at = models.DateTimeField(null=True)
    comment = models.TextField(blank=True, help_text="What they said with the approval.")

    class Meta:
        constraints: ClassVar = [models.UniqueConstraint(fields=["review", "user"], name="one_part_per_reviewer")]
        indexes: ClassVar = [models.Index(fields=["user"], condition=Q(is_assigned=True), name="assigned_reviews")]

    def __str__(self) -> str:
        return f"{self.user} in review {self.review_id}"


class Choice(models.TextChoices):
    """A blind verdict on two answers of which nobody knows whose they are."""

    A = "a", "A better"
    SAME = "same", "Same"
    B = "b", "B better"
    BAD = "bad", "Both bad"


class BlindItem(models.Model):
    """A sample to be judged once in a review, its two answers in an order that was drawn when it was submitted."""

    review = models.ForeignKey(Review, on_delete=models.CASCADE, related_name="items")
    sample = models.ForeignKey(Sample, on_delete=models.CASCADE, related_name="+")
    position = models.PositiveIntegerField()
    adapter_is_a = models.BooleanField()
    reserved_by = models.ForeignKey(
        django_settings.AUTH_USER_MODEL, on_delete=models.SET_NULL, null=True, related_name="+"
    )
    reserved_until = models.DateTimeField(null=True)
    choice = models.CharField(max_length=4, choices=Choice.choices, blank=True)
    judged_by = models.ForeignKey(
        django_settings.AUTH_USER_MODEL, on_delete=models.SET_NULL, null=True, related_name="+"
    )
    judged_at = models.DateTimeField(null=True)
    is_flagged = models.BooleanField(default=False, help_text="Something is wrong with the sample itself.")
    note = models.TextField(blank=True)

    class Meta:
        constraints: ClassVar = [
            models.UniqueConstraint(fields=["review", "sample"], name="one_item_per_sample"),
            models.CheckConstraint(
                condition=Q(choice="", judged_at=None) | (~Q(choice="") & Q(judged_at__isnull=False)),
                name="a_verdict_has_a_time",
            ),
        ]
        indexes: ClassVar = [models.Index(fields=["review", "position"], name="blind_items_in_order")]

    def __str__(self) -> str:
        return f"item {self.position} of review {self.review_id}"

    def answer(self, side: str) -> str:
        """The answer shown on a side, "a" or "b"."""
        is_adapters = (side == Choice.A) == self.adapter_is_a
        return self.sample.adapter_answer if is_adapters else self.sample.base_answer

    def winner(self) -> str:
        """Whose answer was found better: "adapter", "base", or what else the verdict was; empty before it."""
        if self.choice not in {Choice.A, Choice.B}:
            return self.choice
        return "adapter" if (self.choice == Choice.A) == self.adapter_is_a else "base"


class Comment(models.Model):
    """What somebody said about a review or about one of its samples; an answer names what it answers."""

    review = models.ForeignKey(Review, on_delete=models.CASCADE, related_name="comments")
    sample = models.ForeignKey(Sample, on_delete=models.SET_NULL, null=True, related_name="+")
    answers = models.ForeignKey("self", on_delete=models.CASCADE, null=True, related_name="+")
    author = models.ForeignKey(django_settings.AUTH_USER_MODEL, on_delete=models.PROTECT, related_name="+")
    text = models.TextField(help_text="Markdown.")
    created_at = models.DateTimeField(auto_now_add=True)
    edited_at = models.DateTimeField(null=True)
    resolved_at = models.DateTimeField(null=True, help_text="Of a thread's first comment.")
    resolved_by = models.ForeignKey(
        django_settings.AUTH_USER_MODEL, on_delete=models.SET_NULL, null=True, related_name="+"
    )

    class Meta:
        indexes: ClassVar = [models.Index(fields=["review", "created_at"], name="review_threads")]

    def __str__(self) -> str:
        return f"comment {self.pk} on review {self.review_id}"


class ScanWaiver(models.Model):
    """A lead lets rows be trained on although a scan found more in them than the policy allows.

    It holds for what was found then: it goes with the scan, and does not cover more rows than these.
    """

    scan = models.OneToOneField(DatasetScan, on_delete=models.CASCADE, related_name="waiver")
    num_rows = models.PositiveBigIntegerField(null=True, help_text="Rows with findings. Empty: the scan had failed.")
    reason = models.TextField()
    waived_by = models.ForeignKey(
        django_settings.AUTH_USER_MODEL, on_delete=models.SET_NULL, null=True, related_name="+"
    )
    waived_at = models.DateTimeField(auto_now_add=True)

    def __str__(self) -> str:
        return f"waiver of {self.scan}"

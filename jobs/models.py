"""Jobs: durable GPU work that people see. Postgres holds the truth; Redis only carries hints and progress."""

from __future__ import annotations

import uuid
from typing import ClassVar

from django.conf import settings
from django.db import models
from django.urls import reverse

from studio.accounts.models import Team
from studio.catalogue.models import Adapter, BaseModel
from studio.datasets.models import DatasetVersion


class JobState(models.TextChoices):
    """The states of a job; lifecycle.py has one function per transition."""

    QUEUED = "queued", "Queued"  # waits for a GPU and says why
    RUNNING = "running", "Running"  # one attempt holds the lease; `phase` says what it does
    CANCELLING = "cancelling", "Stopping"  # a stop was asked for; `stop_mode` says which
    PAUSED = "paused", "Paused"  # checkpoint kept, no lease, no GPU
    RETRY_WAIT = "retry_wait", "Waiting to retry"  # queued again at `not_before`
    SUCCEEDED = "succeeded", "Succeeded"  # final, and has its product
    FAILED = "failed", "Failed"  # final, and says why
    CANCELLED = "cancelled", "Cancelled"  # final, by a person


FINAL_STATES = (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED)
LEASED_STATES = (JobState.RUNNING, JobState.CANCELLING)


class JobKind(models.TextChoices):
    """What a job makes."""

    TRAIN = "train", "Training"


class Worker(models.Model):
    """A process that runs jobs on one device. Rows outlive their process; `last_seen` tells."""

    id = models.UUIDField(primary_key=True, default=uuid.uuid4)
    host = models.CharField(max_length=200)
    slot = models.PositiveIntegerField(help_text="Index of the device on its host.")
    process_id = models.PositiveIntegerField()
    device = models.CharField(max_length=120, help_text='For people: "NVIDIA H100 80GB" or "CPU, 2 cores".')
    device_kind = models.CharField(max_length=10, help_text="cuda or cpu")
    memory_bytes = models.BigIntegerField(default=0)
    version = models.CharField(max_length=40)
    started_at = models.DateTimeField(auto_now_add=True)
    last_seen = models.DateTimeField()
    is_draining = models.BooleanField(default=False)
    # What its idle trainer holds in memory; all three or none.
    warm_base = models.ForeignKey(BaseModel, on_delete=models.SET_NULL, null=True, related_name="+")
    warm_precision = models.CharField(max_length=10, blank=True)
    warm_team = models.ForeignKey(Team, on_delete=models.SET_NULL, null=True, related_name="+")

    def __str__(self) -> str:
        return f"{self.host}#{self.slot}"


class Job(models.Model):
    """What was asked for (`recipe`) and how it is going (`state`, `phase`, `step`).

    `attempt` is the fencing token: it rises at every claim and every reap and stands in the WHERE of every
    later write of the worker, so that a worker presumed dead cannot overwrite its successor.
    """

    id = models.UUIDField(primary_key=True, default=uuid.uuid4, editable=False)
    team = models.ForeignKey(Team, on_delete=models.CASCADE, related_name="jobs")
    created_by = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.PROTECT, related_name="+")
    name = models.CharField(max_length=120)
    kind = models.CharField(max_length=20, choices=JobKind.choices, default=JobKind.TRAIN)
    recipe = models.JSONField(help_text="workers.recipe.Recipe with every auto resolved.")
    asked_recipe = models.JSONField(help_text="The recipe as it was asked for.")
    estimate = models.JSONField(default=dict, help_text="workers.memory.Estimate at queueing.")
    base_model = models.ForeignKey(BaseModel, on_delete=models.PROTECT, related_name="jobs")
    dataset_version = models.ForeignKey(DatasetVersion, on_delete=models.PROTECT, related_name="jobs")
    adapter = models.OneToOneField(Adapter, on_delete=models.PROTECT, null=True, related_name="job")
    parent = models.ForeignKey("self", on_delete=models.SET_NULL, null=True, related_name="children")

    state = models.CharField(max_length=12, choices=JobState.choices, default=JobState.QUEUED)
    phase = models.CharField(max_length=20, blank=True)
    attempt = models.PositiveIntegerField(default=0)
    failures_counted = models.PositiveIntegerField(default=0)
    priority = models.IntegerField(default=0)
    needs = models.JSONField(default=dict, help_text='{"gpus": 1, "memory_bytes": ...}')
    not_before = models.DateTimeField()
    worker = models.ForeignKey(Worker, on_delete=models.SET_NULL, null=True, related_name="jobs")
    lease_until = models.DateTimeField(null=True)
    heartbeat_at = models.DateTimeField(null=True)
    step = models.PositiveIntegerField(default=0)
    num_steps = models.PositiveIntegerField(default=0)
    seconds_left = models.FloatField(null=True)
    stop_mode = models.CharField(max_length=12, blank=True)
    stop_asked_by = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.SET_NULL, null=True, related_name="+")
    failure_code = models.CharField(max_length=40, blank=True)
    failure_message = models.TextField(blank=True)
    failure_next_step = models.TextField(blank=True)
    plan = models.JSONField(default=dict, help_text="The last PlanEvent: rows, tokens, parameters, device.")
    idempotency_key = models.CharField(max_length=80)
    created_at = models.DateTimeField(auto_now_add=True)
    started_at = models.DateTimeField(null=True)
    finished_at = models.DateTimeField(null=True)

    class Meta:
        constraints: ClassVar = [
            models.UniqueConstraint(fields=["team", "idempotency_key"], name="one_job_per_idempotency_key"),
            # A lease that is NULL would hide a running job from the reaper.
            models.CheckConstraint(
                condition=models.Q(state__in=LEASED_STATES, lease_until__isnull=False)
                | (~models.Q(state__in=LEASED_STATES) & models.Q(lease_until__isnull=True)),
                name="leased_exactly_while_running",
            ),
            models.CheckConstraint(
                condition=models.Q(state=JobState.SUCCEEDED, adapter__isnull=False)
                | (~models.Q(state=JobState.SUCCEEDED) & models.Q(adapter__isnull=True)),
                name="a_product_exactly_when_succeeded",
            ),
        ]
        indexes: ClassVar = [
            models.Index(
                fields=["-priority", "not_before", "created_at"],
                name="job_claim",
                condition=models.Q(state__in=[JobState.QUEUED, JobState.RETRY_WAIT]),
            ),
            models.Index(fields=["lease_until"], name="job_leases", condition=models.Q(state__in=LEASED_STATES)),
            models.Index(fields=["team", "-created_at"], name="job_list"),
        ]

    def __str__(self) -> str:
        return self.name

    def get_absolute_url(self) -> str:
        return reverse("jobs:detail", args=[self.pk])

    def is_final(self) -> bool:
        return self.state in FINAL_STATES


class JobAttempt(models.Model):
    """One try at a job by one worker."""

    job = models.ForeignKey(Job, on_delete=models.CASCADE, related_name="attempts")
    number = models.PositiveIntegerField()
    worker = models.ForeignKey(Worker, on_delete=models.SET_NULL, null=True, related_name="attempts")
    started_at = models.DateTimeField()
    ended_at = models.DateTimeField(null=True)
    outcome = models.CharField(max_length=20, blank=True, help_text="succeeded, stopped, failed or lost")
    failure_code = models.CharField(max_length=40, blank=True)
    from_step = models.PositiveIntegerField(default=0)
    last_step = models.PositiveIntegerField(default=0)
    peak_memory_bytes = models.BigIntegerField(default=0)

    class Meta:
        constraints: ClassVar = [models.UniqueConstraint(fields=["job", "number"], name="one_row_per_attempt")]

    def __str__(self) -> str:
        return f"attempt {self.number} of {self.job}"


class JobEvent(models.Model):
    """Something that happened to a job, in order, for people."""

    job = models.ForeignKey(Job, on_delete=models.CASCADE, related_name="events")
    sequence = models.PositiveIntegerField()
    attempt = models.PositiveIntegerField()
    level = models.CharField(max_length=10, default="info")
    text = models.TextField()
    at = models.DateTimeField(auto_now_add=True)

    class Meta:
        constraints: ClassVar = [models.UniqueConstraint(fields=["job", "sequence"], name="one_event_per_sequence")]
        ordering: ClassVar = ["sequence"]

    def __str__(self) -> str:
        return self.text


class MetricPoint(models.Model):
    """One point of a job's curves; a step that two attempts reached counts by the highest attempt."""

    job = models.ForeignKey(Job, on_delete=models.CASCADE, related_name="points")
    attempt = models.PositiveIntegerField()
    step = models.PositiveIntegerField()
    loss = models.FloatField(null=True)
    validation_loss = models.FloatField(null=True)
    learning_rate = models.FloatField(null=True)
    grad_norm = models.FloatField(null=True)
    tokens_per_second = models.FloatField(null=True)
    num_tokens = models.BigIntegerField(null=True)
    at = models.DateTimeField()

    class Meta:
        constraints: ClassVar = [
            models.UniqueConstraint(fields=["job", "step", "attempt"], name="one_point_per_step_and_attempt")
        ]

    def __str__(self) -> str:
        return f"step {self.step} of {self.job}"

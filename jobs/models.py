"""Jobs: durable GPU work that people see. Postgres holds the truth; Redis only carries hints and progress."""

from __future__ import annotations

import uuid
from typing import ClassVar

from django.conf import settings
from django.db import models
from django.db.models.fields.json import KT
from django.db.models.functions import Cast, Coalesce
from django.urls import reverse

from studio.accounts.models import Team
from studio.catalogue.models import Adapter, BaseModel, EvaluationRun, MixedVersion, Suite, data_label
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
ACTIVE_STATES = tuple(state for state in JobState if state not in FINAL_STATES)
"""Named one by one, as the index of what is not final is: "not final" alone would look through every job there was."""


class JobKind(models.TextChoices):
    """What a job makes."""

    TRAIN = "train", "Training"
    EVALUATE = "evaluate", "Evaluation"


TRAINED = models.Q(kind=JobKind.TRAIN, state=JobState.SUCCEEDED)


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
    quarantined_until = models.DateTimeField(null=True, help_text="Gets no job before: its device has failed.")
    quarantine_reason = models.TextField(blank=True)
    boot_id = models.CharField(
        max_length=64, blank=True, help_text="Changes when the machine starts anew: no process outlives it."
    )
    # What jobs/machines.py measured last; None: unknown here, or not reported yet.
    reported_at = models.DateTimeField(null=True)
    free_memory_bytes = models.BigIntegerField(
        null=True, help_text="What a job could use: all of the device but what others hold; own trainers do not count."
    )
    used_by_others_bytes = models.BigIntegerField(null=True, help_text="Held by processes that are not the studio's.")
    used_by_own_bytes = models.BigIntegerField(null=True, help_text="Held by this worker and its trainer.")
    temperature_celsius = models.FloatField(null=True)
    utilisation_percent = models.FloatField(null=True, help_text="0 to 100: of the GPU's time, or of all CPU cores.")
    num_gpus = models.PositiveSmallIntegerField(default=1, help_text="GPUs that one job gets here; 1 for a CPU.")
    memory_users = models.JSONField(
        default=list, help_text='Foreign processes on a GPU: [{"name", "process_id", "num_bytes"}], the largest first.'
    )
    drain_mode = models.CharField(
        max_length=10, blank=True, default="", help_text="now or after_job while a person drains it; empty otherwise."
    )
    # What its idle trainer holds in memory; all three or none.
    warm_base = models.ForeignKey(BaseModel, on_delete=models.SET_NULL, null=True, related_name="+")
    warm_precision = models.CharField(max_length=10, blank=True)
    warm_team = models.ForeignKey(Team, on_delete=models.SET_NULL, null=True, related_name="+")

    def __str__(self) -> str:
        return f"{self.host}#{self.slot}"


class JoinToken(models.Model):
    """Lets one machine join, once and soon (jobs/joining.py). Only its hash is stored."""

    secret_sha256 = models.CharField(max_length=64, unique=True)
    hint = models.CharField(max_length=12, help_text="The secret's first characters, to tell tokens apart.")
    team = models.ForeignKey(Team, on_delete=models.CASCADE, related_name="join_tokens")
    created_by = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.CASCADE, related_name="join_tokens")
    created_at = models.DateTimeField(auto_now_add=True)
    expires_at = models.DateTimeField()
    used_at = models.DateTimeField(null=True)
    used_by = models.CharField(max_length=200, blank=True, help_text="The machine's own name and its address.")
    revoked_at = models.DateTimeField(null=True)

    def __str__(self) -> str:
        return f"join token {self.hint}…"


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
    # Null for an evaluation on standard tasks, whose rows are no dataset's.
    dataset_version = models.ForeignKey(DatasetVersion, on_delete=models.PROTECT, null=True, related_name="jobs")
    num_mixed = models.PositiveSmallIntegerField(default=0, help_text="Further datasets of its recipe; see JobDataset.")
    adapter = models.OneToOneField(Adapter, on_delete=models.PROTECT, null=True, related_name="job")
    # Of a job that evaluates: what is scored (a base alone when there is no adapter) on what, and the product.
    scored_adapter = models.ForeignKey(Adapter, on_delete=models.PROTECT, null=True, related_name="evaluation_jobs")
    suite = models.ForeignKey(Suite, on_delete=models.PROTECT, null=True, related_name="jobs")
    evaluation_run = models.OneToOneField(EvaluationRun, on_delete=models.PROTECT, null=True, related_name="job")
    parent = models.ForeignKey("self", on_delete=models.SET_NULL, null=True, related_name="children")

    state = models.CharField(max_length=12, choices=JobState.choices, default=JobState.QUEUED)
    phase = models.CharField(max_length=20, blank=True)
    attempt = models.PositiveIntegerField(default=0)
    failures_counted = models.PositiveIntegerField(default=0)
    priority = models.IntegerField(default=0, help_text="Of the whole studio, set by admins: -1, 0 or 1.")
    team_rank = models.BigIntegerField(
        default=0, help_text="Order among the team's own jobs, the lower first; compared inside one team only."
    )
    needs = models.JSONField(default=dict, help_text='{"gpus": 1, "memory_bytes": ...}')
    # From `needs`, so that the choice of the next job reads them out of an index.
    num_gpus = models.GeneratedField(
        expression=Coalesce(Cast(KT("needs__gpus"), models.IntegerField()), 1),
        output_field=models.IntegerField(),
        db_persist=True,
    )
    memory_bytes = models.GeneratedField(
        expression=Coalesce(Cast(KT("needs__memory_bytes"), models.BigIntegerField()), 0),
        output_field=models.BigIntegerField(),
        db_persist=True,
    )
    expected_seconds = models.FloatField(null=True, help_text="How long it should take, by jobs/durations.py.")
    owed_since = models.DateTimeField(
        null=True, help_text="Since when it was first in turn for a device that was too small for it."
    )
    not_before = models.DateTimeField()
    worker = models.ForeignKey(Worker, on_delete=models.SET_NULL, null=True, related_name="jobs")
    lease_until = models.DateTimeField(null=True)
    heartbeat_at = models.DateTimeField(null=True)
    step = models.PositiveIntegerField(default=0)
    checkpoint_step = models.PositiveIntegerField(
        default=0, help_text="Of the newest checkpoint, from which the job goes on; 0 before the first."
    )
    num_steps = models.PositiveIntegerField(default=0)
    seconds_left = models.FloatField(null=True)
    stop_mode = models.CharField(max_length=12, blank=True)
    stop_asked_by = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.SET_NULL, null=True, related_name="+")
    failure_code = models.CharField(max_length=40, blank=True)
    failure_message = models.TextField(blank=True)
    failure_next_step = models.TextField(blank=True)
    micro_batch_size = models.PositiveIntegerField(
        null=True, help_text="Rows in memory at once, where an attempt ran out of memory with the recipe's own number."
    )
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
                condition=(
                    models.Q(state=JobState.SUCCEEDED)
                    & (
                        models.Q(kind=JobKind.TRAIN, adapter__isnull=False, evaluation_run__isnull=True)
                        | models.Q(kind=JobKind.EVALUATE, adapter__isnull=True, evaluation_run__isnull=False)
                    )
                )
                | (~models.Q(state=JobState.SUCCEEDED) & models.Q(adapter__isnull=True, evaluation_run__isnull=True)),
                name="a_product_exactly_when_succeeded",
            ),
            models.CheckConstraint(
                condition=models.Q(dataset_version__isnull=False) | models.Q(kind=JobKind.EVALUATE),
                name="what_is_trained_has_a_dataset",
            ),
        ]
        indexes: ClassVar = [
            models.Index(
                fields=["-priority", "not_before", "created_at"],
                name="job_claim",
                condition=models.Q(state__in=[JobState.QUEUED, JobState.RETRY_WAIT]),
            ),
            models.Index(
                fields=["team", "created_by", "priority", "team_rank", "not_before", "created_at"],
                name="job_turns",
                include=["memory_bytes", "num_gpus", "id"],
                condition=models.Q(state__in=[JobState.QUEUED, JobState.RETRY_WAIT]),
            ),
            models.Index(
                fields=["owed_since"],
                name="job_owed",
                condition=models.Q(state__in=[JobState.QUEUED, JobState.RETRY_WAIT], owed_since__isnull=False),
            ),
            models.Index(fields=["lease_until"], name="job_leases", condition=models.Q(state__in=LEASED_STATES)),
            models.Index(fields=["team", "-created_at"], name="job_list"),
            models.Index(fields=["team"], name="job_active", condition=models.Q(state__in=ACTIVE_STATES)),
            models.Index(fields=["team", "-created_at"], name="job_failed", condition=models.Q(state=JobState.FAILED)),
            # What the estimates learn from: the newest of a team, and of all teams.
            models.Index(fields=["team", "-finished_at"], name="job_learned_team", condition=TRAINED),
            models.Index(fields=["-finished_at"], name="job_learned", condition=TRAINED),
        ]

    def __str__(self) -> str:
        return self.name

    def get_absolute_url(self) -> str:
        return reverse("jobs:detail", args=[self.pk])

    def is_final(self) -> bool:
        return self.state in FINAL_STATES

    @property
    def data_label(self) -> str:
        """What it trains or scores on: dataset versions, or standard tasks, which its name and its suite tell."""
        return data_label(self.dataset_version, self.num_mixed) if self.dataset_version else "standard tasks"

    def mixed_versions(self) -> list[DatasetVersion]:
        """The further dataset versions of its recipe, in its order; uses what was prefetched."""
        rows = self.mix.all()
        if "mix" not in getattr(self, "_prefetched_objects_cache", {}):
            rows = rows.select_related("dataset_version__dataset")
        return [one.dataset_version for one in rows]


class JobDataset(MixedVersion):
    """A further dataset version that a job trains on."""

    job = models.ForeignKey(Job, on_delete=models.CASCADE, related_name="mix")
    dataset_version = models.ForeignKey(DatasetVersion, on_delete=models.PROTECT, related_name="job_mixes")

    class Meta(MixedVersion.Meta):
        constraints: ClassVar = [
            models.UniqueConstraint(fields=["job", "place"], name="one_dataset_per_place_of_job"),
            models.UniqueConstraint(fields=["job", "dataset_version"], name="one_place_per_dataset_of_job"),
        ]

    def __str__(self) -> str:
        return str(self.job)

    def get_absolute_url(self) -> str:
        return self.job.get_absolute_url()


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
    exit_status = models.PositiveIntegerField(null=True, help_text="With which its trainer ended by itself.")
    signal = models.PositiveIntegerField(null=True, help_text="Number of the signal that ended its trainer.")
    micro_batch_size = models.PositiveIntegerField(
        default=0, help_text="Most rows in memory at once; 0 before it is known."
    )
    accumulation = models.PositiveIntegerField(default=0, help_text="Micro-batches whose gradients make a step.")
    micro_batch_tokens = models.PositiveIntegerField(
        null=True,
        help_text="Most tokens of a micro-batch, where they bound it: the above are of the first step.",
    )
    # As they were when it began: later prices do not change what was paid.
    price_per_gpu_hour = models.DecimalField(max_digits=10, decimal_places=4, null=True)
    currency = models.CharField(max_length=8, blank=True, default="")

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


class FixedPrompt(models.Model):
    """A held-out row that a training job answers at every checkpoint; its texts may be cut."""

    job = models.ForeignKey(Job, on_delete=models.CASCADE, related_name="fixed_prompts")
    index = models.PositiveSmallIntegerField(help_text="Its place among the job's prompts, from 0.")
    source = models.PositiveSmallIntegerField(default=0, help_text="Which of the recipe's datasets; 0: the main one.")
    line = models.PositiveIntegerField(help_text="Of the dataset's file.")
    prompt = models.TextField()
    reference = models.TextField(help_text="The answer that the dataset gives.")

    class Meta:
        constraints: ClassVar = [models.UniqueConstraint(fields=["job", "index"], name="one_fixed_prompt_per_index")]

    def __str__(self) -> str:
        return f"prompt {self.index} of {self.job}"


class JobSample(models.Model):
    """What the model wrote after a fixed prompt once `step` was done; at step 0 it is the untouched base."""

    prompt = models.ForeignKey(FixedPrompt, on_delete=models.CASCADE, related_name="samples")
    attempt = models.PositiveIntegerField()
    step = models.PositiveIntegerField()
    answer = models.TextField()
    created_at = models.DateTimeField(help_text="When it was stored, or replaced by another one of a later attempt.")

    class Meta:
        constraints: ClassVar = [models.UniqueConstraint(fields=["prompt", "step"], name="one_sample_per_step")]

    def __str__(self) -> str:
        return f"step {self.step} of {self.prompt}"


class TeamQuota(models.Model):
    """A team's share of the devices, its limits and what devices cost it. A team without a row has the defaults."""

    team = models.OneToOneField(Team, on_delete=models.CASCADE, primary_key=True, related_name="quota")
    share = models.PositiveIntegerField(default=1, help_text="Weight among the teams: 2 gets twice what 1 gets.")
    max_running_jobs = models.PositiveIntegerField(null=True, blank=True)
    max_gpu_hours = models.FloatField(null=True, blank=True, help_text="Within the window.")
    window_days = models.PositiveSmallIntegerField(default=7)
    price_per_gpu_hour = models.DecimalField(max_digits=10, decimal_places=4, null=True, blank=True)
    currency = models.CharField(max_length=8, blank=True, default="")
    device_prices = models.JSONField(
        default=list, blank=True, help_text='[["H100", "2.5"], ...]: a part of a device\'s name and its price.'
    )

    class Meta:
        constraints: ClassVar = [
            models.CheckConstraint(condition=models.Q(share__gte=1), name="a_share_is_positive"),
            models.CheckConstraint(condition=models.Q(window_days__gte=1), name="a_window_has_a_day"),
        ]

    def __str__(self) -> str:
        return f"quota of {self.team}"


class Usage(models.Model):
    """Device seconds of a person in a team, decayed until `decayed_at` (jobs/usage.py)."""

    team = models.ForeignKey(Team, on_delete=models.CASCADE, related_name="usage")
    user = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.CASCADE, related_name="+")
    device_seconds = models.FloatField()
    decayed_at = models.DateTimeField()

    class Meta:
        constraints: ClassVar = [models.UniqueConstraint(fields=["team", "user"], name="one_usage_per_person")]

    def __str__(self) -> str:
        return f"{self.device_seconds:.0f} s of {self.user} in {self.team}"


class UsageHour(models.Model):
    """Device seconds of a team in one hour and currency, for limits on GPU-hours, and what they cost."""

    team = models.ForeignKey(Team, on_delete=models.CASCADE, related_name="usage_hours")
    hour = models.DateTimeField()
    currency = models.CharField(max_length=8, blank=True, default="")
    device_seconds = models.FloatField()
    priced_seconds = models.FloatField(default=0, help_text="Those for which the team had set a price.")
    cost = models.DecimalField(max_digits=18, decimal_places=6, default=0)

    class Meta:
        constraints: ClassVar = [
            models.UniqueConstraint(fields=["team", "hour", "currency"], name="one_row_per_team_hour_and_currency")
        ]

    def __str__(self) -> str:
        return f"{self.device_seconds:.0f} s of {self.team} at {self.hour}"


class LastStart(models.Model):
    """When a team's jobs of one priority last got a device: their age counts from there (jobs/fair_share.py)."""

    team = models.ForeignKey(Team, on_delete=models.CASCADE, related_name="+")
    priority = models.IntegerField()
    at = models.DateTimeField()

    class Meta:
        constraints: ClassVar = [models.UniqueConstraint(fields=["team", "priority"], name="one_last_start")]

    def __str__(self) -> str:
        return f"{self.team} at priority {self.priority}: {self.at}"


class OutboxMessage(models.Model):
    """Something that a broker has to be told, written in the transaction that makes it true (outbox.py)."""

    topic = models.CharField(max_length=40)
    key = models.CharField(max_length=80, help_text="Messages of one topic and key that wait together go as one.")
    payload = models.JSONField(default=dict)
    created_at = models.DateTimeField(auto_now_add=True)
    attempts = models.PositiveIntegerField(default=0)
    next_try_at = models.DateTimeField()
    sent_at = models.DateTimeField(null=True)
    last_error = models.TextField(blank=True)

    class Meta:
        indexes: ClassVar = [
            models.Index(fields=["next_try_at"], name="outbox_unsent", condition=models.Q(sent_at__isnull=True))
        ]

    def __str__(self) -> str:
        return f"{self.topic} to {self.key}"

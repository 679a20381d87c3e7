"""The catalogue: base models, adapters and what was measured about them."""

from __future__ import annotations

from typing import ClassVar

from django.conf import settings
from django.db import models
from django.urls import reverse

from studio.accounts.models import Team
from studio.datasets.models import DatasetVersion
from workers.shapes import ModelShape
from workers.verdicts import Verdict, verdict


class BaseModel(models.Model):
    """A frozen model that adapters are trained on. Shared by all teams of the studio."""

    name = models.CharField(max_length=120, unique=True)
    hub_id = models.CharField(max_length=200, blank=True, help_text="Its name on a model hub, for adapter_config.json.")
    description = models.TextField(blank=True)
    licence = models.CharField(max_length=80, blank=True)
    folder = models.TextField(help_text="Absolute folder on the workers' file system.")
    revision = models.CharField(max_length=64, help_text="sha256 over the sorted list of file names and digests.")
    files = models.JSONField(default=list, help_text="[{name, sha256, num_bytes}]")
    shape = models.JSONField(default=dict, help_text="A workers.shapes.ModelShape as JSON.")
    num_bytes = models.BigIntegerField(default=0)
    has_chat_template = models.BooleanField(default=False)
    created_by = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.SET_NULL, null=True, related_name="+")
    created_at = models.DateTimeField(auto_now_add=True)

    def __str__(self) -> str:
        return self.name

    def get_absolute_url(self) -> str:
        return reverse("catalogue:base_model", args=[self.pk])

    def model_shape(self) -> ModelShape:
        return ModelShape.model_validate(self.shape)


class Adapter(models.Model):
    """A trained adapter. Born in one place, `registering.register_adapter`, with the success of its job."""

    team = models.ForeignKey(Team, on_delete=models.CASCADE, related_name="adapters")
    name = models.CharField(max_length=120)
    base_model = models.ForeignKey(BaseModel, on_delete=models.PROTECT, related_name="adapters")
    dataset_version = models.ForeignKey(DatasetVersion, on_delete=models.PROTECT, related_name="adapters")
    method = models.CharField(max_length=40)
    recipe = models.JSONField()
    folder = models.TextField(help_text="Storage key of the adapter's folder.")
    files = models.JSONField(default=list, help_text="[{name, sha256, num_bytes}]")
    num_bytes = models.BigIntegerField(default=0)
    num_trainable = models.BigIntegerField(default=0)
    stopped_at_step = models.PositiveIntegerField(null=True)
    provenance = models.JSONField(default=dict, help_text="Versions, device, seconds, tokens, peak memory.")
    created_by = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.PROTECT, related_name="+")
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        indexes: ClassVar = [models.Index(fields=["team", "-created_at"], name="adapter_list")]

    def __str__(self) -> str:
        return self.name

    def get_absolute_url(self) -> str:
        return reverse("catalogue:adapter", args=[self.pk])


class Score(models.Model):
    """One evaluation of an adapter beside the untouched base, on the same held-out rows.

    `low` and `high` bound the 95 % interval of `value`; `difference*` is adapter minus base, paired by row.
    """

    adapter = models.ForeignKey(Adapter, on_delete=models.CASCADE, related_name="scores")
    evaluation = models.CharField(max_length=40)
    label = models.CharField(max_length=80)
    unit = models.CharField(max_length=20, blank=True)
    higher_is_better = models.BooleanField()
    num_rows = models.PositiveIntegerField()
    value = models.FloatField()
    low = models.FloatField()
    high = models.FloatField()
    base_value = models.FloatField()
    base_low = models.FloatField()
    base_high = models.FloatField()
    difference = models.FloatField()
    difference_low = models.FloatField()
    difference_high = models.FloatField()
    interval_method = models.CharField(max_length=200)
    p_value = models.FloatField(null=True, help_text="Of the paired test; null in scores of older versions.")
    smallest_effect = models.FloatField(null=True, help_text="The smallest difference worth telling.")
    rows_needed = models.PositiveIntegerField(null=True, help_text="With fewer rows, that difference would not show.")
    rows_recommended = models.PositiveIntegerField(null=True, help_text="As many rows would surely do.")

    class Meta:
        constraints: ClassVar = [
            models.UniqueConstraint(fields=["adapter", "evaluation"], name="one_score_per_evaluation")
        ]

    def __str__(self) -> str:
        return f"{self.label} of {self.adapter}"

    def verdict(self) -> Verdict:
        """How the adapter stands beside the base."""
        return verdict(self)

    def is_better(self) -> bool | None:
        """Whether the adapter beats the base; None when that cannot be told, or there is no difference."""
        return {Verdict.BETTER: True, Verdict.WORSE: False}.get(self.verdict())


class Sample(models.Model):
    """A held-out row as the base and the adapter answered it."""

    adapter = models.ForeignKey(Adapter, on_delete=models.CASCADE, related_name="samples")
    line = models.PositiveBigIntegerField()
    prompt = models.TextField()
    reference = models.TextField()
    base_answer = models.TextField()
    adapter_answer = models.TextField()

    class Meta:
        ordering: ClassVar = ["line"]

    def __str__(self) -> str:
        return f"line {self.line} by {self.adapter}"

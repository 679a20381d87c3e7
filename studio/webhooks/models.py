"""Who wants to be told what, and every message that is owed to them."""

from __future__ import annotations

import uuid
from typing import ClassVar

from django.conf import settings
from django.contrib.postgres.fields import ArrayField
from django.db import models
from django.urls import reverse
from django.utils import timezone

from studio.accounts.models import AuditEvent, Team


class Webhook(models.Model):
    """An address of a team's own that is told of events. Its secrets are stored encrypted (see secrets.py)."""

    team = models.ForeignKey(Team, on_delete=models.CASCADE, related_name="webhooks")
    url = models.URLField(max_length=500)
    events = ArrayField(models.CharField(max_length=60), help_text='Actions of the audit log, or "review.*".')
    secret = models.TextField(help_text="Encrypted.")
    previous_secret = models.TextField(blank=True, help_text="Encrypted; signs too until previous_until.")
    previous_until = models.DateTimeField(null=True)
    failing_since = models.DateTimeField(null=True, help_text="The first failure since the last success.")
    disabled_at = models.DateTimeField(null=True)
    disabled_reason = models.CharField(max_length=200, blank=True)
    created_by = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.SET_NULL, null=True, related_name="+")
    created_at = models.DateTimeField(auto_now_add=True)

    def __str__(self) -> str:
        return self.url[:200]

    def get_absolute_url(self) -> str:
        return reverse("webhooks:webhook", args=[self.pk])

    def wants(self, action: str) -> bool:
        """Whether an event of this action is to be told."""
        return any(one == action or (one.endswith(".*") and action.startswith(one[:-1])) for one in self.events)


class MailSettings(models.Model):
    """What a person wants mail about. Without a row: everything here."""

    user = models.OneToOneField(settings.AUTH_USER_MODEL, on_delete=models.CASCADE, related_name="mail_settings")
    jobs = models.BooleanField(default=True, help_text="Own jobs that are done or have failed.")
    reviews = models.BooleanField(default=True, help_text="Reviews that wait for the person.")
    mentions = models.BooleanField(default=True, help_text="Comments that name the person.")

    def __str__(self) -> str:
        return f"mail settings of {self.user}"


class DeliveryState(models.TextChoices):
    """How far a message has come."""

    WAITING = "waiting", "Waiting"
    DELIVERED = "delivered", "Delivered"
    DEAD = "dead", "Given up"


class Delivery(models.Model):
    """A message to one webhook or one person, written in the transaction of its event: Postgres is the truth."""

    message_id = models.UUIDField(default=uuid.uuid4, unique=True, help_text="The same in every attempt.")
    team = models.ForeignKey(Team, on_delete=models.CASCADE, related_name="deliveries")
    webhook = models.ForeignKey(Webhook, on_delete=models.CASCADE, null=True, related_name="deliveries")
    person = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.CASCADE, null=True, related_name="+")
    event = models.ForeignKey(AuditEvent, on_delete=models.SET_NULL, null=True, related_name="+")
    action = models.CharField(max_length=60)
    payload = models.JSONField()
    state = models.CharField(max_length=10, choices=DeliveryState.choices, default=DeliveryState.WAITING)
    attempts = models.PositiveIntegerField(default=0)
    next_try_at = models.DateTimeField(default=timezone.now)
    status = models.PositiveIntegerField(null=True, help_text="Of the last answer.")
    response = models.TextField(blank=True, help_text="The beginning of the last answer.")
    error = models.CharField(max_length=300, blank=True)
    created_at = models.DateTimeField(auto_now_add=True)
    tried_at = models.DateTimeField(null=True)

    class Meta:
        constraints: ClassVar = [
            models.CheckConstraint(
                condition=models.Q(webhook=None) ^ models.Q(person=None), name="delivery_to_a_webhook_or_a_person"
            )
        ]
        indexes: ClassVar = [
            models.Index(fields=["next_try_at"], name="delivery_due", condition=models.Q(state="waiting")),
            models.Index(fields=["webhook", "-id"], name="delivery_log"),
        ]

    def __str__(self) -> str:
        return f"{self.action} to {self.webhook or self.person}"

    def get_absolute_url(self) -> str:
        return reverse("webhooks:delivery", args=[self.pk])

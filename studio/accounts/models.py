"""People, teams and what they may do."""

from __future__ import annotations

import hashlib
import secrets
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar

from django.contrib.auth.models import AbstractUser
from django.db import models
from django.dispatch import Signal
from django.utils import timezone
from django.utils.crypto import salted_hmac

if TYPE_CHECKING:
    from django.db.models import QuerySet


class Role(models.TextChoices):
    """What a member of a team may do; each role may do all that those before it may."""

    VIEWER = "viewer", "Viewer: looks at everything in the team"
    TRAINER = "trainer", "Trainer: uploads datasets and queues jobs"
    LEAD = "lead", "Lead: reviews adapters and orders the queue"
    ADMIN = "admin", "Admin: members, tokens and base models"

    def includes(self, other: Role) -> bool:
        """Whether this role may do all that `other` may."""
        order = list(Role)
        return order.index(self) >= order.index(other)


class User(AbstractUser):
    """A person. Signs in with a user name and a password, or with a one-time link."""

    teams: models.ManyToManyField[Team, Membership] = models.ManyToManyField("Team", through="Membership")
    session_generation = models.PositiveIntegerField(default=0, help_text="Rises to end every session of the person.")

    def _get_session_auth_hash(self, secret: str | None = None) -> str:
        # Django's own, which ends sessions when the password changes, with a generation beside the password.
        return salted_hmac(
            "studio.accounts.models.User", f"{self.password}:{self.session_generation}", secret, algorithm="sha256"
        ).hexdigest()

    def display_name(self) -> str:
        return self.get_full_name() or self.username


class Team(models.Model):
    """Everything a person makes belongs to a team; another team sees nothing of it."""

    name = models.CharField(max_length=80)
    slug = models.SlugField(max_length=80, unique=True)
    created_at = models.DateTimeField(auto_now_add=True)

    def __str__(self) -> str:
        return self.name


class Membership(models.Model):
    """A person in a team, with a role."""

    user = models.ForeignKey(User, on_delete=models.CASCADE, related_name="memberships")
    team = models.ForeignKey(Team, on_delete=models.CASCADE, related_name="memberships")
    role = models.CharField(max_length=10, choices=Role.choices, default=Role.TRAINER)
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        constraints: ClassVar = [models.UniqueConstraint(fields=["user", "team"], name="one_membership_per_team")]

    def __str__(self) -> str:
        return f"{self.user} in {self.team} as {self.role}"

    def may(self, role: Role) -> bool:
        """Whether this member may do what `role` may."""
        return Role(self.role).includes(role)


def hash_secret(secret: str) -> str:
    """sha256 of a random secret. The secrets have 256 bits of their own, so no salt or slow hash is needed."""
    return hashlib.sha256(secret.encode()).hexdigest()


class LoginLink(models.Model):
    """A link that signs a person in once, within a short time. Only its hash is stored."""

    LIFETIME = timedelta(hours=12)

    user = models.ForeignKey(User, on_delete=models.CASCADE, related_name="login_links")
    secret_sha256 = models.CharField(max_length=64, unique=True)
    expires_at = models.DateTimeField()
    used_at = models.DateTimeField(null=True)

    def __str__(self) -> str:
        return f"login link for {self.user}"

    @classmethod
    def create_for(cls, user: User, *, lifetime: timedelta = LIFETIME) -> str:
        """The secret part of a fresh link for a person."""
        secret = secrets.token_urlsafe(32)
        cls.objects.create(user=user, secret_sha256=hash_secret(secret), expires_at=timezone.now() + lifetime)
        return secret

    @classmethod
    def redeem(cls, secret: str) -> User | None:
        """The person whose link this is, once; None when it is unknown, used or too old."""
        now = timezone.now()
        link = cls.objects.filter(
            secret_sha256=hash_secret(secret), used_at=None, expires_at__gt=now, user__is_active=True
        ).first()
        # The row count decides: two requests with one link cannot both win.
        if link is None or cls.objects.filter(pk=link.pk, used_at=None).update(used_at=now) != 1:
            return None
        return link.user


class Scope(models.TextChoices):
    """What an API token may do."""

    READ = "read", "Read everything in the team"
    WRITE = "write", "Upload datasets, queue and cancel jobs"


class ApiToken(models.Model):
    """A team's key to the REST API, shown once and stored hashed. Dies with its maker's account."""

    PREFIX = "pst_"
    LIFETIME = timedelta(days=365)

    team = models.ForeignKey(Team, on_delete=models.CASCADE, related_name="api_tokens")
    created_by = models.ForeignKey(User, on_delete=models.CASCADE, related_name="api_tokens")
    name = models.CharField(max_length=80)
    hint = models.CharField(max_length=12, help_text="The secret's first characters, to tell tokens apart.")
    secret_sha256 = models.CharField(max_length=64, unique=True)
    scopes = models.JSONField(default=list)
    created_at = models.DateTimeField(auto_now_add=True)
    expires_at = models.DateTimeField()
    last_used_at = models.DateTimeField(null=True)
    revoked_at = models.DateTimeField(null=True)

    def __str__(self) -> str:
        return f"{self.name} ({self.hint}...)"

    @classmethod
    def issue(cls, *, team: Team, user: User, name: str, scopes: list[str]) -> tuple[ApiToken, str]:
        """A new token and its secret; the secret exists nowhere else afterwards."""
        secret = cls.PREFIX + secrets.token_urlsafe(32)
        token = cls.objects.create(
            team=team,
            created_by=user,
            name=name,
            hint=secret[: len(cls.PREFIX) + 6],
            scopes=scopes,
            secret_sha256=hash_secret(secret),
            expires_at=timezone.now() + cls.LIFETIME,
        )
        return token, secret

    @classmethod
    def find(cls, secret: str) -> ApiToken | None:
        """The living token with this secret."""
        return (
            cls.objects.select_related("team", "created_by")
            .filter(
                secret_sha256=hash_secret(secret),
                revoked_at=None,
                expires_at__gt=timezone.now(),
                created_by__is_active=True,
                created_by__memberships__team=models.F("team"),
            )
            .first()
        )


class AuditEvent(models.Model):
    """Who did what to which object, when. Rows are only ever added."""

    team = models.ForeignKey(Team, on_delete=models.CASCADE, related_name="audit_events", null=True)
    user = models.ForeignKey(User, on_delete=models.SET_NULL, null=True, related_name="+")
    token = models.ForeignKey(ApiToken, on_delete=models.SET_NULL, null=True, related_name="+")
    action = models.CharField(max_length=60, help_text='Namespaced: "dataset.uploaded".')
    object_type = models.CharField(max_length=40, blank=True)
    object_id = models.CharField(max_length=40, blank=True)
    object_name = models.CharField(max_length=200, blank=True)
    details = models.JSONField(default=dict)
    at = models.DateTimeField(auto_now_add=True)

    class Meta:
        indexes: ClassVar = [models.Index(fields=["team", "-at"], name="audit_by_team")]

    def __str__(self) -> str:
        return f"{self.action} {self.object_type} {self.object_id}"


def audit_events_of(team: Team) -> QuerySet[AuditEvent]:
    """A team's audit events, the newest first."""
    return team.audit_events.select_related("user", "token").order_by("-at")


audit_event_recorded = Signal()
"""Sent with `event`, an AuditEvent, in the transaction that recorded it."""


def record(
    action: str,
    *,
    team: Team | None,
    user: User | None = None,
    token: ApiToken | None = None,
    target: models.Model | None = None,
    **details: Any,
) -> AuditEvent:
    """Add an audit event. Never put secrets or row contents into `details`.

    Whoever listens to `audit_event_recorded` hears of it within the caller's transaction.
    """
    event = AuditEvent.objects.create(
        team=team,
        user=user,
        token=token,
        action=action,
        details=details,
        object_type=target._meta.model_name or "" if target is not None else "",
        object_id=str(target.pk) if target is not None else "",
        object_name=str(target)[:200] if target is not None else "",
    )
    audit_event_recorded.send(sender=AuditEvent, event=event)
    return event

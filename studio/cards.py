"""What cards of adapters and of datasets share: how an edit is refused, and who edited one before."""

from __future__ import annotations

import hashlib

from django.db.models import Model

from studio.accounts.models import AuditEvent, Team
from studio.markdown import without_front_matter
from workers.errors import ExplainedError

MAX_CHARACTERS = 100_000
NUM_EDITS = 20


class CardConflictError(ExplainedError):
    """Somebody else changed the card since the person opened it."""

    code = "card_conflict"


class CardTooLongError(ExplainedError):
    """A card beyond what is stored."""

    code = "card_too_long"


def cleaned(body: str) -> str:
    """A text as it is stored: without front matter, which is ours, and without NUL, which the database cannot hold."""
    return without_front_matter(body.replace("\r\n", "\n").replace("\0", "")).strip()


def card_version(body: str | None) -> str:
    """What tells one text of a card from another: its sha256."""
    return hashlib.sha256((body or "").encode()).hexdigest()


def refuse_too_long(body: str) -> None:
    """Raise CardTooLongError for a text that cannot be stored."""
    if len(body) > MAX_CHARACTERS:
        raise CardTooLongError(
            f"The card has {len(body):,} characters; {MAX_CHARACTERS:,} can be stored.",
            next_step="Shorten it.", field="body",
        )  # fmt: skip


def refuse_conflict(held: str | None, seen: str) -> None:
    """Raise CardConflictError when a card has another text by now than the person began with."""
    if card_version(held) != seen:
        raise CardConflictError(
            "The card was changed by somebody else while you edited it. Nothing was saved.",
            next_step="Look at both texts, then save yours again or take theirs.", field="body",
        )  # fmt: skip


def edits_of(team: Team, action: str, target: Model) -> list[AuditEvent]:
    """Who edited a card when, the newest first; the last twenty."""
    kind = target._meta.model_name
    events = AuditEvent.objects.filter(team=team, action=action, object_type=kind, object_id=str(target.pk))
    return list(events.select_related("user", "token").order_by("-at")[:NUM_EDITS])

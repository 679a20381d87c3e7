"""The card of a dataset: what people write about it, in Markdown, behind front matter that is ours."""

from __future__ import annotations

import hashlib

from django.db import transaction
from django.utils.safestring import SafeString

from studio.accounts.models import ApiToken, AuditEvent, User, record
from studio.datasets.models import Dataset
from studio.markdown import render_markdown, without_front_matter
from workers.errors import ExplainedError

MAX_CHARACTERS = 100_000
EDITED = "dataset.card_edited"


class CardConflictError(ExplainedError):
    """Somebody else changed the card since the person opened it."""

    code = "card_conflict"


class CardTooLongError(ExplainedError):
    """A card beyond what is stored."""

    code = "card_too_long"


def card_version(body: str) -> str:
    """Names a text, so that an edit knows what it began with."""
    return hashlib.sha256(body.encode("utf-8", "replace")).hexdigest()


def cleaned(body: str) -> str:
    """A text as it is stored: without front matter, and without NUL, which no text of the database may hold."""
    return without_front_matter(body.replace("\r\n", "\n").replace("\0", "")).strip()


def read_card(dataset: Dataset) -> SafeString | None:
    """The card as safe HTML; None when nothing is written."""
    return render_markdown(dataset.description) if dataset.description else None


def edit_card(dataset: Dataset, body: str, user: User, *, seen: str, token: ApiToken | None = None) -> bool:
    """Store a card's text, with an audit event. Front matter in it is dropped: it is written anew in each export.

    Args:
        seen: `card_version` of the text that the person began with.

    Returns:
        Whether anything changed.

    Raises:
        CardConflictError: the card has another text by now.
        CardTooLongError: more than can be stored.
    """
    body = cleaned(body)
    if len(body) > MAX_CHARACTERS:
        raise CardTooLongError(
            f"The card has {len(body):,} characters; {MAX_CHARACTERS:,} can be stored.", next_step="Shorten it.",
            field="body",
        )  # fmt: skip
    with transaction.atomic():
        held = Dataset.objects.select_for_update().only("pk", "description").get(pk=dataset.pk).description
        if card_version(held) != seen:
            raise CardConflictError(
                "The card was changed by somebody else while you edited it. Nothing was saved.",
                next_step="Look at both texts, then save yours again or take theirs.", field="body",
            )  # fmt: skip
        if held == body:
            return False
        Dataset.objects.filter(pk=dataset.pk).update(description=body)
        dataset.description = body
        record(
            EDITED, team=dataset.team, user=user, token=token, target=dataset,
            sha256=card_version(body), num_characters=len(body),
        )  # fmt: skip
    return True


def card_edits(dataset: Dataset) -> list[AuditEvent]:
    """Who edited the card when, the newest first; the last twenty."""
    events = AuditEvent.objects.filter(
        team=dataset.team_id, action=EDITED, object_type="dataset", object_id=str(dataset.pk)
    )
    return list(events.select_related("user", "token").order_by("-at")[:20])

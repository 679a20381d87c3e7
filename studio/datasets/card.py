"""The card of a dataset: what people write about it, in Markdown, behind front matter that is ours."""

from __future__ import annotations

from django.db import transaction
from django.utils.safestring import SafeString

from studio.accounts.models import ApiToken, User, record
from studio.cards import card_version, cleaned, refuse_conflict, refuse_too_long
from studio.datasets.models import Dataset
from studio.markdown import render_markdown

EDITED = "dataset.card_edited"


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
    refuse_too_long(body)
    with transaction.atomic():
        held = Dataset.objects.select_for_update().only("pk", "description").get(pk=dataset.pk).description
        refuse_conflict(held, seen)
        if held == body:
            return False
        Dataset.objects.filter(pk=dataset.pk).update(description=body)
        dataset.description = body
        record(
            EDITED, team=dataset.team, user=user, token=token, target=dataset,
            sha256=card_version(body), num_characters=len(body),
        )  # fmt: skip
    return True

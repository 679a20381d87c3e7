"""The model card of an adapter: README.md, whose text a person may have edited and whose front matter is ours."""

from __future__ import annotations

from django.db import transaction
from django.utils.safestring import SafeString

from studio.accounts.models import ApiToken, User, record
from studio.cards import card_version, cleaned, refuse_conflict, refuse_too_long
from studio.catalogue.models import Adapter, Score, Suite, TestSet
from studio.markdown import render_markdown, without_front_matter
from studio.storage import open_adapter_file
from workers.model_card import HELD_OUT_SPLIT, MeasuredOn, front_matter
from workers.results import SourceRecord

CARD_FILE = "README.md"
MAX_CARD_BYTES = 512 * 1024
EDITED = "adapter.card_edited"


def card_body(adapter: Adapter) -> str | None:
    """The card's text without front matter, as edited or else as generated; None when there is neither."""
    return adapter.card or generated_body(adapter)


def generated_body(adapter: Adapter) -> str | None:
    """The text that the trainer wrote; None when the folder has no card."""
    try:
        with open_adapter_file(adapter.folder, CARD_FILE) as file:
            source = file.read(MAX_CARD_BYTES).decode("utf-8", errors="replace")
    except FileNotFoundError:
        return None
    return without_front_matter(source).strip() + "\n"


def read_card(adapter: Adapter) -> SafeString | None:
    """The adapter's card as safe HTML; None when there is none."""
    body = card_body(adapter)
    return render_markdown(body) if body is not None else None


def adapter_front_matter(adapter: Adapter) -> str:
    """The front matter as of now: what the adapter is and every complete figure of it, one query."""
    scores = adapter.scores.select_related("run__suite__dataset_version").order_by("run_id", "evaluation")
    by_run: dict[int, list[Score]] = {}
    for score in scores:
        # An incomplete run's figures stand for nothing.
        if score.run.is_complete():
            by_run.setdefault(score.run_id, []).append(score)
    measured = [MeasuredOn(*_test_set(adapter, found[0]), found) for found in by_run.values()]
    for one in adapter.sources:
        source = SourceRecord.model_validate(one)
        measured.append(MeasuredOn(source.name, HELD_OUT_SPLIT, source.sha256, source.scores))
    lines = front_matter(
        name=adapter.name,
        method=adapter.method,
        objective=str(adapter.recipe.get("objective", "sft")),
        hub_id=adapter.base_model.hub_id,
        licence=adapter.base_model.licence,
        measured=measured,
    )
    return "\n".join(lines) + "\n"


def _test_set(adapter: Adapter, score: Score) -> tuple[str, str, str]:
    """Name, split and digest of the rows that a score is of."""
    if score.test_set == TestSet.SUITE and score.run.suite is not None:
        return str(score.run.suite), "suite", _rows_sha256(score.run.suite)
    if score.test_set == TestSet.GENERAL:
        return "PEFT Studio general set", "test", score.run.test_set_sha256
    dataset = adapter.recipe.get("dataset", {})
    if adapter.sources:
        return " + ".join(one["name"] for one in adapter.sources), HELD_OUT_SPLIT, ""
    return str(dataset.get("name", "dataset")), HELD_OUT_SPLIT, str(dataset.get("sha256") or "")


def _rows_sha256(suite: Suite) -> str:
    """Digest of what a suite's rows come from: of the dataset's file, or of the task files."""
    return suite.dataset_version.sha256 if suite.dataset_version else str(suite.evaluation["definitions_sha256"])


def edited_readme(adapter: Adapter) -> bytes:
    """README.md of an adapter whose card was edited, as the download has it."""
    return f"{adapter_front_matter(adapter)}\n{adapter.card.strip()}\n".encode()


def edit_card(adapter: Adapter, body: str, user: User, *, seen: str, token: ApiToken | None = None) -> bool:
    """Store a card's text; an empty one brings the generated text back. Front matter in it is dropped: it is ours.

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
    generated = generated_body(adapter)
    stored = "" if not body or body + "\n" == generated else body + "\n"
    with transaction.atomic():
        locked = Adapter.objects.select_for_update().only("pk", "card").get(pk=adapter.pk)
        before = locked.card or generated
        refuse_conflict(before, seen)
        if stored == locked.card:
            return False
        Adapter.objects.filter(pk=adapter.pk).update(card=stored)
        adapter.card = stored
        record(
            EDITED, team=adapter.team, user=user, token=token, target=adapter,
            sha256=card_version(card_body(adapter)), num_characters=len(stored), is_generated=not stored,
        )  # fmt: skip
    return True

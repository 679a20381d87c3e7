"""The page on which a row stands as a base model learns it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any
from urllib.parse import urlencode

from django.http import HttpResponse
from django.views.decorators.http import require_GET

from studio.accounts.access import TeamRequest, team_page
from studio.datasets import showing
from studio.datasets.learning import MAX_TOKENS, PreviewError, learn_row
from studio.datasets.learning_form import OFFERED_LENGTHS, LearningForm
from studio.datasets.views import render_tab, version_or_404

NO_LOSS = -100
"""The label of a token without loss, as transformers writes it."""


@dataclass(frozen=True)
class Run:
    """Neighbouring tokens of one kind."""

    kind: str
    tokens: list[dict[str, Any]]


@team_page()
@require_GET
def learned(request: TeamRequest, dataset_id: int, number: int) -> HttpResponse:
    """One row through a base model's template: each token trained, context or cut off, with its id."""
    version = version_or_404(request, dataset_id, number)
    bases = showing.base_models()
    form = LearningForm(request.GET, bases=bases)
    context: dict[str, Any] = {"form": form, "bases": bases, "offered_lengths": OFFERED_LENGTHS}
    status = 200
    if version.is_ready() and version.num_usable and bases:
        if form.is_valid():
            context |= _shown(version, form.cleaned_data, bases)
        else:
            status = 422
    return render_tab(request, version, "learned", context, status=status)


def _shown(version: Any, chosen: dict[str, Any], bases: Sequence[Any]) -> dict[str, Any]:
    base = next(one for one in bases if one.pk == chosen["base"])
    context: dict[str, Any] = {"base": base, "wanted_line": chosen["line"], "max_length": chosen["length"]}
    try:
        found = learn_row(
            version, base, max_length=chosen["length"], loss_on=chosen["loss_on"], line=chosen["line"]
        )  # fmt: skip
    except PreviewError as error:
        return {**context, "problem": f"{error.message} {error.next_step}".strip()}

    def link(line: int | None) -> str:
        return "" if line is None else "?" + urlencode({**chosen, "line": line})

    return {
        **context,
        "found": found,
        "previous_url": link(found["previous"]),
        "next_url": link(found["next"]),
        "first_url": link(1),
        "conversations": [_laid_out(one) for one in found["conversations"]],
    }


def _laid_out(conversation: dict[str, Any]) -> dict[str, Any]:
    """A conversation with its tokens in runs of one kind, and the ids of what is kept as the trainer has them."""
    tokens = conversation["tokens"]
    kept = [one for one in tokens if one["kind"] != "cut"]
    return {
        **conversation,
        "runs": [Run(kind, list(run)) for kind, run in groupby(tokens, key=lambda one: str(one["kind"]))],
        "num_not_listed": conversation["num_tokens"] - len(tokens),
        "max_listed": MAX_TOKENS,
        "ids": [one["id"] for one in kept],
        "labels": [one["id"] if one["kind"] == "trained" else NO_LOSS for one in kept],
        "cut_ids": [one["id"] for one in tokens if one["kind"] == "cut"],
        "weights": sorted({one["weight"] for one in kept if one["weight"] != 1.0}),
    }

"""Over the REST API: a row as a base model learns it."""

from __future__ import annotations

from typing import Any, Literal

from django.http import Http404
from ninja import Query, Router
from pydantic import Field

from studio.api.auth import ApiRequest
from studio.api.errors import ERRORS, ApiError
from studio.api.schemas import Out, QueryFields
from studio.datasets import showing
from studio.datasets.api import ready_version
from studio.datasets.learning import MAX_TOKENS, PreviewBusyError, learn_row
from studio.datasets.learning_form import DEFAULT_LENGTH, DEFAULT_LOSS_ON, LARGEST_LINE, LOSS_ON, MAX_LENGTH, MIN_LENGTH
from workers.learned import Conversation

router = Router(tags=["datasets"])


class LearnedOut(Out):
    """The first usable row at a line or behind it; `line` is null when none is left."""

    line: int | None
    previous: int | None
    next: int | None
    template: Literal["own", "plain"]
    stop_tokens: list[str]
    why_not_trainable: str
    conversations: list[Conversation]


class LearnedQuery(QueryFields):
    """Which row, for which base model, with which of the recipe's settings."""

    base_model_id: int = Field(ge=1, le=2**63 - 1)
    line: int = Field(1, ge=1, le=LARGEST_LINE)
    max_length: int = Field(DEFAULT_LENGTH, ge=MIN_LENGTH, le=MAX_LENGTH)
    loss_on: Literal[LOSS_ON] = DEFAULT_LOSS_ON  # type: ignore[valid-type]
    max_tokens: int = Field(MAX_TOKENS, ge=1, le=32_768, description="Tokens of each conversation that are listed.")


@router.get("datasets/{int:dataset_id}/versions/{int:number}/learned/", response={200: LearnedOut, **ERRORS})
def learned_row(request: ApiRequest, dataset_id: int, number: int, filters: Query[LearnedQuery]) -> dict[str, Any]:
    """A row through a base model's chat template: each token trained, context or cut off, as training has it."""
    version = ready_version(request, dataset_id, number)
    base = next((one for one in showing.base_models() if one.pk == filters.base_model_id), None)
    if base is None:
        raise Http404
    try:
        found = learn_row(
            version, base, max_length=filters.max_length, loss_on=filters.loss_on, line=filters.line,
            max_tokens=filters.max_tokens,
        )  # fmt: skip
    except PreviewBusyError as error:
        raise ApiError(503, error.code, error.message, help=error.next_step, headers={"Retry-After": "5"}) from error
    return {**found, "why_not_trainable": version.why_not_trainable()}

"""What makes two scores comparable: digests of the rows that were scored and of what decides an answer and a loss."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from workers.evaluations import choose_evaluations
from workers.examples import Example
from workers.recipe import EvaluationSettings

if TYPE_CHECKING:
    from workers.rendering import Renderer


def rows_sha256(examples: Sequence[Example]) -> str:
    """Digest of the rows' contents, whatever file and lines they come from; of no rows too."""
    rows = [[[message.role, message.content, message.train] for message in one.messages] for one in examples]
    return _digest(rows)


def settings_sha256(evaluation: EvaluationSettings, renderer: Renderer) -> str:
    """Digest of what decides a row's loss and answer: template, cut, loss-carrying turns, number and length of answers.

    Of the metrics only those are part of it whose options are scored: the others are computed from the same rows.
    """
    with_options = sorted(one.key for one in choose_evaluations(evaluation.metrics) if one.needs == "choices")
    return _digest(
        {
            "template": renderer.template,
            "max_length": renderer.max_length,
            "loss_on": renderer.loss_on,
            "num_generated": evaluation.num_generated,
            "max_new_tokens": evaluation.max_new_tokens,
            **({"options": with_options} if with_options else {}),
        }
    )


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=True, separators=(",", ":")).encode()).hexdigest()

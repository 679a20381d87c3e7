"""What the page of a base model shows besides its row: which methods train it, and how it reads a conversation."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

from django.db.models import Prefetch, QuerySet

from studio.accounts.models import Team
from studio.catalogue.listing import method_label
from studio.catalogue.models import Adapter, BaseModel, EvaluationRun, Score, TestSet
from studio.datasets.learning import PreviewError, learn_turns
from workers.errors import ExplainedError
from workers.evaluations import evaluations
from workers.methods import methods

SAMPLE = (
    ("system", "You answer in one sentence."),
    ("user", "What is the capital of France?"),
    ("assistant", "The capital of France is Paris."),
    ("user", "And of Spain?"),
    ("assistant", "The capital of Spain is Madrid."),
)
PREVIEW_TOKENS = 4096
SHOWN_USERS = 10


@dataclass(frozen=True)
class MethodFacts:
    """How a method fits a base: its precisions, its parameters at defaults, or why it does not."""

    name: str
    label: str
    summary: str
    precisions: str
    num_trainable: int | None
    share_percent: float | None
    refusal: str = ""


@dataclass(frozen=True)
class TextPart:
    """A stretch of rendered text; `is_trained` says whether its tokens carry loss."""

    text: str
    is_trained: bool


@dataclass(frozen=True)
class TemplatePreview:
    """The sample conversation as the model reads it, or why it cannot be rendered."""

    parts: tuple[TextPart, ...] = ()
    num_tokens: int = 0
    error: str = ""


def method_facts(base: BaseModel) -> list[MethodFacts]:
    """Every installed method on this base, at the method's default settings."""
    shape, found = base.model_shape(), []
    for method in methods().values():
        count, refusal = None, ""
        try:
            count = method.num_trainable(method.Settings(), shape)
        except ExplainedError as error:
            refusal = f"{error.message} {error.next_step}".strip()
        share = 100 * count / shape.num_parameters if count is not None and shape.num_parameters else None
        found.append(
            MethodFacts(method.name, method.label, method.summary, ", ".join(method.precisions), count, share, refusal)
        )
    return found


def users_of(adapters: QuerySet[Adapter], metric: str) -> list[Adapter]:
    """The newest of these adapters, each with `method_label` and its held-out `shown_score` on a metric, or None."""
    scores = Score.objects.filter(evaluation=metric, test_set=TestSet.HELD_OUT)
    found = list(
        adapters.only("team_id", "name", "version", "method", "state", "created_at")
        .prefetch_related(Prefetch("scores", scores, to_attr="shown_scores"))
        .order_by("-created_at", "-pk")[:SHOWN_USERS]
    )
    for adapter in found:
        adapter.method_label = method_label(adapter.method)  # type: ignore[attr-defined]
        adapter.shown_score = next(iter(adapter.shown_scores), None)  # type: ignore[attr-defined]
    return list[Adapter](found)


@dataclass(frozen=True)
class BaseRun:
    """A run of the base alone on a team's suite: figures are (label, value, low, high, number of rows)."""

    run: EvaluationRun
    figures: list[tuple[str, float, float, float, int]]


def own_runs(team: Team, base: BaseModel) -> list[BaseRun]:
    """The newest runs of a base alone on the team's suites."""
    runs = EvaluationRun.objects.filter(team=team, base_model=base, adapter=None).select_related("suite")
    known = evaluations()
    return [
        BaseRun(
            run,
            [
                (known[name].label if name in known else name, one["value"], one["low"], one["high"], one["num_rows"])
                for name, one in sorted(run.base_figures.items())
            ],
        )
        for run in runs.order_by("-created_at", "-pk")[:SHOWN_USERS]
    ]


def template_preview(base: BaseModel) -> TemplatePreview:
    """The sample conversation through the base's own tokenizer and chat template."""
    try:
        return _render(base.folder, base.revision)
    except PreviewError as error:
        return TemplatePreview(error=f"{error.message} {error.next_step}".strip())


@lru_cache(maxsize=32)
def _render(folder: str, revision: str) -> TemplatePreview:
    (found,) = learn_turns(folder, revision, SAMPLE, max_length=PREVIEW_TOKENS)["conversations"]
    if not found["tokens"]:
        return TemplatePreview(error=found["problem"])
    parts = tuple(
        TextPart("".join(token["text"] for token in group), is_trained)
        for is_trained, group in groupby(found["tokens"], key=lambda token: bool(token["kind"] == "trained"))
    )
    return TemplatePreview(parts, found["num_tokens"])

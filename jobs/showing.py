"""What pages show of a job: where it is, how far, its latest figures and what to do when it failed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import redis
from django.conf import settings
from django.db.models import F, OuterRef, QuerySet, Subquery
from django.db.models.functions import JSONObject
from django.utils import timezone

from jobs import samples, series
from jobs.mixes import mixed_rows
from jobs.models import LEASED_STATES, Job, JobAttempt, JobKind, JobState, MetricPoint
from studio.templatetags.components import duration, short_number, significant
from workers.events import PHASES, PhaseEvent, StepEvent, ValidationEvent

logger = logging.getLogger(__name__)

STATE_COLOURS = {
    JobState.QUEUED: "badge-neutral",
    JobState.RETRY_WAIT: "badge-warning",
    JobState.RUNNING: "badge-info",
    JobState.CANCELLING: "badge-warning",
    JobState.PAUSED: "badge-neutral",
    JobState.SUCCEEDED: "badge-success",
    JobState.FAILED: "badge-error",
    JobState.CANCELLED: "badge-neutral",
}
PHASE_LABELS = {
    "preparing": "Preparing",
    "loading": "Loading",
    "scoring_base": "Scoring base",
    "training": "Training",
    "evaluating": "Evaluating",
    "packaging": "Packaging",
}
# Enough to hold the newest step of a job that also reports phases and validations.
_RECENT_ENTRIES = 30
MAX_EVENTS = 200
DASH = "\N{EN DASH}"


@dataclass(frozen=True)
class PhaseMark:
    """One phase on the phase line; `status` is done, current, stopped or to come."""

    label: str
    status: str


@dataclass(frozen=True)
class Tile:
    """One figure of a job page."""

    label: str
    value: str
    unit: str = ""
    note: str = ""


@dataclass(frozen=True)
class Live:
    """The newest that a running job's stream says; None where it says nothing."""

    phase: PhaseEvent | None = None
    step: StepEvent | None = None
    validation: ValidationEvent | None = None


def job_for_page(jobs: QuerySet[Job]) -> QuerySet[Job]:
    """Jobs with all that a page shows of one, in one query."""
    points = MetricPoint.objects.filter(job=OuterRef("pk")).order_by("-attempt", "-step")
    newest = points.filter(loss__isnull=False).values(
        json=JSONObject(
            step=F("step"),
            loss=F("loss"),
            learning_rate=F("learning_rate"),
            grad_norm=F("grad_norm"),
            tokens_per_second=F("tokens_per_second"),
        )
    )
    validation = points.filter(validation_loss__isnull=False).values(
        json=JSONObject(step=F("step"), loss=F("validation_loss"))
    )
    return jobs.select_related(
        "team",
        "dataset_version__dataset",
        "base_model",
        "created_by",
        "worker",
        "adapter",
        "parent",
        "stop_asked_by",
        "scored_adapter",
        "suite",
        "evaluation_run",
    ).annotate(
        newest_point=Subquery(newest[:1]),
        newest_validation=Subquery(validation[:1]),
        peak_memory_bytes=Subquery(
            JobAttempt.objects.filter(job=OuterRef("pk")).order_by("-peak_memory_bytes").values("peak_memory_bytes")[:1]
        ),
        newest_sample_at=samples.newest_sample_at(),
        mixed=mixed_rows(),
    )


def listed_jobs(jobs: QuerySet[Job]) -> QuerySet[Job]:
    """Jobs with what a row of a list shows, the recipes left out."""
    return jobs.select_related("dataset_version__dataset", "base_model", "created_by").defer(
        "recipe", "asked_recipe", "estimate", "plan", "dataset_version__statistics", "base_model__files",
        "base_model__shape",
    )  # fmt: skip


def read_live(job: Job) -> Live:
    """What a running job's stream said last; nothing when it does not run or Redis does not answer."""
    if job.state not in LEASED_STATES:
        return Live()
    found: dict[type[Any], Any] = {}
    try:
        entries = series.read_backwards(job.pk, count=_RECENT_ENTRIES)
    except redis.RedisError as error:
        logger.warning("The newest figures of %s are missing: %s", job.pk, error)
        return Live()
    for _entry_id, fields in entries:
        parsed = series.parse_entry(fields)
        if parsed and parsed.attempt == job.attempt:
            found.setdefault(type(parsed.event), parsed.event)
    return Live(found.get(PhaseEvent), found.get(StepEvent), found.get(ValidationEvent))


def colour_of(job: Job) -> str:
    """The badge class of a job's state; the state's word always stands beside the colour."""
    return STATE_COLOURS[JobState(job.state)]


def percent_of(job: Job, step: int | None = None) -> int:
    """Steps done of those planned, in percent."""
    if job.state == JobState.SUCCEEDED:
        return 100
    done = job.step if step is None else step
    return min(100, 100 * done // job.num_steps) if job.num_steps else 0


def title_of(job: Job, percent: int) -> str:
    """The page's title, which says the state in a tab: "35 % · name"."""
    if job.state == JobState.RUNNING and percent:
        return f"{percent} % · {job.name}"
    word = PHASE_LABELS.get(job.phase) if job.state == JobState.RUNNING else ""
    return f"{word or job.get_state_display()} · {job.name}"


def phase_marks(job: Job, phase: str) -> list[PhaseMark]:
    """The phase line: validated, queued, the trainer's phases, done."""
    waits = "Paused" if job.state == JobState.PAUSED else "Queued"
    phases = phases_of(job)
    labels = ["Validated", waits, *(PHASE_LABELS[name] for name in phases), "Done"]
    if job.state == JobState.SUCCEEDED:
        return [PhaseMark(label, "done") for label in labels]
    current = 2 + phases.index(phase) if job.state in LEASED_STATES and phase in phases else 1
    ended = job.is_final()
    if ended:
        # A job that ended without a product got as far as its last step says.
        current = 2 + phases.index("training") if job.step else 2 if job.attempt else 1
    return [
        PhaseMark(label, "done" if i < current else ("stopped" if ended else "current") if i == current else "to come")
        for i, label in enumerate(labels)
    ]


def phases_of(job: Job) -> list[str]:
    """The phases that a trainer goes through for a job of this kind."""
    left_out = set() if job.kind == JobKind.TRAIN else {"training"}
    if job.kind == JobKind.EVALUATE and job.scored_adapter_id is None:
        left_out.add("evaluating")
    return [name for name in PHASES if name not in left_out]


def attempt_line(job: Job, attempts: Sequence[JobAttempt]) -> str:
    """Which try of a running job this is and where it went on, once it is not the first; `attempts` newest first."""
    if job.state not in LEASED_STATES or len(attempts) < 2:
        return ""
    newest = attempts[0]
    found = f"Attempt {job.failures_counted + 1} of {settings.MAX_ATTEMPTS}"
    if newest.accumulation:  # its plan is known
        found += f", resumed at step {newest.from_step:,}" if newest.from_step else ", from step 0"
    if job.micro_batch_size:
        found += f", with {job.micro_batch_size} row{'s' if job.micro_batch_size > 1 else ''} in memory at once"
    return f"{found}."


def elapsed_seconds(job: Job) -> float | None:
    """Seconds since the job's first attempt began, or that it took."""
    if job.started_at is None:
        return None
    return max(0.0, ((job.finished_at or timezone.now()) - job.started_at).total_seconds())


def gibibytes(num_bytes: float | None) -> str:
    """Bytes as GiB with a sensible number of digits; a dash for nothing."""
    if not num_bytes:
        return DASH
    size = num_bytes / 1024**3
    return f"{size:.2f}" if size < 10 else f"{size:.1f}"


def tiles_of(job: Job, live: Live) -> list[Tile]:
    """The figures on top of a job page, the newest that are known."""
    stored: dict[str, Any] = job.newest_point or {}  # type: ignore[attr-defined]
    validation: dict[str, Any] = job.newest_validation or {}  # type: ignore[attr-defined]
    step = live.step
    newest = step.model_dump() if step else stored
    checked = live.validation.model_dump() if live.validation else validation
    memory = max(step.peak_memory_bytes if step else 0, job.peak_memory_bytes or 0)  # type: ignore[attr-defined]
    phase = live.phase.phase if live.phase else job.phase
    # What was known of the time left ends with the last step; scoring is not in it.
    left = None if phase not in {"", "training"} else step.seconds_left if step else job.seconds_left
    speed = newest.get("tokens_per_second")
    tiles = [
        Tile("Loss", significant(newest.get("loss")), note=f"step {newest['step']:,}" if newest else ""),
        Tile("Validation loss", significant(checked.get("loss")), note=f"step {checked['step']:,}" if checked else ""),
        Tile("Learning rate", significant(newest.get("learning_rate"))),
        Tile("Gradient norm", significant(newest.get("grad_norm"))),
        Tile("Speed", short_number(round(speed)) if speed is not None else DASH, "tokens/s"),
        Tile("Elapsed", duration(elapsed_seconds(job))),
    ]
    if job.is_final():
        tiles.append(Tile("Steps", f"{job.step:,}"))
    else:
        tiles.append(Tile("Time left", f"≈ {duration(left)}" if left is not None else DASH))
    tiles.append(Tile("Peak memory", gibibytes(memory), "GiB"))
    return tiles


def live_context(job: Job) -> dict[str, Any]:
    """What the changing parts of a job page show: the phase line, the progress bar, the figures, the events."""
    live = read_live(job)
    step = max(live.step.step if live.step else 0, job.step)
    phase = live.phase.phase if live.phase else job.phase
    percent = percent_of(job, step)
    events = list(job.events.order_by("-sequence")[:MAX_EVENTS])
    return {
        "job": job,
        "phases": phase_marks(job, phase),
        "phase_label": PHASE_LABELS.get(phase, ""),
        "phase_event": live.phase if live.phase and live.phase.total and live.phase.phase != "training" else None,
        "step": step,
        "percent": percent,
        "page_title": title_of(job, percent),
        "tiles": tiles_of(job, live),
        "events": events,
        "state_colour": colour_of(job),
    }

"""Making an adapter again: the very same recipe on the very same base and rows, or a refusal that says why not."""

from __future__ import annotations

from jobs.models import Job, JobKind, JobState
from jobs.queueing import RUN_EXACTLY, queue_job
from studio.accounts.models import ApiToken, User
from studio.storage import is_blob_stored
from workers.errors import ExplainedError, UnknownPluginError
from workers.methods import get_method
from workers.recipe import Recipe


class NotRepeatableError(ExplainedError):
    """A job whose outcome cannot be made again exactly."""

    code = "not_repeatable"


def run_exactly(job: Job, user: User, *, idempotency_key: str, token: ApiToken | None = None) -> Job:
    """Queue a job with the same recipe, base revision and dataset version as one that succeeded.

    Raises:
        NotRepeatableError: what it was made from has changed or is gone, or a person ended it.
    """
    recipe = Recipe.from_dict(job.recipe)
    if (reason := why_not(job, recipe)) is not None:
        raise reason
    return queue_job(
        team=job.team, user=user, recipe=recipe, asked_recipe=recipe, base_model=job.base_model,
        dataset_version=job.dataset_version, idempotency_key=idempotency_key, parent=job, estimate=job.estimate,
        token=token, queued_as=RUN_EXACTLY,
    )  # fmt: skip


def why_not(job: Job, recipe: Recipe) -> NotRepeatableError | None:
    """Why a job cannot be repeated exactly; None when it can."""
    version = job.dataset_version
    if job.kind != JobKind.TRAIN or job.state != JobState.SUCCEEDED or job.adapter is None or version is None:
        return NotRepeatableError(
            f"“{job.name}” has made no adapter that could be made again.", next_step="Duplicate it instead."
        )
    if job.adapter.stopped_at_step is not None:
        return NotRepeatableError(
            f"A person ended “{job.name}” at step {job.adapter.stopped_at_step:,}: its recipe alone would go further.",
            next_step="Duplicate it and set that many steps.",
        )
    trained_on = str(job.adapter.provenance.get("base_revision") or recipe.base_model.revision)
    if trained_on and job.base_model.revision != trained_on:
        return NotRepeatableError(
            f"The base model {job.base_model} has changed: the adapter was trained on revision {trained_on[:12]}, and "
            f"registered now is {job.base_model.revision[:12]}.",
            next_step="Register the old files again, or duplicate the job to train on the new ones.",
        )
    sha256 = recipe.dataset.sha256
    if sha256 and version.sha256 != sha256:
        return NotRepeatableError(
            f"{version} has other contents than the adapter was trained on: its sha256 was {sha256[:12]} and is "
            f"{version.sha256[:12]} now.",
            next_step="Upload the old file again as a version of its own and duplicate the job.",
        )
    if not is_blob_stored(version.sha256):
        return NotRepeatableError(
            f"The file of {version} was removed from the studio's storage.",
            next_step="Ask whoever runs the studio to restore it.",
        )
    if recipe.dataset.split is not None and not is_blob_stored(recipe.dataset.split.sha256):
        return NotRepeatableError(
            f"The file of the split “{recipe.dataset.split.name}” was removed from the studio's storage.",
            next_step="Ask whoever runs the studio to restore it.",
        )
    try:
        get_method(recipe.method)
    except UnknownPluginError:
        return NotRepeatableError(
            f'The method "{recipe.method}" is not installed any more.', next_step="Choose another method."
        )
    return None

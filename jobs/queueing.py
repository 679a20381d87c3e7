"""What people do with jobs: queue, stop, try again. Called by pages, API and commands alike."""

from __future__ import annotations

import hashlib
import json
from functools import partial

from django.db import IntegrityError, transaction
from django.db.models.functions import Now

from jobs import lifecycle
from jobs.durations import expected_seconds
from jobs.models import Job, JobState
from jobs.retrying import tried_again
from jobs.waking import wake_workers
from studio.accounts.models import ApiToken, Team, User, record
from studio.catalogue.models import BaseModel
from studio.datasets.models import DatasetVersion, VersionState
from workers.errors import RecipeError
from workers.failpoints import failpoint
from workers.recipe import Recipe


class IdempotencyConflictError(RecipeError):
    """A key that made one job is used again for another."""

    code = "idempotency_conflict"


@tried_again
def queue_job(
    *,
    team: Team,
    user: User,
    recipe: Recipe,
    base_model: BaseModel,
    dataset_version: DatasetVersion,
    idempotency_key: str,
    asked_recipe: Recipe | None = None,
    estimate: dict[str, object] | None = None,
    parent: Job | None = None,
    token: ApiToken | None = None,
) -> Job:
    """Add a job to the queue. The same key in the same team gives the job that the first call made.

    Args:
        recipe: with every "auto" resolved (workers.resolving.resolve).
        asked_recipe: as the person gave it; `recipe` when it is None.
        token: the API token that asked, for the audit log.

    Raises:
        RecipeError: the dataset is not ready or not the team's.
        IdempotencyConflictError: the key belongs to a job with another recipe.
    """
    if dataset_version.dataset.team_id != team.pk:
        raise RecipeError("There is no such dataset.", field="dataset")
    if dataset_version.state != VersionState.READY:
        raise RecipeError(
            f"{dataset_version} is not ready: {dataset_version.get_state_display().lower()}.",
            next_step="Open the dataset to see what is missing.",
            field="dataset",
        )
    asked = (asked_recipe or recipe).to_dict()
    known = Job.objects.filter(team=team, idempotency_key=idempotency_key).first()
    if known is not None:
        return _same_job(known, asked)
    try:
        with transaction.atomic():
            job = Job.objects.create(
                team=team, created_by=user, name=recipe.name, recipe=recipe.to_dict(),
                asked_recipe=asked, base_model=base_model,
                dataset_version=dataset_version, idempotency_key=idempotency_key, not_before=Now(), parent=parent,
                needs={"gpus": 1, "memory_bytes": (estimate or {}).get("total_bytes", 0)}, estimate=estimate or {},
                expected_seconds=expected_seconds(
                    team, estimate or {}, method=recipe.method, base_model=base_model.name
                ),
            )  # fmt: skip
            lifecycle.add_event(job.pk, 0, f"Queued by {user.display_name()}.")
            record("job.queued", team=team, user=user, token=token, target=job)
            transaction.on_commit(partial(failpoint, "submit.after_commit"))
            wake_workers()
            failpoint("submit.before_commit")
    except IntegrityError:
        # A second submit of the same form was committed between our look and our insert; or what the job needs
        # was deleted then.
        known = Job.objects.filter(team=team, idempotency_key=idempotency_key).first()
        if known is not None:
            return _same_job(known, asked)
        for field, needed in (("dataset", dataset_version), ("base_model", base_model)):
            if not type(needed).objects.filter(pk=needed.pk).exists():
                raise RecipeError(
                    f"{needed} was deleted at this moment, so the job was not queued.",
                    next_step="Choose another one.",
                    field=field,
                ) from None
        raise
    job.refresh_from_db()
    return job


def key_for_another(key: str, asked: Recipe) -> str:
    """The key of the job that a form makes whose own key has made another: the same one at every submit."""
    recipe = json.dumps(asked.to_dict(), sort_keys=True)
    return hashlib.sha256(f"{key}\n{recipe}".encode()).hexdigest()


def _same_job(known: Job, asked: dict[str, object]) -> Job:
    """The job that a key made before, if it was asked for the same thing."""
    if known.asked_recipe == asked:
        return known
    raise IdempotencyConflictError(
        f"This key has made the job “{known.name}”, whose recipe is another one.",
        next_step="Use a fresh key for a new job.",
        field="idempotency_key",
    )


@tried_again
def cancel_job(job: Job, user: User, mode: str = "now", *, token: ApiToken | None = None) -> bool:
    """Stop a job: "now" discards the run, "keep" ends with the adapter of the last step. Asking twice is harmless.

    Returns False when the job had ended already.

    Raises:
        RecipeError: there is no such mode, or the job waits and has something that "keep" would lose.
    """
    if mode not in {"now", "keep"}:
        raise RecipeError(
            f'There is no way to stop called "{mode}".', next_step='Choose "now" or "keep".', field="mode"
        )
    with transaction.atomic():
        asked = lifecycle.ask_stop(job, user, mode)
        if asked:
            record("job.stopped", team=job.team, user=user, token=token, target=job, mode=mode)
        failpoint("stop.before_commit")
    failpoint("stop.after_commit")
    return asked


def retry_job(job: Job, user: User, *, idempotency_key: str, token: ApiToken | None = None) -> Job:
    """Run a failed or cancelled job again as a new job with the same recipe; the old one stays as it is."""
    if job.state not in {JobState.FAILED, JobState.CANCELLED}:
        raise RecipeError(
            f"“{job.name}” is {job.get_state_display().lower()}: only failed and cancelled jobs are run again.",
            field="job",
        )
    return queue_job(
        team=job.team, user=user, recipe=Recipe.from_dict(job.recipe), asked_recipe=Recipe.from_dict(job.asked_recipe),
        base_model=job.base_model, dataset_version=job.dataset_version, idempotency_key=idempotency_key, parent=job,
        estimate=job.estimate, token=token,
    )  # fmt: skip

"""What people do with jobs: queue, pause, stop, put in order, run again. Called by pages, API and commands alike."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any
from uuid import UUID

from django.db import IntegrityError, transaction
from django.db.models.functions import Now

from jobs import lifecycle
from jobs.actions import KEEP, STOP_MODES, ActionError
from jobs.experience import expected_seconds
from jobs.mixes import check_mix, store_mix
from jobs.models import FINAL_STATES, Job, JobKind, JobState
from jobs.ranking import PRIORITIES, TEAM_PRIORITIES, moved_ranks, team_priority, top_rank
from jobs.retrying import tried_again
from jobs.scheduling import WAITING_STATES, look_at_queue
from jobs.waking import wake_workers
from studio.accounts.models import ApiToken, Membership, Role, Team, User, record
from studio.catalogue.models import Adapter, BaseModel, Suite
from studio.datasets.models import DatasetSplit, DatasetVersion, SplitState, VersionState
from studio.reviews.scan_limits import BlockedByScanError, refuse_blocked
from workers.errors import RecipeError
from workers.failpoints import failpoint
from workers.recipe import DatasetRef, Recipe

RUN_AGAIN = "Run again"
RUN_EXACTLY = "Run again exactly"


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
    dataset_version: DatasetVersion | None,
    idempotency_key: str,
    asked_recipe: Recipe | None = None,
    estimate: dict[str, object] | None = None,
    parent: Job | None = None,
    token: ApiToken | None = None,
    queued_as: str = "Queued",
    kind: JobKind = JobKind.TRAIN,
    scored_adapter: Adapter | None = None,
    suite: Suite | None = None,
    mixed: Sequence[DatasetVersion] = (),
) -> Job:
    """Add a job to the queue. The same key in the same team gives the job that the first call made.

    Args:
        recipe: with every "auto" resolved (workers.resolving.resolve).
        asked_recipe: as the person gave it; `recipe` when it is None.
        token: the API token that asked, for the audit log.
        parent: the job that this one repeats or began as a copy of.
        queued_as: how the job's first event begins: "Queued", "Run again", "Run again exactly".
        scored_adapter, suite: of a job that evaluates.
        dataset_version: None for an evaluation on standard tasks.
        mixed: the versions of the recipe's mix, in its order.

    Raises:
        RecipeError: the dataset is not ready or not the team's, or has no such split.
        BlockedByScanError: the team's policy does not let these rows be trained on as they are.
        IdempotencyConflictError: the key belongs to a job with another recipe.
    """
    if dataset_version is not None and dataset_version.dataset.team_id != team.pk:
        raise RecipeError("There is no such dataset.", field="dataset")
    if dataset_version is not None and dataset_version.state != VersionState.READY:
        raise RecipeError(
            f"{dataset_version} is not ready: {dataset_version.get_state_display().lower()}.",
            next_step="Open the dataset to see what is missing.",
            field="dataset",
        )
    if dataset_version is not None and (reason := dataset_version.why_not_trainable()):
        raise RecipeError(reason, next_step="Choose a dataset of conversations.", field="dataset")
    if dataset_version is not None:
        check_mix(dataset_version, mixed)
    asked = (asked_recipe or recipe).to_dict()
    known = Job.objects.filter(team=team, idempotency_key=idempotency_key).first()
    if known is not None:
        return _same_job(known, asked)
    # Not before: what was queued under an older policy is the answer to the same request still.
    if dataset_version is not None and kind == JobKind.TRAIN:
        refuse_blocked(dataset_version, team)
        for number, further in enumerate(mixed):
            _refuse_blocked_mix(further, team, field=f"mix.{number}")
    try:
        with transaction.atomic():
            _lock_versions([one for one in (dataset_version, *mixed) if one is not None])
            for number, (ref, version) in enumerate(zip(recipe.sources, (dataset_version, *mixed), strict=True)):
                _lock_split(ref, version, field="dataset.split" if number == 0 else f"mix.{number - 1}.split")
            job = Job.objects.create(
                team=team, created_by=user, name=recipe.name, recipe=recipe.to_dict(),
                asked_recipe=asked, base_model=base_model, kind=kind, scored_adapter=scored_adapter, suite=suite,
                dataset_version=dataset_version, num_mixed=len(mixed), idempotency_key=idempotency_key,
                not_before=Now(), parent=parent,
                needs={"gpus": 1, "memory_bytes": _starting_bytes(estimate or {})}, estimate=estimate or {},
                expected_seconds=expected_seconds(
                    team, estimate or {}, method=recipe.method, base_model=base_model.name
                ),
            )  # fmt: skip
            store_mix(job, recipe, mixed)
            by = user.display_name()
            copied = f", from “{parent.name}”" if parent is not None else ""
            lifecycle.add_event(job.pk, 0, f"{queued_as} by {by}{copied}.")
            record(
                "job.queued", team=team, user=user, token=token, target=job,
                **({"parent": str(parent.pk)} if parent is not None else {}),
            )  # fmt: skip
            if parent is not None and (locked := Job.objects.select_for_update().filter(pk=parent.pk).first()):
                what = {RUN_AGAIN: "ran it again", RUN_EXACTLY: "ran it again exactly"}.get(
                    queued_as, "made a copy of it"
                )
                lifecycle.add_event(locked.pk, locked.attempt, f"{by} {what}, as “{job.name}”.")
            transaction.on_commit(partial(failpoint, "submit.after_commit"))
            wake_workers()
            failpoint("submit.before_commit")
    except IntegrityError:
        # A second submit of the same form was committed between our look and our insert; or what the job needs
        # was deleted then.
        known = Job.objects.filter(team=team, idempotency_key=idempotency_key).first()
        if known is not None:
            return _same_job(known, asked)
        mix = ((f"mix.{number}", version) for number, version in enumerate(mixed))
        for field, needed in (("dataset", dataset_version), *mix, ("base_model", base_model)):
            if needed is not None and not type(needed).objects.filter(pk=needed.pk).exists():
                raise RecipeError(
                    f"{needed} was deleted at this moment, so the job was not queued.",
                    next_step="Choose another one.",
                    field=field,
                ) from None
        raise
    job.refresh_from_db()
    return job


def _starting_bytes(estimate: Mapping[str, Any]) -> int:
    """What must be free of a device's memory for the job to start there, by its stored estimate; 0: nobody knows."""
    enough = estimate.get("enough_bytes")
    return int(estimate.get("total_bytes", 0) if enough is None else enough)


def _refuse_blocked_mix(version: DatasetVersion, team: Team, *, field: str) -> None:
    """As `refuse_blocked` for a further dataset, whose name and field the error says."""
    try:
        refuse_blocked(version, team)
    except BlockedByScanError as error:
        raise BlockedByScanError(
            f"{version}: {error.message}", next_step=error.next_step, field=field, details=error.details
        ) from error


def _lock_versions(versions: Sequence[DatasetVersion]) -> None:
    """Keep versions as they are until the job is there; raises RecipeError for one that has changed meanwhile.

    A version whose columns are being chosen again is inspected anew, and its splits go with that.
    """
    locked = DatasetVersion.objects.select_for_update(no_key=True).filter(pk__in={one.pk for one in versions})
    states = dict(locked.order_by("pk").values_list("pk", "state"))
    # One that is gone is told of by the insert, which cannot refer to it.
    changed = next((one for one in versions if states.get(one.pk, VersionState.READY) != VersionState.READY), None)
    if changed is not None:
        raise RecipeError(
            f"{changed} is being changed just now.", next_step="Wait until it is inspected and try again.",
            field="dataset" if changed is versions[0] else "mix",
        )  # fmt: skip


def _lock_split(ref: DatasetRef, dataset_version: DatasetVersion | None, *, field: str) -> None:
    """Keep the split that a recipe names from being deleted before the job is there; raises RecipeError without one."""
    frozen = ref.split
    if frozen is None:
        return
    splits = DatasetSplit.objects.select_for_update(no_key=True).filter(version=dataset_version, state=SplitState.DONE)
    if dataset_version is None or splits.filter(sha256=frozen.sha256).only("pk").first() is None:
        raise RecipeError(
            f"{dataset_version} has no split “{frozen.name}”.", next_step="Choose another split.",
            field=field,
        )  # fmt: skip


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
def cancel_job(job: Job, user: User, mode: str = "now", *, seen: str = "", token: ApiToken | None = None) -> bool:
    """Stop a job: "now" discards the run, "keep" ends with the adapter of the last step. Asking twice is harmless.

    Args:
        seen: the state that the person saw; with it, nothing is done to a job that is in another one by now.

    Returns:
        Whether anything changed.

    Raises:
        RecipeError: there is no such mode.
        ActionError: not possible in the job's present state.
    """
    if mode not in STOP_MODES:
        raise RecipeError(
            f'There is no way to stop called "{mode}".', next_step='Choose "now" or "keep".', field="mode"
        )
    with transaction.atomic():
        asked = lifecycle.ask_stop(job, user, mode, seen=seen)
        if asked:
            record("job.stopped", team=job.team, user=user, token=token, target=job, mode=mode)
            if mode == KEEP:
                wake_workers()  # One that waits or is paused takes a device to finish.
        failpoint("stop.before_commit")
    failpoint("stop.after_commit")
    return asked


def pause_job(job: Job, user: User, *, seen: str = "", token: ApiToken | None = None) -> bool:
    """Pause a job, with a checkpoint if it runs. Args, result and errors as `cancel_job`."""
    with transaction.atomic():
        asked = lifecycle.ask_pause(job, user, seen=seen)
        if asked:
            record("job.paused", team=job.team, user=user, token=token, target=job)
    return asked


def resume_job(job: Job, user: User, *, seen: str = "", token: ApiToken | None = None) -> bool:
    """Queue a paused job again, or take a pause back. Args, result and errors as `cancel_job`."""
    with transaction.atomic():
        asked = lifecycle.ask_resume(job, user, seen=seen)
        if asked:
            record("job.resumed", team=job.team, user=user, token=token, target=job)
            wake_workers()
    return asked


def retry_job(job: Job, user: User, *, idempotency_key: str, token: ApiToken | None = None) -> Job:
    """Run a failed or cancelled job again as a new job with the same recipe; the old one stays as it is.

    Raises:
        ActionError: it has neither failed nor been cancelled.
    """
    if job.state not in {JobState.FAILED, JobState.CANCELLED}:
        raise ActionError(
            job, f"It is {job.get_state_display().lower()}: only failed and cancelled jobs are run again.",
            next_step="Duplicate it to run something like it beside it.",
        )  # fmt: skip
    return queue_job(
        team=job.team, user=user, recipe=Recipe.from_dict(job.recipe), asked_recipe=Recipe.from_dict(job.asked_recipe),
        base_model=job.base_model, dataset_version=job.dataset_version, idempotency_key=idempotency_key, parent=job,
        estimate=job.estimate, token=token, queued_as=RUN_AGAIN, kind=JobKind(job.kind),
        scored_adapter=job.scored_adapter, suite=job.suite, mixed=job.mixed_versions(),
    )  # fmt: skip


def may_order(job: Job, membership: Membership) -> bool:
    """Whether a member may say when a job's turn comes within its team: trainers of their own, leads of every job."""
    if job.team_id != membership.team_id or not membership.may(Role.TRAINER):
        return False
    return job.created_by_id == membership.user_id or membership.may(Role.LEAD)


MOVES = ("up", "down", "top")


def move_job(job: Job, user: User, where: str, *, token: ApiToken | None = None) -> bool:
    """Move a waiting job among its team's own waiting jobs of the same priority; never past another team's.

    Args:
        where: "up" or "down" by one place, or to the "top".

    Returns:
        False when it stands there already.

    Raises:
        RecipeError: there is no such move.
        ActionError: the job does not wait.
    """
    if where not in MOVES:
        raise RecipeError(f'A job cannot be moved "{where}".', next_step='Choose "up", "down" or "top".', field="to")
    with transaction.atomic():
        # One person at a time orders a team's jobs.
        Team.objects.select_for_update(no_key=True).get(pk=job.team_id)
        locked = Job.objects.select_for_update().get(pk=job.pk)
        if locked.state not in WAITING_STATES:
            raise ActionError(locked, f"It does not wait: it is {locked.get_state_display().lower()}.")
        peers = peers_of(locked)
        at = [one.pk for one in peers].index(locked.pk)
        if at == (len(peers) - 1 if where == "down" else 0):
            return False
        if where == "top":
            changed = {locked.pk: top_rank(peers)}
        else:
            changed = moved_ranks(peers, at, at + (1 if where == "down" else -1))
        _store_ranks(changed)
        passed = {"up": "one place up", "down": "one place down", "top": "to the top"}[where]
        lifecycle.add_event(
            job.pk, locked.attempt, f"{user.display_name()} moved it {passed} among the team's waiting jobs."
        )
        record("job.moved", team=job.team, user=user, token=token, target=job, to=where)
        wake_workers()
    return True


def peers_of(job: Job) -> list[Job]:
    """The waiting jobs of a job's team that it can be moved among, in their order: those of the same priority."""
    waiting = Job.objects.filter(team_id=job.team_id, state__in=WAITING_STATES, priority=job.priority)
    places = look_at_queue([job]).places
    rows = sorted(waiting.only("pk", "team_rank"), key=lambda one: places.get(str(one.pk), len(places) + 1))
    return [one for one in rows if team_priority(one) == team_priority(job)]


def _store_ranks(ranks: dict[UUID, int]) -> None:
    Job.objects.bulk_update([Job(pk=pk, team_rank=rank) for pk, rank in ranks.items()], ["team_rank"], batch_size=500)


def set_team_priority(job: Job, user: User, priority: str, *, token: ApiToken | None = None) -> bool:
    """Make a job low, normal or high among its team's own jobs. It changes nothing for any other team.

    Returns:
        False when it is so already.

    Raises:
        RecipeError: there is no such priority.
        ActionError: the job has ended.
    """
    if priority not in TEAM_PRIORITIES:
        raise _no_such_priority(priority)
    with transaction.atomic():
        locked = _lock_to_order(job)
        if team_priority(locked) == priority:
            return False
        Job.objects.filter(pk=job.pk).update(team_rank=TEAM_PRIORITIES[priority])
        lifecycle.add_event(
            job.pk, locked.attempt, f"{user.display_name()} gave it {priority} priority among the team's jobs."
        )
        record("job.prioritised", team=job.team, user=user, token=token, target=job, priority=priority, within="team")
        wake_workers()
    return True


def set_studio_priority(job: Job, user: User, priority: str, *, token: ApiToken | None = None) -> bool:
    """Make a job low, normal or high among the jobs of all teams; for admins. Result and errors as
    `set_team_priority`."""
    if priority not in PRIORITIES:
        raise _no_such_priority(priority)
    with transaction.atomic():
        locked = _lock_to_order(job)
        if locked.priority == PRIORITIES[priority]:
            return False
        Job.objects.filter(pk=job.pk).update(priority=PRIORITIES[priority])
        lifecycle.add_event(
            job.pk, locked.attempt, f"{user.display_name()} gave it {priority} priority in the whole studio."
        )
        record("job.prioritised", team=job.team, user=user, token=token, target=job, priority=priority, within="studio")
        wake_workers()
    return True


def _lock_to_order(job: Job) -> Job:
    locked = Job.objects.select_for_update().get(pk=job.pk)
    if locked.state in FINAL_STATES:
        raise ActionError(locked, f"It has ended: {locked.get_state_display().lower()}.")
    return locked


def _no_such_priority(priority: str) -> RecipeError:
    return RecipeError(
        f'There is no priority called "{priority}".', next_step='Choose "low", "normal" or "high".', field="priority"
    )

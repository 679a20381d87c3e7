"""Jobs that the quick trainer runs in a second or less."""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from datetime import timedelta

from django.conf import settings
from django.db.models.functions import Now

from jobs.models import LEASED_STATES, Job, JobState
from jobs.queueing import queue_job
from studio import storage
from studio.accounts.models import Team, User
from studio.catalogue.models import BaseModel
from tests.faults.quick_trainer import WEIGHTS
from tests.jobs.making import make_ready_version, make_recipe
from tests.processes import wait_for

# The environment of a worker whose job does not end before it is meant to, and of one that has only to finish it.
SLOW, FAST = ({"QUICK_TRAINER_STEP_SECONDS": seconds} for seconds in ("0.3", "0.01"))


def queue_quickly(
    team: Team, user: User, *, name: str = "quick", max_steps: int = 6, every: int = 2, key: str | None = None
) -> Job:
    """A job for the quick trainer: so many steps, and a checkpoint after each `every` of them."""
    base_model, _ = BaseModel.objects.get_or_create(name="tiny", defaults={"folder": "/nowhere", "revision": "1" * 64})
    return queue_job(
        team=team, user=user, recipe=make_recipe(name, max_steps=max_steps, checkpoint_every_steps=every),
        base_model=base_model, dataset_version=make_ready_version(team, user), idempotency_key=key or uuid.uuid4().hex,
    )  # fmt: skip


def expected_weights(job: Job, *, num_steps: int | None = None) -> str:
    """The digest of the weights that the quick trainer makes of an undisturbed run, computed without it."""
    state = hashlib.sha256(json.dumps(job.recipe, sort_keys=True).encode()).hexdigest()
    for step in range(1, (num_steps or job.recipe["training"]["max_steps"]) + 1):
        state = hashlib.sha256(f"{state} {step}".encode()).hexdigest()
    return state


def weights(job: Job) -> str:
    """What the job's adapter was made of."""
    assert job.adapter is not None, f"{job} is {job.state}: {job.failure_message}"
    return (storage.adapter_folder(job.adapter.folder) / WEIGHTS).read_bytes()[-32:].hex()


def reload(job: Job) -> Job:
    return Job.objects.select_related("adapter").get(pk=job.pk)


def wait_until_final(job: Job, *, seconds: float = 180) -> Job:
    """The job in its final state; its waits for a retry are cut short."""

    def is_final() -> bool:
        Job.objects.filter(state=JobState.RETRY_WAIT, pk=job.pk).update(not_before=Now())
        return reload(job).is_final()

    try:
        wait_for(is_final, seconds=seconds, what=f"the end of {job.name}")
    except AssertionError as error:
        raise AssertionError(f"{error}: {describe(job)}") from error
    return reload(job)


def wait_for_step(job: Job, step: int) -> None:
    wait_for(lambda: job.points.filter(step__gte=step).exists(), what=f"step {step} of {job.name}")


def expire_leases() -> int:
    """The leases of workers that are known to be dead run out now, and what waits for a retry waits no longer."""
    # The database still does what a worker had sent when it was killed, a renewal of its lease perhaps.
    time.sleep(0.3)
    num = Job.objects.filter(state__in=LEASED_STATES).update(lease_until=Now() - timedelta(seconds=1))
    Job.objects.filter(state=JobState.RETRY_WAIT).update(not_before=Now())
    return num


def describe(job: Job) -> str:
    """Everything that happened to a job, for the message of a failed assertion."""
    events = "\n".join(f"  {event.attempt}: {event.text}" for event in job.events.all())
    attempts = list(job.attempts.order_by("number").values_list("number", "outcome", "failure_code", "last_step"))
    return f"{job.name} is {reload(job).state} in {settings.DATA_DIR}\n{events}\n  {attempts}"

"""Rows for tests of the queue: a waiting job without any file behind it."""

from __future__ import annotations

import uuid

from jobs.lifecycle import claim
from jobs.models import Job, Worker
from jobs.queueing import queue_job
from studio.accounts.models import Team, User
from studio.catalogue.models import BaseModel
from studio.datasets.models import Dataset, DatasetVersion, VersionState
from workers.recipe import Recipe


def make_recipe(name: str = "support", **training: object) -> Recipe:
    return Recipe.from_dict(
        {
            "name": name,
            "base_model": {"name": "tiny"},
            "dataset": {"name": "faq", "format": "alpaca"},
            "precision": "float32",
            "training": training,
        }
    )


def make_ready_version(team: Team, user: User) -> DatasetVersion:
    dataset, _ = Dataset.objects.get_or_create(team=team, name="faq", defaults={"created_by": user})
    version, _ = DatasetVersion.objects.get_or_create(
        dataset=dataset, number=1,
        defaults={
            "state": VersionState.READY, "file_name": "faq.json", "sha256": "0" * 64, "num_bytes": 1,
            "format": "alpaca", "num_rows": 20, "num_usable": 20, "created_by": user,
        },
    )  # fmt: skip
    return version


def make_job(team: Team, user: User, *, name: str = "support") -> Job:
    base_model, _ = BaseModel.objects.get_or_create(name="tiny", defaults={"folder": "/nowhere", "revision": "1" * 64})
    return queue_job(
        team=team, user=user, recipe=make_recipe(name), base_model=base_model,
        dataset_version=make_ready_version(team, user), idempotency_key=uuid.uuid4().hex,
    )  # fmt: skip


def make_worker(slot: int = 0) -> Worker:
    from django.db.models.functions import Now

    return Worker.objects.create(
        host="test-host",
        slot=slot,
        process_id=1,
        device="CPU, 2 cores",
        device_kind="cpu",
        version="0",
        last_seen=Now(),
    )


def make_running_job(team: Team, user: User, *, name: str = "support") -> Job:
    claimed = claim(make_job(team, user, name=name), make_worker())
    assert claimed is not None
    return claimed

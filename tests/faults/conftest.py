"""A team with a registered tiny base model and an inspected dataset, for jobs that really train."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.models import Job
from jobs.queueing import queue_job
from studio.accounts.models import Team, User
from studio.catalogue.models import BaseModel
from studio.datasets.inspecting import inspect
from studio.datasets.models import DatasetVersion, VersionState
from studio.datasets.uploads import receive_upload
from tests.faults.quick import queue_quickly
from tests.faults.slot_workers import SlotWorkers
from tests.processes import test_environment, wait_for
from tests.tiny import tiny_rows
from workers.recipe import Recipe


@pytest.fixture
def version(transactional_db: None, team: Team, bob: User) -> DatasetVersion:
    content = "".join(json.dumps(row) + "\n" for row in tiny_rows(120)).encode()
    version = receive_upload(team=team, user=bob, file_name="tiny.jsonl", chunks=[content])
    inspect(version.pk)

    def is_ready() -> bool:
        version.refresh_from_db()
        return version.state == VersionState.READY

    # Where a site runs beside the test, its worker may inspect it first.
    wait_for(is_ready, what="the inspection")
    return version


@pytest.fixture
def queue(team: Team, bob: User, base_model: BaseModel, version: DatasetVersion) -> Callable[..., Job]:
    def queue(name: str = "tiny-lora", *, max_steps: int = 40, method: str = "lora", **training: object) -> Job:
        recipe = Recipe.from_dict(
            {
                "name": name,
                "base_model": {"name": base_model.name, "revision": base_model.revision},
                "dataset": {
                    "name": str(version), "sha256": version.sha256, "format": version.format, "columns": version.columns
                },
                "method": method,
                "settings": {"rank": 4} if method != "prefix_tuning" else {"num_virtual_tokens": 4},
                "precision": "float32",
                "training": {
                    "max_steps": max_steps, "batch_size": 4, "micro_batch_size": 2, "max_length": 128, "epochs": 10,
                    "learning_rate": 1e-3, "checkpoint_every_steps": 5, "packing": False,
                    "gradient_checkpointing": False, **training,
                },
                "evaluation": {"num_generated": 2, "max_new_tokens": 8, "general": False},
            }
        )  # fmt: skip
        return queue_job(
            team=team, user=bob, recipe=recipe, base_model=base_model, dataset_version=version,
            idempotency_key=uuid.uuid4().hex,
        )  # fmt: skip

    return queue


@pytest.fixture
def workers(transactional_db: None, tmp_path: Path) -> Iterator[SlotWorkers]:
    """Processes of the queue, see slot_workers.py; all are gone after the test."""
    started = SlotWorkers(tmp_path, test_environment())
    yield started
    started.stop()


@pytest.fixture
def quick(team: Team, bob: User, transactional_db: None) -> Callable[..., Job]:
    """Queue a job for the quick trainer: quick(name, max_steps=6, every=2)."""

    def queue(name: str = "quick", **options: Any) -> Job:
        return queue_quickly(team, bob, name=name, **options)

    return queue

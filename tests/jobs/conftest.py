"""Rows that the job pages need, and a Redis to be hurt."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from django.utils import timezone

from jobs import progress, series
from jobs.models import Job
from studio.accounts.models import Team, User
from studio.catalogue.models import BaseModel
from studio.datasets.models import DatasetVersion
from studio.embedded import EmbeddedServers
from tests.factories import make_base_model, make_dataset_version, make_recipe

MakeJob = Callable[..., Job]


@pytest.fixture
def base_model(data_dir: Path, team: Team) -> BaseModel:
    return make_base_model()


@pytest.fixture
def version(data_dir: Path, team: Team, alice: User) -> DatasetVersion:
    return make_dataset_version(team, alice, num_rows=60)


@pytest.fixture
def make_job(base_model: BaseModel, version: DatasetVersion, team: Team, alice: User) -> MakeJob:
    """A job of the team, queued unless `changes` say otherwise."""

    def make(name: str = "support", **changes: Any) -> Job:
        recipe = make_recipe(base_model, version, name=name).to_dict()
        values: dict[str, Any] = {
            "team": team, "created_by": alice, "name": name, "recipe": recipe, "asked_recipe": recipe,
            "base_model": base_model, "dataset_version": version, "not_before": timezone.now(),
            "idempotency_key": str(uuid4()),
        }  # fmt: skip
        return Job.objects.create(**(values | changes))

    return make


@pytest.fixture
def own_redis(tmp_path: Path, settings: Any) -> Iterator[EmbeddedServers]:
    """A Redis that only this test uses, and may stop and kill."""
    servers = EmbeddedServers(tmp_path / "own")
    settings.REDIS_URL = servers.start(postgres=False).redis
    _forget_clients()
    yield servers
    servers.stop()
    _forget_clients()


def _forget_clients() -> None:
    progress._client.cache_clear()
    series.stream_client.cache_clear()

"""From queueing a job to its claim by an idle worker: servers, worker and jobs are real, and only the bench's own."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from statistics import median, quantiles
from typing import Any


def measure(*, num_jobs: int, num_workers: int, with_messages: bool) -> None:
    """Prints how the seconds between queueing and claim are distributed, for jobs queued one after another's end."""
    with tempfile.TemporaryDirectory(prefix="peft-studio-start-") as temporary, _servers(Path(temporary)):
        import django

        django.setup()
        from django.core.management import call_command

        call_command("migrate", verbosity=0)
        seconds = _measure(Path(temporary), num_jobs, num_workers, with_messages)
    names = "with messages" if with_messages else "every message lost"
    ordered = sorted(seconds)
    print(f"\n{len(ordered)} jobs queued on {num_workers} idle worker(s), {names}: seconds from queued to claimed")
    high = quantiles(ordered, n=20, method="inclusive")[-1]
    print(f"median {median(ordered):.3f}, 95th percentile {high:.3f}, worst {ordered[-1]:.3f}")


@contextlib.contextmanager
def _servers(folder: Path) -> Iterator[None]:
    from studio.embedded import EmbeddedServers

    os.environ["STUDIO_DATA_DIR"] = str(folder)
    os.environ.setdefault("STUDIO_SECRET_KEY", "bench-only-" + "0" * 50)
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "studio.settings")
    servers = EmbeddedServers(folder)
    urls = servers.start()
    os.environ["DATABASE_URL"], os.environ["REDIS_URL"] = urls.database, urls.redis
    try:
        yield
    finally:
        servers.stop()


def _measure(folder: Path, num_jobs: int, num_workers: int, with_messages: bool) -> list[float]:
    from django.db import connection

    from jobs import queueing
    from jobs.models import Job, Worker
    from tests.processes import celery_worker, wait_for

    queue = _queue(folder)
    if not with_messages:
        queueing.wake_workers = lambda: None
    found = []
    with contextlib.ExitStack() as stack:
        for slot in range(num_workers):
            stack.enter_context(celery_worker("gpu", folder / f"worker-{slot}.log", slot=slot))
        wait_for(lambda: Worker.objects.count() == num_workers, what="the start of the workers")
        for number in range(num_jobs):
            job = queue(f"job {number}")
            wait_for(lambda job=job: Job.objects.get(pk=job.pk).is_final(), seconds=300, what="the end of a job")
            job.refresh_from_db()
            found.append((job.started_at - job.created_at).total_seconds())
            print(f"{found[-1]:.3f}", end=" ", flush=True)
            # The worker has looked at the queue once more and sleeps; without messages, at a random place of its pause.
            time.sleep(1.0 if with_messages else 1.0 + (number * 0.37) % 1 * 10)
    connection.close()
    return found


def _queue(folder: Path) -> Any:
    """What queues a job of one step."""
    from jobs.queueing import queue_job
    from studio.accounts.models import Membership, Role, Team, User
    from studio.catalogue.importing import register_base_model
    from studio.datasets.inspecting import inspect
    from studio.datasets.uploads import receive_upload
    from tests.tiny import make_tiny_base, tiny_rows
    from workers.recipe import Recipe

    team = Team.objects.create(name="Bench", slug="bench")
    user = User.objects.create_user(username="bench", password=uuid.uuid4().hex)
    Membership.objects.create(user=user, team=team, role=Role.ADMIN)
    base = register_base_model(folder=make_tiny_base(folder / "tiny"), name="tiny", hub_id="", licence="")
    content = "".join(json.dumps(row) + "\n" for row in tiny_rows(40)).encode()
    version = receive_upload(team=team, user=user, file_name="tiny.jsonl", chunks=[content])
    inspect(version.pk)
    version.refresh_from_db()

    def queue(name: str) -> Any:
        recipe = Recipe.from_dict(
            {
                "name": name,
                "base_model": {"name": base.name, "revision": base.revision},
                "dataset": {
                    "name": str(version), "sha256": version.sha256, "format": version.format,
                    "columns": version.columns,
                },
                "method": "lora",
                "precision": "float32",
                "training": {
                    "max_steps": 1, "batch_size": 4, "micro_batch_size": 4, "max_length": 128, "learning_rate": 1e-3,
                    "packing": False, "gradient_checkpointing": False,
                },
                "evaluation": {"num_generated": 0},
            }
        )  # fmt: skip
        return queue_job(
            team=team, user=user, recipe=recipe, base_model=base, dataset_version=version,
            idempotency_key=uuid.uuid4().hex,
        )  # fmt: skip

    return queue


if __name__ == "__main__":
    sys.exit("Run it as: python -m tests.bench.start submits")

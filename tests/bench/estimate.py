"""How fast the New job form estimates: `python -m tests.bench.estimate`.

Prints the median and the 95th percentile in milliseconds of the estimate as a pure function (a recipe resolved and
estimated, and what would make it fit), and of the server's time for a POST of the form's panel, in a studio of its own
with many finished jobs to learn from. The target is below 50 ms at the 95th percentile, without torch.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

from tests.bench.catalogue import fill, plain_files
from tests.bench.studio import bench_studio
from tests.workers.test_resolving import SEVEN_B
from workers.facts import DatasetFacts, DeviceFacts
from workers.fitting import suggestions
from workers.measured_memory import MeasuredMemory
from workers.memory import GIB, estimate
from workers.recipe import Recipe
from workers.resolving import resolve

ROWS = DatasetFacts(
    num_rows=10_000, total_tokens=5_000_000, longest=2048, lengths={2**power: 1250 for power in range(4, 12)}
)
CARD = DeviceFacts("cuda", "NVIDIA L4", 24 * GIB, 8)
NUM_MEASURED = 1_000
"""Succeeded jobs with an estimate and a measured peak; the newest 300 are learned from."""


def pure(repeats: int, measured: MeasuredMemory | None) -> None:
    """The function alone, of a run that fits and of one that does not."""
    for label, memory in (("fits", 80), ("too large, with what would fit", 8)):
        card = replace(CARD, memory_bytes=memory * GIB, measured=measured)

        def ask(card: DeviceFacts = card) -> None:
            asked = Recipe.from_dict(
                {"name": "x", "base_model": {"name": "seven"}, "dataset": {"name": "d", "format": "alpaca"}}
            )
            found = estimate(resolve(asked, SEVEN_B, ROWS, card), SEVEN_B, ROWS, card)
            if found.verdict != "fits":
                suggestions(asked, SEVEN_B, ROWS, card)

        print_times(f"function, {label}", ask, repeats)


def print_times(name: str, ask: Callable[[], Any], repeats: int) -> None:
    """One line: median and 95th percentile of the wall clock, and the median of this process's own CPU time, which
    other work on the machine does not lengthen."""
    ask()
    times, own = [], []
    for _ in range(repeats):
        start, began = time.perf_counter(), time.process_time()
        ask()
        times.append(1000 * (time.perf_counter() - start))
        own.append(1000 * (time.process_time() - began))
    high = sorted(times)[math.ceil(0.95 * repeats) - 1]
    print(f"{name:<40}{median(times):>8.1f}{high:>8.1f}{median(own):>8.1f}", flush=True)


def add_measurements(user: Any) -> None:
    """Estimates, attempts and peaks of the newest succeeded jobs, as they would be there."""
    from django.utils import timezone

    from jobs.estimating import estimate_values, plan_for
    from jobs.models import Job, JobAttempt, JobState, Worker

    now = timezone.now()
    worker = Worker.objects.create(
        host="bench", slot=0, process_id=1, device="NVIDIA L4", device_kind="cuda", memory_bytes=24 * GIB,
        free_memory_bytes=24 * GIB, version="1", last_seen=now + timedelta(hours=1),
    )  # fmt: skip
    jobs = list(Job.objects.filter(state=JobState.SUCCEEDED).order_by("-finished_at")[:NUM_MEASURED])
    plan = plan_for(Recipe.from_dict(jobs[0].asked_recipe), jobs[0].base_model, jobs[0].dataset_version)  # type: ignore[arg-type]
    for number, job in enumerate(jobs):
        job.estimate, job.attempt, job.recipe = estimate_values(plan), 1, plan.recipe.to_dict()
        job.finished_at = now - timedelta(minutes=number)
    Job.objects.bulk_update(jobs, ["estimate", "attempt", "recipe", "finished_at"], batch_size=500)
    JobAttempt.objects.bulk_create(
        JobAttempt(
            job=job, number=1, worker=worker, started_at=job.finished_at - timedelta(minutes=5 + number % 7),
            ended_at=job.finished_at, outcome="succeeded", peak_memory_bytes=round((1 + number % 5 / 20) * GIB),
        )
        for number, job in enumerate(jobs)
    )  # fmt: skip


def panel(folder: Path, num_jobs: int, repeats: int) -> None:
    """The server's time for the panel."""
    from django.test import Client
    from django.urls import reverse

    from jobs import experience
    from jobs.models import TeamQuota, Worker
    from studio.accounts.models import Team
    from studio.catalogue.models import BaseModel
    from studio.datasets.models import DatasetVersion

    with plain_files(folder):
        user = fill(num_jobs // 5, num_jobs)
        add_measurements(user)
        base = BaseModel.objects.order_by("pk")[0]
        BaseModel.objects.filter(pk=base.pk).update(shape=SEVEN_B.model_dump(mode="json"))
        team = Team.objects.get()
        TeamQuota.objects.create(team=team, price_per_gpu_hour="2.5", currency="EUR")
        client = Client()
        client.force_login(user)
        url = reverse("jobs:estimate")
        data = {
            "base_model": base.pk, "dataset_version": DatasetVersion.objects.all()[0].pk, "method": "lora",
            "shown_method": "lora", "goal": "balanced", "name": "bench", "evaluation.metrics": ["loss", "token_f1"],
        }  # fmt: skip

        def post() -> Any:
            answer = client.post(url, data)
            assert answer.status_code == 200, answer.status_code
            return answer

        def post_after_an_end() -> Any:
            experience.forget()
            return post()

        print_times("panel, fits", post, repeats)
        print_times("panel, a job has just ended", post_after_an_end, repeats)
        Worker.objects.update(memory_bytes=8 * GIB, free_memory_bytes=8 * GIB)
        print_times("panel, too large", post, repeats)


def main() -> None:
    """Print the table."""
    arguments = argparse.ArgumentParser(prog="python -m tests.bench.estimate", description=__doc__.split("\n\n")[0])
    arguments.add_argument("--jobs", type=int, default=50_000, help="jobs in the studio, a fifth of them succeeded")
    arguments.add_argument("--repeats", type=int, default=100)
    asked = arguments.parse_args()
    print(f"{'estimate':<40}{'p50 ms':>8}{'p95 ms':>8}{'CPU ms':>8}")
    pure(asked.repeats, None)
    with bench_studio() as folder:
        panel(folder, asked.jobs, asked.repeats)
    heavy = sorted({"torch", "transformers", "peft"} & set(sys.modules))
    print(f"imported by all of this: {', '.join(heavy) or 'neither torch nor transformers nor peft'}")


if __name__ == "__main__":
    main()

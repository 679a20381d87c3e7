"""How long a claim and a look at the queue take with many waiting jobs: `python -m tests.bench.claims`.

Real Postgres, 30 teams of 5 people, each claim through scheduling.next_job as a worker makes it, the attempt ended
again by lifecycle so that limits, usage and running jobs are all there. Prints milliseconds.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import psutil

from tests.bench.studio import bench_studio

NUM_TEAMS, PEOPLE_PER_TEAM, NUM_DEVICES = 30, 5, 8
GIBIBYTE = 1024**3


def fill_queue(num_jobs: int, seed: int = 0) -> None:
    """Replace whatever waits by so many jobs of many teams, with shares, limits and past usage."""
    from django.db import connection
    from django.utils import timezone

    from jobs.models import Job, TeamQuota, Usage
    from studio.accounts.models import Membership, Role, Team, User
    from studio.catalogue.models import BaseModel
    from tests.jobs.making import make_ready_version, make_recipe

    chance = random.Random(seed)
    Job.objects.all().delete()
    base, _ = BaseModel.objects.get_or_create(name="tiny", defaults={"folder": "/nowhere", "revision": "1" * 64})
    people = []
    for number in range(NUM_TEAMS):
        team, _ = Team.objects.get_or_create(slug=f"team-{number}", defaults={"name": f"Team {number}"})
        limit = 3 if number % 3 == 0 else None
        hours = 500.0 if number % 4 == 0 else None
        TeamQuota.objects.update_or_create(
            team=team, defaults={"share": 1 + number % 3, "max_running_jobs": limit, "max_gpu_hours": hours}
        )
        for index in range(PEOPLE_PER_TEAM):
            user, _ = User.objects.get_or_create(username=f"person-{number}-{index}")
            Membership.objects.get_or_create(user=user, team=team, defaults={"role": Role.TRAINER})
            Usage.objects.update_or_create(
                team=team, user=user, defaults={"device_seconds": chance.uniform(0, 1e5), "decayed_at": timezone.now()}
            )
            people.append((team, user))
    versions = {team.pk: make_ready_version(team, user) for team, user in people}
    recipe = make_recipe("support").to_dict()
    jobs = []
    for _ in range(num_jobs):
        team, user = chance.choice(people)
        jobs.append(
            Job(
                team=team, created_by=user, name="support", recipe=recipe, asked_recipe=recipe, base_model=base,
                dataset_version=versions[team.pk], not_before=timezone.now(), idempotency_key=uuid.uuid4().hex,
                needs={"gpus": 1, "memory_bytes": chance.choice([8, 20, 60, 100]) * GIBIBYTE},
                expected_seconds=chance.uniform(60, 7200), priority=chance.choice([0, 0, 0, 1]),
            )
        )  # fmt: skip
    Job.objects.bulk_create(jobs, batch_size=1000)
    with connection.cursor() as cursor:
        cursor.execute("ANALYZE jobs_job")


def measure(num_jobs: int, rounds: int) -> dict[str, tuple[list[float], float]]:
    """Milliseconds of each claim, position and reason, and the mean CPU time of one (coarse: ticks of 10 ms)."""
    from jobs import lifecycle, scheduling
    from jobs.models import Job, Worker
    from tests.jobs.making import make_worker

    fill_queue(num_jobs)
    workers = [make_worker(slot) for slot in range(NUM_DEVICES)]
    Worker.objects.update(memory_bytes=80 * GIBIBYTE, free_memory_bytes=70 * GIBIBYTE)
    claims, running, spent_on_claims = [], [], 0.0
    for round_number in range(min(rounds, num_jobs // 2)):
        worker = workers[round_number % NUM_DEVICES]
        if len(running) == NUM_DEVICES:
            ended = running.pop(0)
            lifecycle.fail(ended.pk, ended.attempt, code="bench", message="Over.", next_step="")
        before = cpu_milliseconds()
        spent, job = timed(lambda worker=worker: scheduling.next_job(worker))
        spent_on_claims += cpu_milliseconds() - before
        assert job is not None
        running.append(job)
        claims.append(spent)
    waiting = list(Job.objects.filter(state="queued")[: min(rounds, 50)])
    began = cpu_milliseconds()
    places = [timed(lambda job=job: scheduling.queue_position(job))[0] for job in waiting]
    middle = cpu_milliseconds()
    sentences = [timed(lambda job=job: scheduling.explain_wait(job))[0] for job in waiting]
    ended = cpu_milliseconds()
    for job in running:
        lifecycle.fail(job.pk, job.attempt, code="bench", message="Over.", next_step="")
    Worker.objects.all().delete()
    return {
        "claim": (claims, spent_on_claims / len(claims)),
        "position": (places, (middle - began) / len(places)),
        "reason": (sentences, (ended - middle) / len(sentences)),
    }


def cpu_milliseconds() -> float:
    """CPU time of this process and of the Postgres process that serves it, so far."""
    from django.db import connection

    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        times = [psutil.Process(process_id).cpu_times() for process_id in (os.getpid(), cursor.fetchone()[0])]
    return 1000 * sum(one.user + one.system for one in times)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Milliseconds and the answer."""
    began = time.perf_counter()
    answer = work()
    return 1000 * (time.perf_counter() - began), answer


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which that share of the values lies."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]


def main() -> None:
    """Print the table."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--sizes", type=int, nargs="+", default=[100, 1_000, 10_000])
    arguments.add_argument("--rounds", type=int, default=200)
    asked = arguments.parse_args()
    with bench_studio():
        print(f"{'waiting':>8} {'what':>9} {'median':>8} {'95 %':>8} {'largest':>8} {'CPU':>8}   (ms)")
        for size in asked.sizes:
            for what, (values, cpu) in measure(size, asked.rounds).items():
                row = (statistics.median(values), percentile(values, 0.95), max(values), cpu)
                print(f"{size:>8} {what:>9} " + " ".join(f"{value:>8.1f}" for value in row) + f"   n = {len(values)}")


if __name__ == "__main__":
    main()

"""How well durations are learned: `python -m tests.bench.durations`.

Finished jobs that follow a known law, with noise, in a real database: the median error on 40 that nobody had seen,
against the number of finished jobs of the team. For a studio's own jobs see `manage.py durations`.
"""

from __future__ import annotations

import math
import random
import statistics
import uuid
from datetime import datetime, timedelta
from typing import Any

from tests.bench.studio import bench_studio

NOISE = 0.1
"""Standard deviation of the logarithm of what the law does not explain."""
METHODS = {"lora": 1.0, "qlora": 1.9, "prefix": 0.7}
BASES = {"tiny": 1.0, "small": 1.4}
DEVICES = {"CPU, 2 cores": 4.0, "NVIDIA H100 80GB": 0.4}


def true_seconds(estimated: float, num_tokens: float, method: str, base: str, device: str) -> float:
    """The law: start-up, a device's speed, a method's and a base's weight, long inputs slower than linear."""
    return 20 + DEVICES[device] * METHODS[method] * BASES[base] * estimated * (num_tokens / 1e5) ** 0.15


def make_finished_jobs(team: Any, user: Any, number: int, *, seed: int, ended: datetime, slowness: float = 1.0) -> None:
    """So many succeeded jobs of a team, one a minute before `ended`."""
    from jobs.models import Job, JobAttempt, JobState, Worker
    from studio.catalogue.models import Adapter, BaseModel
    from tests.jobs.making import make_ready_version, make_recipe, make_worker

    chance = random.Random(seed)
    version = make_ready_version(team, user)
    workers = {}
    for slot, device in enumerate(DEVICES):
        workers[device] = Worker.objects.filter(device=device).first() or make_worker(slot)
        Worker.objects.filter(pk=workers[device].pk).update(device=device)
    bases = {
        name: BaseModel.objects.get_or_create(name=name, defaults={"folder": "/nowhere", "revision": name})[0]
        for name in BASES
    }
    for index in range(number):
        method, base, device = chance.choice(list(METHODS)), chance.choice(list(BASES)), chance.choice(list(DEVICES))
        num_tokens = math.exp(chance.uniform(math.log(1e4), math.log(1e7)))
        estimated = num_tokens / 400
        seconds = (
            slowness * true_seconds(estimated, num_tokens, method, base, device) * math.exp(chance.gauss(0, NOISE))
        )
        end = ended - timedelta(minutes=number - index)
        recipe = make_recipe("finished").to_dict() | {"method": method}
        adapter = Adapter.objects.create(
            team=team, name="finished", version=Adapter.objects.filter(team=team).count() + 1, base_model=bases[base],
            dataset_version=version, method=method, recipe=recipe, folder="nowhere", created_by=user,
        )  # fmt: skip
        estimate = {
            "seconds_low": 0.5 * estimated, "seconds_high": 1.5 * estimated, "num_tokens": round(num_tokens),
            "device": device,
        }  # fmt: skip
        job = Job.objects.create(
            team=team, created_by=user, name="finished", recipe=recipe, asked_recipe=recipe, estimate=estimate,
            base_model=bases[base], dataset_version=version, adapter=adapter, state=JobState.SUCCEEDED,
            idempotency_key=uuid.uuid4().hex, not_before=end, finished_at=end, attempt=1,
        )  # fmt: skip
        JobAttempt.objects.create(
            job=job, number=1, worker=workers[device], started_at=end - timedelta(seconds=seconds), ended_at=end,
            outcome="succeeded",
        )  # fmt: skip


def median_errors(team: Any, num_held_out: int) -> tuple[float, float]:
    """Median |expected / actual - 1| on the team's newest jobs: by the estimate, and learned from all before."""
    from jobs.durations import learn
    from jobs.finished import finished_jobs
    from jobs.models import Job

    finished = finished_jobs(Job.objects.all())
    own = [job for job in finished if job.team_id == team.pk]
    held_out, known = own[:num_held_out], own[num_held_out:]
    unseen = {id(job) for job in held_out}
    prediction = learn(known, [job for job in finished if id(job) not in unseen])
    by_estimate = [abs(job.features.estimated_seconds / job.seconds - 1) for job in held_out]
    learned = [abs(prediction.expected(job.features) / job.seconds - 1) for job in held_out]
    return statistics.median(by_estimate), statistics.median(learned)


def main() -> None:
    """Print the table."""
    with bench_studio():
        from django.core.management import call_command
        from django.utils import timezone

        from jobs.models import Job
        from studio.accounts.models import Team, User

        other = Team.objects.create(name="Other", slug="other")
        stranger = User.objects.create_user(username="stranger")
        print("median |expected / actual - 1| on 40 unseen jobs of a team")
        print(f"{'of the team':>12} {'of others':>10} {'estimate':>9} {'learned':>8}")
        for num_others, num_own in ((0, 0), (60, 0), (60, 5), (60, 20), (60, 60), (60, 180)):
            Job.objects.all().delete()
            team = Team.objects.create(name=f"Team {num_own}", slug=f"team-{num_others}-{num_own}")
            user = User.objects.create_user(username=f"user-{num_others}-{num_own}")
            now = timezone.now()
            make_finished_jobs(other, stranger, num_others, seed=1, ended=now - timedelta(days=1), slowness=1.2)
            make_finished_jobs(team, user, num_own + 40, seed=2, ended=now)
            by_estimate, learned = median_errors(team, 40)
            print(f"{num_own:>12} {num_others:>10} {100 * by_estimate:>8.0f}% {100 * learned:>7.0f}%")
        call_command("durations")


if __name__ == "__main__":
    main()

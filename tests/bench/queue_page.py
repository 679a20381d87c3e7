"""A studio whose queue has 50 waiting jobs of three teams, to look at: `python -m tests.bench.queue_page`.

Starts real servers and the web process, fills the queue through the product's own functions, prints a login link for
a person of each team and serves until Ctrl-C. No worker runs: what is shown as running stands still.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
from datetime import timedelta

from tests.bench.studio import bench_studio

GIBIBYTE = 1024**3
TEAMS = {"Support": ("mara", "tom", "ada"), "Legal": ("kim", "lou"), "Research": ("noor", "ben", "eve")}
NAMES = ("faq-r16", "contracts", "tone", "summaries", "tickets-qlora", "extract", "chat-dora", "style", "triage")


def fill(seed: int = 4) -> dict[str, str]:
    """50 waiting jobs, four running ones, a paused and a retried one; login secrets of a person of each team."""
    from django.db.models.functions import Now
    from django.utils import timezone

    from jobs import scheduling
    from jobs.models import Job, JobAttempt, JobState, TeamQuota, Usage, Worker
    from studio.accounts.models import LoginLink, Membership, Role, Team, User
    from tests.jobs.making import make_job, make_worker

    chance = random.Random(seed)
    people = []
    for name, members in TEAMS.items():
        team = Team.objects.create(name=name, slug=name.lower())
        for number, member in enumerate(members):
            user = User.objects.create_user(username=member)
            Membership.objects.create(user=user, team=team, role=Role.TRAINER if number else Role.LEAD)
            people.append((team, user))
            Usage.objects.create(
                team=team, user=user, device_seconds=3600 * chance.uniform(0, 20), decayed_at=timezone.now()
            )
    teams = {team.name: team for team, _user in people}
    TeamQuota.objects.create(team=teams["Support"], max_running_jobs=2, price_per_gpu_hour="2.4")
    TeamQuota.objects.create(team=teams["Research"], share=2)
    for slot in range(4):
        worker = make_worker(slot)
        memory = (24 if slot == 3 else 80) * GIBIBYTE
        Worker.objects.filter(pk=worker.pk).update(
            device="NVIDIA L4" if slot == 3 else "NVIDIA H100 80GB", device_kind="cuda", memory_bytes=memory,
            host="gpu-1", free_memory_bytes=memory, last_seen=Now() + timedelta(hours=12),
        )  # fmt: skip
    queued = []
    for number in range(55):
        team, user = chance.choice(people)
        job = make_job(team, user, name=f"{chance.choice(NAMES)}-{number + 1}")
        Job.objects.filter(pk=job.pk).update(
            needs={"gpus": 1, "memory_bytes": round(chance.choice([6.5, 11, 19, 34, 61]) * GIBIBYTE)},
            expected_seconds=chance.choice([600, 1500, 3600, 9000]), priority=chance.choice([0] * 9 + [1]),
        )  # fmt: skip
        queued.append(job)
    Job.objects.filter(pk=queued[50].pk).update(needs={"gpus": 1, "memory_bytes": 141 * GIBIBYTE})
    Job.objects.filter(pk=queued[51].pk).update(needs={"gpus": 4, "memory_bytes": 60 * GIBIBYTE})
    Job.objects.filter(pk=queued[52].pk).update(
        state=JobState.RETRY_WAIT, not_before=timezone.now() + timedelta(minutes=4)
    )
    Job.objects.filter(pk=queued[53].pk).update(state=JobState.PAUSED)
    for worker in Worker.objects.all():
        running = scheduling.next_job(worker)
        assert running is not None
        held = chance.uniform(200, 1500)
        Job.objects.filter(pk=running.pk).update(
            phase="training", step=chance.randint(40, 500), num_steps=600, seconds_left=chance.uniform(120, 3000),
            lease_until=timezone.now() + timedelta(hours=12),
        )  # fmt: skip
        JobAttempt.objects.filter(job=running).update(started_at=timezone.now() - timedelta(seconds=held))
    return {
        team.name: LoginLink.create_for(user)
        for team, user in {team.name: (team, user) for team, user in people[::-1]}.values()
    }


def main() -> None:
    """Serve the filled studio."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--port", type=int, default=8123)
    port = arguments.parse_args().port
    with bench_studio():
        for team, secret in fill().items():
            print(f"{team:>9}: http://127.0.0.1:{port}/login/link/{secret}/ then /jobs/queue/", flush=True)
        command = [
            sys.executable,
            "-m",
            "uvicorn",
            "studio.asgi:application",
            "--port",
            str(port),
            "--log-level",
            "warning",
        ]
        web = subprocess.Popen(command, env=os.environ | {"STUDIO_DEBUG": "true"})
        try:
            web.wait()
        except KeyboardInterrupt:
            web.terminate()
            web.wait()


if __name__ == "__main__":
    main()

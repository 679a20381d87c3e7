"""`manage.py durations`: how well the duration of jobs is predicted, on finished jobs that it had not seen."""

from __future__ import annotations

import statistics
from typing import Any

from django.core.management.base import BaseCommand

from jobs.durations import held_out_errors
from jobs.finished import finished_jobs
from jobs.models import Job


class Command(BaseCommand):
    """Prints the median error over the newest fifth of each team's finished jobs."""

    help = "Median error of predicted durations on held-out finished jobs."

    def handle(self, *_args: Any, **_options: Any) -> None:
        finished = finished_jobs(Job.objects.all())
        if not finished:
            self.stdout.write("No job with an estimate has succeeded yet: there is nothing to measure on.")
            return
        by_estimate, learned = held_out_errors(finished)
        self.stdout.write(f"{len(finished)} finished jobs, {len(learned)} held out; median |expected / actual - 1|:")
        self.stdout.write(f"  the engine's estimate  {100 * statistics.median(by_estimate):.0f} %")
        self.stdout.write(f"  learned                {100 * statistics.median(learned):.0f} %")

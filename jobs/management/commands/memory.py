"""`manage.py memory`: how well the peak memory of jobs is predicted, on finished jobs that it had not seen."""

from __future__ import annotations

import statistics
from typing import Any

from django.core.management.base import BaseCommand

from jobs.finished import finished_jobs
from jobs.models import Job
from workers.measured_memory import held_out_errors

HELD_OUT_SHARE = 0.2


class Command(BaseCommand):
    """Prints the median error over the newest fifth of the finished jobs, each by what had finished before."""

    help = "Median error of predicted peak memory on held-out finished jobs."

    def handle(self, *_args: Any, **_options: Any) -> None:
        runs = [one.memory for one in reversed(finished_jobs(Job.objects.all())) if one.memory is not None]
        num_held_out = max(1, round(HELD_OUT_SHARE * len(runs)))
        if len(runs) <= num_held_out:
            self.stdout.write("Fewer than two jobs have succeeded with a measured peak: nothing to measure on.")
            return
        by_arithmetic, corrected = held_out_errors(runs[:-num_held_out], runs[-num_held_out:])
        self.stdout.write(f"{len(runs)} finished jobs, {num_held_out} held out; median |expected / measured - 1|:")
        self.stdout.write(f"  the arithmetic alone      {100 * statistics.median(by_arithmetic):.1f} %")
        self.stdout.write(f"  corrected by earlier runs {100 * statistics.median(corrected):.1f} %")

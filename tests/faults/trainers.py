"""Real trainers with one thing made to go wrong in them, run by the real supervisor in the test's own process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from django.db.models.functions import Now

from jobs import lifecycle, running
from jobs.models import Job, Worker
from jobs.running import run_job
from tests.jobs.making import make_worker

real_command = running.trainer_command

# The whole command line of `python -m workers`, behind a patch of the loop's one function for a step's gradients.
WRAPPER = """
import errno, os, signal, sys, time
from workers.__main__ import main
from workers.one_job import quiet_environment
quiet_environment()
import torch
from workers import checkpoints, training
attempt = int(sys.argv[sys.argv.index("--attempt") + 1])
real = training._forward_backward

def fault(step, size):
{fault}

def forward_backward(run, model, objective, rows, size, position):
    took = real(run, model, objective, rows, size, position)
    instead = fault(position.step + 1, size)
    if instead is not None:
        took.loss_sum.mul_(instead)
    return took

training._forward_backward = forward_backward
status = main()
sys.stdout.flush()
os._exit(status)
"""


def break_trainers(monkeypatch: pytest.MonkeyPatch, folder: Path, fault: str) -> None:
    """Have trainers run `fault`, the body of a function of `step`, `size` and `attempt`, in every step."""
    body = "\n".join(f"    {line}" for line in fault.strip().splitlines())
    script = folder / "trainer.py"
    script.write_text(WRAPPER.format(fault=body))

    def command(job: Job, out: Path) -> list[str]:
        python, module, name, *arguments = real_command(job, out)
        assert (python, module, name) == (sys.executable, "-m", "workers")
        return [python, str(script), *arguments]

    monkeypatch.setattr(running, "trainer_command", command)


def run_attempt(job: Job, worker: Worker | None = None, *, tell: Callable[[object], None] = lambda _: None) -> Job:
    """Claim a waiting job now, run one attempt at it here, and give its row as it is then."""
    Job.objects.filter(pk=job.pk).update(not_before=Now())
    claimed = lifecycle.claim(job, worker or make_worker())
    assert claimed is not None, f"{job.name} waits"
    run_job(claimed, tell=tell)
    return Job.objects.select_related("adapter").get(pk=job.pk)


def without_dropout(job: Job) -> Job:
    """The job with an adapter whose steps draw no random numbers, which depend on how a batch is divided."""
    job.recipe["settings"]["dropout"] = 0.0
    job.save(update_fields=["recipe"])
    return job

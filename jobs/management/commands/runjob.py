"""`python manage.py runjob ID`: run one waiting job here, in the foreground."""

from __future__ import annotations

import os
import socket
from argparse import ArgumentParser
from typing import Any
from uuid import UUID

from django.core.exceptions import ValidationError
from django.core.management.base import BaseCommand, CommandError
from django.db import OperationalError, connection

from jobs import draining, lifecycle, slots
from jobs.models import Job, JobState
from jobs.running import run_job
from studio.devices import find_devices
from workers.events import CheckpointEvent, FailedEvent, MessageEvent, PhaseEvent, PlanEvent, StepEvent


class Command(BaseCommand):
    help = "Runs one waiting job on this machine, in the foreground, as a worker would."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("job", help="The job's id, as its page's address shows it.")
        parser.add_argument(
            "--slot",
            type=int,
            default=0,
            help="Device to train on, counted from 0. A number beyond the last device shares the first.",
        )

    def handle(self, *, job: str, slot: int, **_options: Any) -> None:
        try:
            connection.ensure_connection()
        except OperationalError as error:
            raise CommandError(f"The database does not answer: {error}".strip()) from error
        found = self._find(job)
        # As `up` shows its workers the device of their slot alone; a slot beyond the last device shares the first.
        devices = find_devices()
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[slot if slot < len(devices) else 0].visible
        try:
            lock = slots.lock_slot(slot)
        except slots.SlotTakenError as error:
            raise CommandError(
                f"{error} A worker takes waiting jobs by itself, so let it run this one, or stop it. Or run the job in"
                f" another slot, on the next device or, where that was the last, sharing the first: --slot {slot + 1}"
            ) from error
        with lock:
            if draining.inherited_drain_mode(socket.gethostname(), slot):
                raise CommandError(
                    f"Device {slot} of this machine is being drained for maintenance, so it takes no jobs."
                    " An admin ends that on the page of the workers."
                )
            claimed = lifecycle.claim(found, slots.register_worker(slot))
            if claimed is None:
                raise CommandError(
                    f"“{found.name}” does not wait for a device: it is {found.get_state_display().lower()}."
                )
            run_job(claimed, tell=self._tell)
        claimed.refresh_from_db()
        if claimed.state != JobState.SUCCEEDED:
            raise CommandError(
                f"{claimed.get_state_display()}. {claimed.failure_message} {claimed.failure_next_step}".strip()
            )
        self.stdout.write(self.style.SUCCESS(f"Done: adapter {claimed.adapter_id} “{claimed.name}”."))

    def _find(self, job: str) -> Job:
        try:
            return Job.objects.get(pk=UUID(job))
        except (ValueError, ValidationError, Job.DoesNotExist):
            raise CommandError(f'There is no job "{job}".') from None

    def _tell(self, event: object) -> None:
        match event:
            case PhaseEvent(done=None):
                self.stdout.write(event.phase)
            case PlanEvent():
                self.stdout.write(f"{event.num_steps} steps over {event.num_train_rows} rows on {event.device}")
            case StepEvent():
                self.stdout.write(
                    f"step {event.step}/{event.num_steps} loss {event.loss:.4f} lr {event.learning_rate:.2e}"
                    f" {event.tokens_per_second:.0f} tokens/s"
                )
            case CheckpointEvent():
                self.stdout.write(f"checkpoint at step {event.step}")
            case MessageEvent() | FailedEvent():
                self.stdout.write(getattr(event, "text", "") or getattr(event, "message", ""))

"""Jobs named "fake ..." get a fake trainer; all else, the supervisor included, is the product's own."""

from __future__ import annotations

import sys
from pathlib import Path

from django.apps import AppConfig

FAKE = "fake "
FAKE_TRAINER = Path(__file__).with_name("fake_trainer.py")


class FakeTrainersConfig(AppConfig):
    name = "tests.faults"
    label = "faults"

    def ready(self) -> None:
        from jobs import running
        from jobs.models import Job

        real_command = running.trainer_command

        def trainer_command(job: Job, folder: Path) -> list[str]:
            command = real_command(job, folder)
            if not job.name.startswith(FAKE):
                return command
            assert command[:3] == [sys.executable, "-m", "workers"], command
            # Without site-packages: it starts in a few milliseconds.
            return [sys.executable, "-I", "-S", str(FAKE_TRAINER), *command[3:]]

        running.trainer_command = trainer_command

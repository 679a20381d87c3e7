"""`manage.py up`: PEFT Studio with everything it needs, as one process tree."""

from __future__ import annotations

import os
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError

from studio.embedded import Listening
from studio.launching import LaunchError, Settings, launch


class Command(BaseCommand):
    help = "Start everything: servers (unless their URLs are set), web, beat and workers. Ctrl-C stops it."
    # The checks want the URLs and the key that this command is about to provide to its children.
    requires_system_checks: list[str] = []

    def handle(self, *_args: Any, **_options: Any) -> None:
        port = settings.PORT
        if port is not None and not 0 <= port <= 65535:
            raise CommandError(f"STUDIO_PORT is {port}; a port is between 0 and 65535.")
        # Other people of this machine have no business in the data folder.
        os.umask(0o077)
        try:
            launch(
                Settings(
                    data_dir=settings.DATA_DIR,
                    # What was asked for, not what the settings found of a studio that runs or ran here.
                    database_url=os.environ.get("DATABASE_URL", ""),
                    redis_url=os.environ.get("REDIS_URL", ""),
                    secret_key=os.environ.get("STUDIO_SECRET_KEY", ""),
                    host=settings.HOST,
                    port=port,
                    listening=_listening(),
                ),
                say=self._say,
            )
        except LaunchError as error:
            raise CommandError(str(error)) from error

    def _say(self, line: str) -> None:
        self.stdout.write(line)
        self.stdout.flush()


def _listening() -> Listening | None:
    if not settings.SERVERS_HOST:
        return None
    return Listening(settings.SERVERS_HOST, settings.SERVERS_POSTGRES_PORT, settings.SERVERS_REDIS_PORT)

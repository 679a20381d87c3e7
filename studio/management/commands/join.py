"""`manage.py join URL TOKEN`: this machine becomes a worker of a studio."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError

from studio.joining import JoinError, ask_to_join, check_machine, check_reach, keep, run_workers

FROM_STDIN = "-"


class Command(BaseCommand):
    help = "Join a studio with a token of its page Workers and run a worker per GPU; without arguments, work again."
    # The checks want the URLs and the key that this command is about to ask for.
    requires_system_checks: list[str] = []

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("url", nargs="?", help="The studio's address: https://studio.example.org")
        parser.add_argument("token", nargs="?", help="A join token; - reads it from standard input.")
        parser.add_argument(
            "--trust-network", action="store_true",
            help="Send the token and receive passwords over plain HTTP to another machine.",
        )  # fmt: skip
        parser.add_argument("--no-start", action="store_true", help="Join only; `manage.py join` starts the workers.")

    def handle(self, *, url: str | None, token: str | None, trust_network: bool, no_start: bool, **_: Any) -> None:
        os.umask(0o077)
        try:
            check_machine(settings.DATA_DIR)
            if url is not None:
                if not token:
                    raise JoinError("A join token is missing. Make one on the studio's page Workers.")
                # A command line can be read by everybody on a machine, though a used token opens nothing.
                is_piped = token == FROM_STDIN
                secret = sys.stdin.readline().strip() if is_piped else token
                joined = ask_to_join(url, secret, trusts_network=trust_network)
                check_reach(joined)
                path = keep(joined, settings.DATA_DIR)
                self._say(f"Joined {joined.url}, version {joined.version}. Kept in {path}.")
            if not no_start:
                run_workers(settings.DATA_DIR, say=self._say)
        except JoinError as error:
            raise CommandError(str(error)) from error

    def _say(self, line: str) -> None:
        self.stdout.write(line)
        self.stdout.flush()

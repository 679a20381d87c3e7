"""Register a base model from a folder: `python manage.py registerbase FOLDER --name NAME --licence LICENCE`."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand, CommandError

from studio.accounts.models import record
from studio.catalogue.importing import register_base_model
from workers.errors import ExplainedError


class Command(BaseCommand):
    """Whoever may run this may read the machine's files anyway, so the folder may lie anywhere."""

    help = "Register a base model from a folder with safetensors weights."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("folder", type=Path)
        parser.add_argument("--name", help="How people call it; the folder's name when left out.")
        parser.add_argument("--licence", default="", help="SPDX name of its licence, for example apache-2.0.")
        parser.add_argument("--hub-id", default="", help="Its name on a model hub, written into adapter_config.json.")

    def handle(self, *args: Any, **options: Any) -> None:
        folder: Path = options["folder"].resolve()
        try:
            base = register_base_model(
                folder=folder, name=options["name"] or folder.name, hub_id=options["hub_id"], licence=options["licence"]
            )
        except ExplainedError as error:
            raise CommandError(f"{error.message} {error.next_step}".strip()) from error
        record("base_model.registered", team=None, target=base, revision=base.revision)
        self.stdout.write(f"{base.name}: registered, revision {base.revision[:12]}, {base.num_bytes / 1e9:.2f} GB.")

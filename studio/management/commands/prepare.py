"""`manage.py prepare`: what must be done once before the web process starts. Safe to run again at any time."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from django.conf import settings
from django.core.checks import Tags
from django.core.management import call_command
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import OperationalError, connection, transaction

from studio import bundled
from studio.accounts.models import LoginLink, Membership, Role, Team, User
from studio.checks import TAG


class Command(BaseCommand):
    help = "Migrate, collect static files and make the first team and its admin when there is none."
    # The settings, not every URL: a start waits for this. `make check` runs them all.
    requires_system_checks: list[str] = [Tags.security, TAG]

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--json", action="store_true", help="Say what was done as one line of JSON.")

    def handle(self, *_args: Any, **options: Any) -> None:
        try:
            connection.ensure_connection()
        except OperationalError as error:
            raise CommandError(f"The database of DATABASE_URL does not answer: {error}".strip()) from error
        call_command("migrate", interactive=False, verbosity=0)
        collect_static_files()
        admin = first_admin()
        secret = LoginLink.create_for(admin)
        if options["json"]:
            wants_model = bundled.is_installed() and not bundled.is_registered()
            self.stdout.write(json.dumps({"login_secret": secret, "wants_bundled_model": wants_model}))
            return
        self.stdout.write(f"Ready. {admin.username} signs in once with /login/link/{secret}/")


def first_admin() -> User:
    """The admin who was there first, made with a team of their own when the studio is empty."""
    with transaction.atomic(), connection.cursor() as cursor:
        # Two starts over one database at the same moment must not make two of them.
        cursor.execute("SELECT pg_advisory_xact_lock(hashtext('peft-studio-first-admin'))")
        found = (
            Membership.objects.filter(role=Role.ADMIN, user__is_active=True).select_related("user").order_by("pk")
        ).first()
        if found is not None:
            return found.user
        team, _ = Team.objects.get_or_create(slug="first-team", defaults={"name": "First team"})
        user, is_new = User.objects.get_or_create(username="admin")
        if is_new:
            # Signs in with the link; a password is set on the account page.
            user.set_unusable_password()
            user.save()
        Membership.objects.update_or_create(user=user, team=team, defaults={"role": Role.ADMIN})
        return user


def collect_static_files() -> bool:
    """Collect the static files unless nothing has changed since; whether it was done."""
    stamp = Path(settings.STATIC_ROOT) / ".collected"
    wanted = _static_fingerprint()
    if stamp.exists() and stamp.read_text() == wanted:
        return False
    call_command("collectstatic", interactive=False, verbosity=0)
    stamp.write_text(wanted)
    return True


def _static_fingerprint() -> str:
    """Changes when a file under static/ or the set of installed apps does."""
    digest = hashlib.sha256(repr(settings.INSTALLED_APPS).encode())
    for folder in settings.STATICFILES_DIRS:
        for path in sorted(p for p in Path(folder).rglob("*") if p.is_file()):
            status = path.stat()
            digest.update(f"{path.relative_to(folder)} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()

"""The part of `make check` that needs a database: `python -m studio.checking`.

Models and migrations agree, and the settings of a real deployment pass Django's own deployment checks.
"""

from __future__ import annotations

import os
import secrets
import sys
import tempfile
from pathlib import Path

from studio.embedded import embedded_servers


def main() -> int:
    """0 when everything agrees; what does not is printed."""
    with tempfile.TemporaryDirectory(prefix="peft-studio-check-") as folder, embedded_servers(Path(folder)) as servers:
        urls = servers.urls()
        os.environ |= {
            "DJANGO_SETTINGS_MODULE": "studio.settings",
            "STUDIO_DATA_DIR": folder,
            "STUDIO_SECRET_KEY": secrets.token_urlsafe(60),
            "STUDIO_HTTPS": "true",
            "DATABASE_URL": urls.database,
            "REDIS_URL": urls.redis,
        }
        return _check()


def _check() -> int:
    import django
    from django.core.management import call_command
    from django.core.management.base import SystemCheckError

    django.setup()
    try:
        call_command("makemigrations", check_changes=True, dry_run=True)
        call_command("check", deploy=True, fail_level="WARNING")
    except SystemCheckError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except SystemExit as end:
        return int(end.code or 0)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""A studio for benchmarks: real embedded servers in a folder of their own, and a queue of many teams."""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def bench_studio() -> Iterator[Path]:
    """Django on fresh servers, its tables made; everything is gone afterwards."""
    from studio.embedded import embedded_servers

    with tempfile.TemporaryDirectory(prefix="peft-studio-bench-") as name, embedded_servers(Path(name)) as servers:
        urls = servers.urls()
        os.environ |= {
            "DJANGO_SETTINGS_MODULE": "studio.settings",
            "STUDIO_DATA_DIR": name,
            "STUDIO_SECRET_KEY": secrets.token_urlsafe(60),
            "DATABASE_URL": urls.database,
            "REDIS_URL": urls.redis,
        }
        import django
        from django.core.management import call_command

        django.setup()
        call_command("migrate", verbosity=0)
        yield Path(name)

"""System checks: bad settings are named at start, with a hint."""

from __future__ import annotations

from typing import Any

from django.conf import settings
from django.core.checks import CheckMessage, Error, Tags, register
from django.core.checks import Warning as Warned
from django.core.exceptions import ImproperlyConfigured

TAG = "studio"


@register(Tags.security)
def check_secret_key(**_kwargs: Any) -> list[CheckMessage]:
    """A short or missing key would let anyone forge a session."""
    try:
        key = settings.SECRET_KEY
    except ImproperlyConfigured:  # Django's answer to an empty one
        key = ""
    if len(key) >= 50:
        return []
    return [
        Error(
            "STUDIO_SECRET_KEY has fewer than 50 characters.",
            hint="Start `python manage.py up`, which makes one and keeps it in STUDIO_DATA_DIR, or set the variable.",
            id="studio.E001",
        )
    ]


@register(TAG)
def check_servers(**_kwargs: Any) -> list[CheckMessage]:
    """Nothing works without Postgres and Redis."""
    missing = [name for name in ("DATABASE_URL", "REDIS_URL") if not getattr(settings, name)]
    return [
        Error(
            f"{name} is not set.",
            hint="Start `python manage.py up`, which brings its own servers, and run this beside it over the same"
            " STUDIO_DATA_DIR; or point the variable at a real server.",
            id="studio.E002",
        )
        for name in missing
    ]


@register(TAG)
def check_tasks_folder(**_kwargs: Any) -> list[CheckMessage]:
    """A folder of tasks that is not there would only be found out when a job fails; code in it is worth a word."""
    folder = settings.TASKS_FOLDER
    if folder is None:
        return []
    if not folder.is_dir():
        return [
            Error(
                f"STUDIO_TASKS_FOLDER names {folder}, which is no folder.",
                hint="Make it and copy task files (YAML) with their data into it, or leave the variable empty.",
                id="studio.E003",
            )
        ]
    if settings.TASKS_MAY_RUN_CODE:
        return [
            Warned(
                f"STUDIO_TASKS_MAY_RUN_CODE lets task files in {folder} run Python with the rights of a worker.",
                hint="Let only people whom you trust with the machine write into that folder.",
                id="studio.W003",
            )
        ]
    return []

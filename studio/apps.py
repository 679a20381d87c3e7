from contextlib import suppress
from pathlib import Path

from django.apps import AppConfig
from django.conf import settings
from django.contrib.staticfiles.apps import StaticFilesConfig


class StudioConfig(AppConfig):
    name = "studio"
    label = "studio"

    def ready(self) -> None:
        # Where it cannot be made, `up` and Django's own check of this setting say so in a sentence.
        with suppress(OSError):
            Path(settings.FILE_UPLOAD_TEMP_DIR).mkdir(parents=True, exist_ok=True)
        from studio import checks  # noqa: F401  registers the system checks


class StudioStaticFilesConfig(StaticFilesConfig):
    """Static files without the style sheet's source, whose imports only its compiler understands."""

    ignore_patterns = [*StaticFilesConfig.ignore_patterns, "source"]

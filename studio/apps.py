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
        # The checks register themselves; the version is that of the code as this process starts with it.
        from studio import checks, version  # noqa: F401


class StudioStaticFilesConfig(StaticFilesConfig):
    """Static files without the style sheet's source, whose imports only its compiler understands."""

    ignore_patterns = [*StaticFilesConfig.ignore_patterns, "source"]

from django.apps import AppConfig
from django.contrib.staticfiles.apps import StaticFilesConfig


class StudioConfig(AppConfig):
    name = "studio"
    label = "studio"

    def ready(self) -> None:
        from studio import checks  # noqa: F401  registers the system checks


class StudioStaticFilesConfig(StaticFilesConfig):
    """Static files without the style sheet's source, whose imports only its compiler understands."""

    ignore_patterns = [*StaticFilesConfig.ignore_patterns, "source"]

from typing import Any

from django.apps import AppConfig
from django.db.models.signals import post_delete


class CatalogueConfig(AppConfig):
    name = "studio.catalogue"
    label = "catalogue"

    def ready(self) -> None:
        from studio.catalogue.models import BaseModel

        post_delete.connect(_remove_quantised, sender=BaseModel, dispatch_uid="remove_quantised")


def _remove_quantised(instance: Any, **_kwargs: object) -> None:
    """Quantised weights go with the base model that they were made from."""
    from studio.storage import quantised_folder
    from workers.quantised import remove

    remove(quantised_folder(), instance.revision)

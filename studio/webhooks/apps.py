from django.apps import AppConfig


class WebhooksConfig(AppConfig):
    name = "studio.webhooks"
    label = "webhooks"

    def ready(self) -> None:
        from studio.accounts.models import audit_event_recorded
        from studio.webhooks.hearing import hear

        audit_event_recorded.connect(hear, dispatch_uid="studio.webhooks")

from __future__ import annotations

from django.urls import path

from studio.webhooks import mail_pages, views

app_name = "webhooks"

urlpatterns = [
    path("", views.webhooks, name="list"),
    path("<int:webhook_id>/", views.webhook_page, name="webhook"),
    path("<int:webhook_id>/<slug:action>/", views.webhook_action, name="action"),
    path("deliveries/<int:delivery_id>/", views.delivery_page, name="delivery"),
    path("deliveries/<int:delivery_id>/again/", views.delivery_again, name="again"),
    path("mail/", mail_pages.mail, name="mail"),
    path("mail/stop/<str:token>/", mail_pages.unsubscribe, name="unsubscribe"),
]

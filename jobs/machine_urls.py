"""The page of machines."""

from django.urls import path

from jobs import machine_pages

app_name = "workers"
urlpatterns = [
    path("", machine_pages.list_workers, name="list"),
    path("list/", machine_pages.worker_list, name="fragment"),
    path("tokens/", machine_pages.make_join_token, name="make_token"),
    path("tokens/<int:token_id>/revoke/", machine_pages.end_join_token, name="revoke_token"),
]

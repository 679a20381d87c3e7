"""Pages of jobs."""

from django.urls import path

from jobs import queue_page, quotas, streams, views

app_name = "jobs"
urlpatterns = [
    path("", views.list_jobs, name="list"),
    path("queue/", queue_page.queue, name="queue"),
    path("limits/", quotas.limits, name="limits"),
    path("new/", views.new_job, name="new"),
    path("estimate/", views.estimate, name="estimate"),
    path("<uuid:job_id>/", views.job_detail, name="detail"),
    path("<uuid:job_id>/header/", views.job_header, name="header"),
    path("<uuid:job_id>/points.json", views.points, name="points"),
    path("<uuid:job_id>/points/", views.point_table, name="point_table"),
    path("<uuid:job_id>/events/", streams.events, name="events"),
    path("<uuid:job_id>/cancel/", views.cancel, name="cancel"),
    path("<uuid:job_id>/retry/", views.retry, name="retry"),
    path("<uuid:job_id>/again/<slug:action>/", views.again, name="again"),
]

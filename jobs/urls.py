"""Pages of jobs."""

from django.urls import path

from jobs import acting, base_needs, curves, diffing, evaluation_pages, queue_page, quotas, samples, streams, views

app_name = "jobs"
urlpatterns = [
    path("", views.list_jobs, name="list"),
    path("queue/", queue_page.queue, name="queue"),
    path("needs/<int:base_model_id>/", base_needs.base_needs, name="base_needs"),
    path("limits/", quotas.limits, name="limits"),
    path("curves/", curves.curves, name="curves"),
    path("curves.json", curves.curves_json, name="curves_json"),
    path("diff/", diffing.diff, name="diff"),
    path("new/", views.new_job, name="new"),
    path("estimate/", views.estimate, name="estimate"),
    path("evaluate/", evaluation_pages.evaluate, name="evaluate"),
    path("<uuid:job_id>/", views.job_detail, name="detail"),
    path("<uuid:job_id>/header/", views.job_header, name="header"),
    path("<uuid:job_id>/points.json", views.points, name="points"),
    path("<uuid:job_id>/points/", views.point_table, name="point_table"),
    path("<uuid:job_id>/samples/", samples.samples, name="samples"),
    path("<uuid:job_id>/events/", streams.events, name="events"),
    path("<uuid:job_id>/again/<slug:action>/", acting.again, name="again"),
    path("<uuid:job_id>/cancel/", acting.cancel, name="cancel"),
    path("<uuid:job_id>/pause/", acting.pause, name="pause"),
    path("<uuid:job_id>/resume/", acting.resume, name="resume"),
    path("<uuid:job_id>/move/", acting.move, name="move"),
    path("<uuid:job_id>/priority/", acting.prioritise, name="priority"),
    path("<uuid:job_id>/retry/", acting.retry, name="retry"),
    path("<uuid:job_id>/again-exactly/", acting.run_exactly, name="run_exactly"),
    path("workers/<uuid:worker_id>/drain/", acting.drain, name="drain_worker"),
    path("workers/<uuid:worker_id>/end-draining/", acting.undrain, name="end_draining"),
    path("workers/<uuid:worker_id>/end-quarantine/", acting.unquarantine, name="end_quarantine"),
]

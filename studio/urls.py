"""One include per app. `jobs` is named in strings only: studio does not import it."""

from django.urls import include, path

urlpatterns = [
    path("", include("jobs.home_urls")),
    path("", include("studio.health")),
    path("", include("studio.accounts.urls")),
    path("datasets/", include("studio.datasets.urls")),
    path("", include("studio.catalogue.urls")),
    path("reviews/", include("studio.reviews.urls")),
    path("webhooks/", include("studio.webhooks.urls")),
    path("jobs/", include("jobs.urls")),
    path("workers/", include("jobs.machine_urls")),
    path("api/v1/", include("studio.api.urls")),
]

handler400 = "studio.errors.bad_request"
handler404 = "studio.errors.not_found"
handler500 = "studio.errors.server_error"

"""/api/v1/: the routers that the settings name, behind one token check and one form of error."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from django.conf import settings
from django.http import HttpRequest, HttpResponse
from ninja import NinjaAPI

from studio.api.auth import may_read
from studio.api.errors import ApiError, error_response, install_error_handlers


def signed_in_or_token(view: Callable[..., HttpResponse]) -> Callable[..., HttpResponse]:
    """The schema names every field there is, so it is for people with an account and for tokens."""

    @wraps(view, assigned=())
    def guarded(request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponse:
        if not request.user.is_authenticated:
            try:
                may_read(request)
            except ApiError as error:
                return error_response(error.status, [error.detail], error.headers)
        return view(request, *args, **kwargs)

    return guarded


api = NinjaAPI(
    title="PEFT Studio",
    version="1",
    description="The same calls as the pages. Errors have one form; lists are paged by `after`.",
    # No page of documentation: the usual ones want inline scripts, which the Content-Security-Policy refuses.
    docs_url=None,
    docs_decorator=signed_in_or_token,
    auth=may_read,
    urls_namespace="api",
)
install_error_handlers(api)
for router in settings.API_ROUTERS:
    api.add_router("", router)

urlpatterns = api.urls[0]
app_name = "api"

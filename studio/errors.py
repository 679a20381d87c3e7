"""Django's own error pages; below /api/ they answer in the API's form."""

from __future__ import annotations

from typing import Any

from django.http import HttpRequest, HttpResponse
from django.views import defaults

from studio.api.errors import INTERNAL, NOT_FOUND, ErrorDetail, error_response

_BAD_REQUEST = ErrorDetail(code="bad_request", message="The server cannot read this request.")


def _is_api(request: HttpRequest) -> bool:
    return request.path.startswith("/api/")


def not_found(request: HttpRequest, exception: Exception) -> HttpResponse:
    """404."""
    if _is_api(request):
        return error_response(404, [NOT_FOUND])
    return defaults.page_not_found(request, exception)


def server_error(request: HttpRequest, **kwargs: Any) -> HttpResponse:
    """500, without the database: the database may be what failed."""
    if _is_api(request):
        return error_response(500, [INTERNAL])
    return defaults.server_error(request, **kwargs)


def bad_request(request: HttpRequest, exception: Exception) -> HttpResponse:
    """400."""
    if _is_api(request):
        return error_response(400, [_BAD_REQUEST])
    return defaults.bad_request(request, exception)

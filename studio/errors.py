"""Django's own error pages, and one for 405; below /api/ they answer in the API's form."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from typing import Any

from asgiref.sync import iscoroutinefunction, sync_to_async
from django.db import InterfaceError, OperationalError
from django.http import HttpRequest, HttpResponse, HttpResponseBase, HttpResponseNotAllowed
from django.shortcuts import render
from django.template import loader
from django.utils.decorators import sync_and_async_middleware
from django.views import defaults

from studio.api.errors import INTERNAL, NOT_FOUND, RETRY_LATER, UNAVAILABLE, ErrorDetail, error_response

_BAD_REQUEST = ErrorDetail(code="bad_request", message="The server cannot read this request.")


def _is_api(request: HttpRequest) -> bool:
    return request.path.startswith("/api/")


def not_found(request: HttpRequest, exception: Exception) -> HttpResponse:
    """404."""
    if _is_api(request):
        return error_response(404, [NOT_FOUND])
    return defaults.page_not_found(request, exception)


def server_error(request: HttpRequest, **kwargs: Any) -> HttpResponse:
    """500, or 503 when it was the database that did not answer; the page needs none."""
    if isinstance(sys.exception(), OperationalError | InterfaceError):
        return unavailable(request)
    if _is_api(request):
        return error_response(500, [INTERNAL])
    return defaults.server_error(request, **kwargs)


def unavailable(request: HttpRequest) -> HttpResponse:
    """503 with Retry-After: the same request succeeds once the database is back."""
    if _is_api(request):
        return error_response(503, [UNAVAILABLE], RETRY_LATER)
    return HttpResponse(loader.render_to_string("503.html"), status=503, headers=RETRY_LATER)


def bad_request(request: HttpRequest, exception: Exception) -> HttpResponse:
    """400."""
    if _is_api(request):
        return error_response(400, [_BAD_REQUEST])
    return defaults.bad_request(request, exception)


def explain_not_allowed(request: HttpRequest, response: HttpResponseBase) -> HttpResponseBase:
    """405 in words, for Django's own answer is an empty page; any other response as it is."""
    if not isinstance(response, HttpResponseNotAllowed):
        return response
    allowed = {"Allow": response["Allow"]}
    if _is_api(request):
        sentence = f"This address does not take {request.method}."
        detail = ErrorDetail(code="method_not_allowed", message=sentence, help=f"It takes {allowed['Allow']}.")
        return error_response(405, [detail], allowed)
    explained = render(request, "405.html", status=405)
    explained["Allow"] = allowed["Allow"]
    return explained


@sync_and_async_middleware
def NotAllowedMiddleware(get_response: Callable[[HttpRequest], Any]) -> Callable[[HttpRequest], Any]:  # noqa: N802
    """Hybrid like TeamMiddleware, so that a progress stream does not hold a thread for its whole life."""
    if iscoroutinefunction(get_response):

        async def asynchronous(request: HttpRequest) -> HttpResponseBase:
            answer: Awaitable[HttpResponseBase] = get_response(request)
            response = await answer
            if isinstance(response, HttpResponseNotAllowed):
                return await sync_to_async(explain_not_allowed)(request, response)
            return response

        return asynchronous

    def synchronous(request: HttpRequest) -> HttpResponseBase:
        return explain_not_allowed(request, get_response(request))

    return synchronous

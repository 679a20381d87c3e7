"""Every error of the API in one form: {"error": {code, message, field, row, help}}."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from django.core.exceptions import PermissionDenied, RequestDataTooBig
from django.db import InterfaceError, OperationalError
from django.http import Http404, HttpRequest, HttpResponse, JsonResponse
from ninja import NinjaAPI, Schema
from ninja.errors import AuthenticationError, HttpError, ValidationError

from studio.storage import DiskFullError, StorageError, TooLargeError
from workers.errors import ExplainedError

logger = logging.getLogger(__name__)

CHALLENGE = {"WWW-Authenticate": 'Bearer realm="PEFT Studio API"'}


class ErrorDetail(Schema):
    """What was found, where, and what to do."""

    code: str
    message: str
    field: str | None = None
    row: int | None = None
    help: str = ""


class ErrorOut(Schema):
    """`error` is the first problem; `errors` has all of them when a body has several."""

    error: ErrorDetail
    errors: list[ErrorDetail] | None = None


# For an operation's `response=`: documents the error form in the schema.
ERRORS: dict[Any, Any] = {frozenset({400, 401, 403, 404, 409, 413, 422, 429, 503, 507}): ErrorOut}


class ApiError(Exception):
    """An answer other than success, ready to be sent."""

    def __init__(
        self, status: int, code: str, message: str, *,
        field: str | None = None, row: int | None = None, help: str = "",  # noqa: A002  the form's own word
        headers: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status = status
        self.detail = ErrorDetail(code=code, message=message, field=field, row=row, help=help)
        self.headers = dict(headers or {})


def error_response(
    status: int,
    details: list[ErrorDetail],
    headers: Mapping[str, str] | None = None,
    *,
    beside: Mapping[str, Any] | None = None,
) -> HttpResponse:
    """The response for one or several problems, with what the operation has to say beside them."""
    body: dict[str, Any] = {"error": details[0].model_dump(), **(beside or {})}
    if len(details) > 1:
        body["errors"] = [detail.model_dump() for detail in details]
    return JsonResponse(body, status=status, headers=headers)


def install_error_handlers(api: NinjaAPI) -> None:
    """Give every exception that an operation can raise its place in the error form."""

    def handles(kind: type[Exception]) -> Any:
        return lambda handler: api.add_exception_handler(kind, handler)

    @handles(ApiError)
    def api_error(_request: HttpRequest, error: ApiError) -> HttpResponse:
        return error_response(error.status, [error.detail], error.headers)

    @handles(ExplainedError)
    def explained(_request: HttpRequest, error: ExplainedError) -> HttpResponse:
        return error_response(
            413 if error.code == "expands_too_much" else 422,
            [
                ErrorDetail(
                    code=error.code, message=error.message, field=error.field, row=error.line, help=error.next_step
                )
            ],
        )

    @handles(StorageError)
    def storage(_request: HttpRequest, error: StorageError) -> HttpResponse:
        status = {TooLargeError: 413, DiskFullError: 507}.get(type(error), 500)
        message = error.strerror or str(error)
        return error_response(status, [ErrorDetail(code=error.code, message=message)])

    @handles(ValidationError)
    def invalid(_request: HttpRequest, error: ValidationError) -> HttpResponse:
        details = [_from_pydantic(one) for one in error.errors]
        return error_response(400 if any(d.code == "unknown_field" for d in details) else 422, details)

    @handles(Http404)
    def not_found(_request: HttpRequest, _error: Http404) -> HttpResponse:
        return error_response(404, [NOT_FOUND])

    @handles(PermissionDenied)
    def forbidden(_request: HttpRequest, error: PermissionDenied) -> HttpResponse:
        return error_response(403, [ErrorDetail(code="forbidden", message=str(error) or "This is not allowed.")])

    @handles(RequestDataTooBig)
    def too_big(_request: HttpRequest, _error: RequestDataTooBig) -> HttpResponse:
        return error_response(413, [ErrorDetail(code="too_large", message="The request's body is too large.")])

    @handles(AuthenticationError)
    def unauthenticated(_request: HttpRequest, _error: AuthenticationError) -> HttpResponse:
        return error_response(401, [UNAUTHENTICATED], CHALLENGE)

    @handles(HttpError)
    def http_error(_request: HttpRequest, error: HttpError) -> HttpResponse:
        code = HTTPStatus(error.status_code).phrase.lower().replace(" ", "_")
        message, help_text = error.message, ""
        if error.message.startswith("Cannot parse request body"):
            code, message = "invalid_json", "The body is not valid JSON."
            help_text = "Send a JSON object with the header Content-Type: application/json."
        return error_response(error.status_code, [ErrorDetail(code=code, message=message, help=help_text)])

    def database_away(request: HttpRequest, error: Exception) -> HttpResponse:
        logger.warning("%s %s: the database does not answer: %s", request.method, request.path, error)
        return error_response(503, [UNAVAILABLE], RETRY_LATER)

    handles(OperationalError)(database_away)
    handles(InterfaceError)(database_away)

    @handles(Exception)
    def unexpected(request: HttpRequest, error: Exception) -> HttpResponse:
        logger.error("%s %s failed", request.method, request.path, exc_info=error)
        return error_response(500, [INTERNAL])


NOT_FOUND = ErrorDetail(code="not_found", message="There is nothing at this address in this token's team.")
UNAUTHENTICATED = ErrorDetail(
    code="unauthenticated",
    message="No living API token came with the request.",
    help='Send "Authorization: Bearer pst_..."; make a token on the page API tokens.',
)
INTERNAL = ErrorDetail(
    code="internal", message="The studio failed at this request; its log has the details.", help="Try again later."
)

# A database that restarts, has no connection left or broke off a deadlock: asking again soon helps.
UNAVAILABLE = ErrorDetail(
    code="unavailable",
    message="The studio's database does not answer at this moment, so the request may not have been done.",
    help="Send it again in a few seconds, with the same Idempotency-Key; running jobs go on.",
)
RETRY_LATER = {"Retry-After": "5"}

# Where ninja says that a value came from; the person's own field names follow.
_SOURCES = {"body", "query", "path", "form", "file", "header", "cookie"}


def _from_pydantic(error: dict[str, Any]) -> ErrorDetail:
    """One pydantic error with its field's dotted path as the sender wrote it."""
    location = list(error["loc"])
    source = location.pop(0) if location and location[0] in _SOURCES else ""
    # A body's location goes on with the name of the operation's own parameter, which the sender never saw.
    if source == "body" and location:
        location.pop(0)
    field = ".".join(str(part) for part in location) or None
    match error["type"]:
        case "extra_forbidden":
            return ErrorDetail(
                code="unknown_field", message=f'There is no field "{field}" here.', field=field, help="Remove it."
            )
        case "unknown_field":
            name = error.get("ctx", {}).get("name")
            return ErrorDetail(code="unknown_field", message=error["msg"], field=name, help="Remove it.")
        case "unstorable_text":
            return ErrorDetail(code="invalid", message=error["msg"], field=error["ctx"]["name"], help="Remove it.")
        case "missing":
            return ErrorDetail(code="missing", message=f'The field "{field}" is missing.', field=field)
    return ErrorDetail(code="invalid", message=f"{error['msg'].removeprefix('Value error, ')}.", field=field)

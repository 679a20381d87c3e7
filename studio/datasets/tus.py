"""The tus 1.0 protocol (tus.io/protocols/resumable-upload): core, creation, checksum, expiration and termination.

One function per method, for the pages' addresses and the API's alike: the caller has found out who asks. A PATCH is
checked here and then received bit by bit by tus_stream.py, or from the request itself where no ASGI server is.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn
from uuid import UUID

from django.conf import settings
from django.http import Http404, HttpRequest, HttpResponse
from django.shortcuts import get_object_or_404
from django.utils.http import http_date

from studio.accounts.access import TeamRequest
from studio.api.errors import ApiError, ErrorDetail
from studio.datasets import resumable
from studio.datasets.models import Dataset, Upload, UploadState
from studio.datasets.resumable import (
    OffsetError,
    Receiver,
    TooManyUploadsError,
    UploadGoneError,
    cancel_upload,
    expires_at,
    has_expired,
    start_upload,
)
from studio.query_values import whole_number
from studio.storage import DiskFullError, StorageError, TooLargeError
from studio.storage.parts import PartBusyError
from workers.errors import ExplainedError

VERSION = "1.0.0"
CONTENT_TYPE = "application/offset+octet-stream"
# The protocol wants sha1 of every server; it guards against mistakes of the network, not against people.
CHECKSUMS: dict[str, Callable[[], Any]] = {
    "sha1": lambda: hashlib.sha1(usedforsecurity=False),
    "sha256": hashlib.sha256,
}
# The protocol's own status, which no standard of HTTP has.
CHECKSUM_MISMATCH = 460
READ_BYTES = 1024**2
# Where the ASGI application finds what the view has admitted.
SCOPE_KEY = "studio.tus.admission"
_DIGITS = re.compile(r"[0-9]{1,18}", re.ASCII)
_HEX_SHA256 = re.compile(r"[0-9a-fA-F]{64}", re.ASCII)


def options(_request: HttpRequest) -> HttpResponse:
    """What this server can do."""
    response = HttpResponse(status=204)
    response["Tus-Resumable"] = VERSION
    response["Tus-Version"] = VERSION
    response["Tus-Extension"] = "creation,checksum,expiration,termination"
    response["Tus-Checksum-Algorithm"] = ",".join(CHECKSUMS)
    response["Tus-Max-Size"] = str(settings.MAX_UPLOAD_BYTES)
    return response


def create(request: TeamRequest, address: Callable[[Upload], str]) -> HttpResponse:
    """POST: a new upload. Its metadata may have filename, name, licence, dataset (a number) and sha256 (hexadecimal).

    Args:
        address: the URL at which the upload will be asked for.
    """
    _check_version(request)
    if "Upload-Length" not in request.headers and "Upload-Defer-Length" in request.headers:
        raise ApiError(400, "length_required", "The length of the file has to be known from the beginning.",
                       help="Send the header Upload-Length.")  # fmt: skip
    num_bytes = _number(request, "Upload-Length")
    metadata = read_metadata(request.headers.get("Upload-Metadata", ""))
    declared = metadata.get("sha256", "").lower()
    if declared and not _HEX_SHA256.fullmatch(declared):
        raise ApiError(400, "invalid_metadata", "The sha256 in Upload-Metadata has not 64 hexadecimal digits.")
    try:
        upload = start_upload(
            team=request.team, user=request.user, file_name=metadata.get("filename", ""), num_bytes=num_bytes,
            dataset=_dataset(request, metadata.get("dataset", "")), name=metadata.get("name", ""),
            licence=metadata.get("licence", ""), declared_sha256=declared,
        )  # fmt: skip
    except TooManyUploadsError as error:
        raise too_many_uploads() from error
    if num_bytes == 0:
        with Receiver(upload, 0) as receiver:
            receiver.settle()
    response = HttpResponse(status=201)
    response["Location"] = address(upload)
    return _described(response, upload)


def too_many_uploads() -> ApiError:
    """What is said to a TooManyUploadsError."""
    sentence = f"The team has {resumable.MAX_UNFINISHED} uploads that are not finished."
    return ApiError(429, "too_many_uploads", sentence, help="Finish or cancel one of them.")


def head(request: TeamRequest, upload_id: UUID) -> HttpResponse:
    """HEAD: where to go on."""
    _check_version(request)
    return _described(HttpResponse(status=200), _upload(request, upload_id))


def delete(request: TeamRequest, upload_id: UUID) -> HttpResponse:
    """DELETE: throw an upload away. What has become a dataset version stays one."""
    _check_version(request)
    cancel_upload(_upload(request, upload_id))
    response = HttpResponse(status=204)
    response["Tus-Resumable"] = VERSION
    return response


def patch(request: TeamRequest, upload_id: UUID) -> HttpResponse:
    """PATCH: the next bytes. Under an ASGI server only admitted here: tus_stream.py receives them."""
    admission = admit(request, upload_id)
    scope = getattr(request, "scope", None)
    if scope is not None:
        scope[SCOPE_KEY] = admission
        return HttpResponse(status=204)
    try:
        while content := request.read(READ_BYTES):
            admission.write(content)
        return admission.end()
    finally:
        admission.close()


@dataclass
class Admission:
    """A PATCH that may write; `close` it always."""

    receiver: Receiver
    checksum: bytes
    digest: Any

    def write(self, content: bytes | bytearray) -> None:
        """Take bytes; raises what `Receiver.write` does."""
        self.receiver.write(content)
        if self.digest is not None:
            self.digest.update(content)

    def end(self) -> HttpResponse:
        """The answer to a request whose bytes have all come; the last one of a file registers it.

        Raises:
            ApiError: the checksum is another one; none of the request's bytes are kept. Or the file is refused.
            StorageError, UploadGoneError: see Receiver.
        """
        if self.digest is not None and not hmac.compare_digest(self.digest.digest(), self.checksum):
            self.receiver.undo()
            raise ApiError(
                CHECKSUM_MISMATCH, "checksum_mismatch", "The bytes of this request have another checksum than it says.",
                help="They were thrown away: send them again.",
            )  # fmt: skip
        self.receiver.save()
        self.receiver.settle()
        upload = self.receiver.upload
        if upload.error:
            raise ApiError(422, upload.error_code, upload.error, field=upload.error_field or None,
                           help=upload.error_next_step)  # fmt: skip
        return _described(HttpResponse(status=204), upload)

    def break_off(self) -> None:
        """The sender has gone: keep what came, unless it was to be checked as a whole."""
        if self.digest is None:
            self.receiver.save()

    def close(self) -> None:
        self.receiver.close()


def admit(request: TeamRequest, upload_id: UUID) -> Admission:
    """Everything that can be said about a PATCH before its first byte is read."""
    _check_version(request)
    if request.content_type != CONTENT_TYPE:
        raise ApiError(415, "wrong_content_type", f'The content type is "{request.content_type}".',
                       help=f"Send {CONTENT_TYPE}.")  # fmt: skip
    upload = _upload(request, upload_id)
    offset = _number(request, "Upload-Offset")
    algorithm, _, encoded = request.headers.get("Upload-Checksum", "").partition(" ")
    if algorithm and algorithm not in CHECKSUMS:
        raise ApiError(400, "unknown_checksum", f'There is no checksum "{algorithm[:40]}" here.',
                       help=f"Send one of {', '.join(CHECKSUMS)}.")  # fmt: skip
    checksum = _decoded(encoded, "Upload-Checksum")
    if not upload.is_receiving():
        raise ApiError(409, "upload_is_over", f"This upload is {upload.get_state_display().lower()}.")
    receiver = Receiver(upload, offset, keeps_pieces=not algorithm)
    declared = request.headers.get("Content-Length", "")
    if _DIGITS.fullmatch(declared) and int(declared) > receiver.num_missing:
        receiver.close()
        raise TooLargeError(f"More bytes are sent than the {receiver.num_missing:,} that are missing.")
    return Admission(receiver, checksum, CHECKSUMS[algorithm]() if algorithm else None)


def refusal_of(error: Exception) -> tuple[int, ErrorDetail, dict[str, str]]:
    """Status, sentence and headers for what can go wrong with an upload; raises again what cannot."""
    headers = {"Tus-Resumable": VERSION}
    match error:
        case ApiError():
            return error.status, error.detail, headers | error.headers
        case OffsetError():
            sentence = f"The next byte of this upload is number {error.num_received}."
            return (
                409,
                ErrorDetail(code="wrong_offset", message=sentence, help="Ask with HEAD and go on there."),
                headers,
            )
        case UploadGoneError():
            return 404, ErrorDetail(code="not_found", message="This upload was cancelled."), headers
        case PartBusyError():
            detail = ErrorDetail(code=error.code, message=str(error), help="Try again in a few seconds.")
            return 423, detail, headers | {"Retry-After": "2"}
        case ExplainedError():
            detail = ErrorDetail(code=error.code, message=error.message, field=error.field, help=error.next_step)
            return 422, detail, headers
        case StorageError():
            status = {TooLargeError: 413, DiskFullError: 507}.get(type(error), 500)
            return status, ErrorDetail(code=error.code, message=error.strerror or str(error)), headers
        case Http404():
            return 404, ErrorDetail(code="not_found", message="There is no such upload in your team."), headers
    raise error


def read_metadata(text: str) -> dict[str, str]:
    """Upload-Metadata as a dict: "filename cm93cy5qc29ubA==,name RkFR".

    Raises:
        ApiError: it is not of that form, or no UTF-8 text without NUL.
    """
    found: dict[str, str] = {}
    for pair in filter(None, (part.strip() for part in text.split(","))):
        key, _, encoded = pair.partition(" ")
        try:
            value = _decoded(encoded, "Upload-Metadata").decode("utf-8")
        except UnicodeDecodeError:
            _refuse_header("Upload-Metadata")
        if key in found or "\0" in value:
            _refuse_header("Upload-Metadata")
        found[key] = value
    return found


def _decoded(encoded: str, header: str) -> bytes:
    try:
        return base64.b64decode(encoded.strip(), validate=True)
    except (binascii.Error, ValueError):
        _refuse_header(header)


def _refuse_header(header: str) -> NoReturn:
    raise ApiError(400, "invalid_header", f"The header {header} cannot be read.",
                   help="Its values are base64, of UTF-8 text in metadata.") from None  # fmt: skip


def _number(request: HttpRequest, header: str) -> int:
    value = request.headers.get(header, "")
    if not _DIGITS.fullmatch(value):
        raise ApiError(400, "invalid_header", f"The header {header} is missing or no whole number.")
    return int(value)


def _check_version(request: HttpRequest) -> None:
    if request.headers.get("Tus-Resumable") != VERSION:
        raise ApiError(412, "wrong_version", f"This server speaks tus {VERSION}.",
                       help=f"Send the header Tus-Resumable: {VERSION}.", headers={"Tus-Version": VERSION})  # fmt: skip


def _dataset(request: TeamRequest, text: str) -> Dataset | None:
    return get_object_or_404(request.team.datasets, pk=whole_number(text) or 0) if text else None


def _upload(request: TeamRequest, upload_id: UUID) -> Upload:
    """One of the team's that is sent in pieces; what a worker fetches is not anybody's to send."""
    uploads = request.team.uploads.select_related("team", "created_by", "dataset").filter(source={})
    upload: Upload = get_object_or_404(uploads, pk=upload_id)
    if upload.state == UploadState.REFUSED:
        raise ApiError(410, upload.error_code, upload.error, help=upload.error_next_step)
    if upload.is_receiving() and has_expired(upload):
        raise ApiError(410, "expired", "This upload was left alone for too long.", help="Begin it again.")
    return upload


def _described(response: HttpResponse, upload: Upload) -> HttpResponse:
    response["Tus-Resumable"] = VERSION
    response["Cache-Control"] = "no-store"
    response["Upload-Offset"] = str(upload.num_received)
    response["Upload-Length"] = str(upload.num_bytes)
    if upload.is_receiving():
        response["Upload-Expires"] = http_date(expires_at(upload).timestamp())
    return response

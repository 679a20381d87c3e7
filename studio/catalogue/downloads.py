"""The response that sends an adapter, shared by the page and the API."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

from django.core.handlers.asgi import ASGIRequest
from django.http import HttpRequest, HttpResponseBase, HttpResponseNotModified, StreamingHttpResponse
from django.utils.cache import patch_cache_control
from django.utils.http import content_disposition_header, parse_etags

from studio.accounts.models import ApiToken, User, record
from studio.catalogue.bundles import check_files, folder_name, manifest_sha256, stream_zip, zip_size
from studio.catalogue.models import Adapter


def download_response(
    request: HttpRequest, adapter: Adapter, *, user: User, token: ApiToken | None = None
) -> HttpResponseBase:
    """The adapter as a zip, with an audit event; 304 when the sender has it already.

    Raises:
        DamagedAdapterError: a file is missing or has changed; nothing was sent.
    """
    etag = f'"{manifest_sha256(adapter)}"'
    sent = parse_etags(request.headers.get("If-None-Match", ""))
    if etag in sent or f"W/{etag}" in sent:
        return HttpResponseNotModified(headers={"ETag": etag})
    check_files(adapter)
    record("adapter.downloaded", team=adapter.team, user=user, token=token, target=adapter, sha256=etag.strip('"'))
    chunks = stream_zip(adapter)
    # Django would gather a plain iterator in memory before it answers over ASGI.
    body = _in_threads(chunks) if isinstance(request, ASGIRequest) else chunks
    response = StreamingHttpResponse(body, content_type="application/zip")
    response["Content-Disposition"] = content_disposition_header(True, f"{folder_name(adapter)}.zip") or "attachment"
    response["ETag"] = etag
    response["X-Content-Type-Options"] = "nosniff"
    if (size := zip_size(adapter)) is not None:
        response["Content-Length"] = str(size)
    patch_cache_control(response, private=True, no_cache=True)
    return response


async def _in_threads(chunks: Iterator[bytes]) -> AsyncIterator[bytes]:
    """The same chunks, read from disk off the event loop."""
    while (chunk := await asyncio.to_thread(next, chunks, None)) is not None:
        yield chunk

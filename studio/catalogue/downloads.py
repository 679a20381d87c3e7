"""The response that sends an adapter, shared by the page and the API."""

from __future__ import annotations

from django.http import HttpRequest, HttpResponseBase, HttpResponseNotModified
from django.utils.cache import patch_cache_control
from django.utils.http import content_disposition_header, parse_etags

from studio.accounts.models import ApiToken, User, record
from studio.catalogue.bundles import check_files, entries, folder_name, manifest_sha256, stream_zip, zip_size
from studio.catalogue.file_checks import note_check
from studio.catalogue.models import Adapter
from studio.streaming import stream
from workers.errors import DamagedAdapterError


def download_response(
    request: HttpRequest, adapter: Adapter, *, user: User, token: ApiToken | None = None
) -> HttpResponseBase:
    """The adapter as a zip, with an audit event; 304 when the sender has it already.

    Raises:
        DamagedAdapterError: a file is missing or has changed; nothing was sent.
    """
    # Listed once: its length and its bytes must belong together, whoever edits the card meanwhile.
    files = entries(adapter)
    etag = f'"{manifest_sha256(adapter, files)}"'
    sent = parse_etags(request.headers.get("If-None-Match", ""))
    if etag in sent or f"W/{etag}" in sent:
        return HttpResponseNotModified(headers={"ETag": etag})
    try:
        check_files(adapter)
    except DamagedAdapterError as error:
        note_check(adapter, error)
        raise
    record("adapter.downloaded", team=adapter.team, user=user, token=token, target=adapter, sha256=etag.strip('"'))
    response = stream(
        request, stream_zip(adapter, files), content_type="application/zip", num_bytes=zip_size(adapter, files)
    )
    response["Content-Disposition"] = content_disposition_header(True, f"{folder_name(adapter)}.zip") or "attachment"
    response["ETag"] = etag
    response["X-Content-Type-Options"] = "nosniff"
    patch_cache_control(response, private=True, no_cache=True)
    return response

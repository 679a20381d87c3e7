"""304 for a fragment that is asked for again and again and has not changed."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from functools import wraps
from typing import Any

from django.http import HttpRequest, HttpResponse, HttpResponseNotModified
from django.utils.cache import patch_cache_control

# Masked anew in every response, so that it would make each of them another.
_CSRF_TOKEN = re.compile(rb'(name="csrfmiddlewaretoken" value=|"X-CSRFToken": )"[^"]*"')


def unchanged_is_304(view: Callable[..., HttpResponse]) -> Callable[..., HttpResponse]:
    """A view whose fragments htmx polls: 304, which htmx leaves alone, while its content is what the page shows.

    The tag of the content travels as `ETag`, and as `HX-PTag` for htmx's extension of that name, because a browser
    answers a 304 to its scripts with the content of before.
    """

    @wraps(view)
    def conditional(request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponse:
        response = view(request, *args, **kwargs)
        if response.status_code != 200 or "HX-Request" not in request.headers:
            return response
        tag = hashlib.sha256(_CSRF_TOKEN.sub(b"", response.content)).hexdigest()[:32]
        etag = f'W/"{tag}"'
        if request.headers.get("HX-PTag") == tag or etag in request.headers.get("If-None-Match", ""):
            response = HttpResponseNotModified()
        response["ETag"], response["HX-PTag"] = etag, tag
        patch_cache_control(response, private=True, no_cache=True)
        return response

    return conditional

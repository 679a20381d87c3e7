"""/livez: this process answers. /readyz: and its servers answer too. For probes, so without an account.

A probe speaks plain HTTP to an address, so it is not sent to HTTPS (SECURE_REDIRECT_EXEMPT in the settings), and its
host name is not looked at.
"""

from __future__ import annotations

import redis
from django.conf import settings
from django.db import Error as DatabaseError
from django.db import connection
from django.http import HttpRequest, HttpResponsePermanentRedirect, JsonResponse
from django.middleware.common import CommonMiddleware
from django.urls import path
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_safe


@never_cache
@require_safe
def livez(_request: HttpRequest) -> JsonResponse:
    """200 while the process can answer at all."""
    return JsonResponse({"status": "alive"})


@never_cache
@require_safe
def readyz(_request: HttpRequest) -> JsonResponse:
    """200 when Postgres and Redis answer, else 503 and which of them does not."""
    servers = {"postgres": _database_answers(), "redis": _redis_answers()}
    ready = all(servers.values())
    return JsonResponse({"status": "ready" if ready else "not ready", **servers}, status=200 if ready else 503)


def _database_answers() -> bool:
    try:
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1")
    except DatabaseError:
        return False
    return True


def _redis_answers() -> bool:
    try:
        with redis.Redis.from_url(settings.REDIS_URL, socket_timeout=2, socket_connect_timeout=2) as client:
            return bool(client.ping())
    except (redis.RedisError, OSError):
        return False


class HostMiddleware(CommonMiddleware):
    """Django's check of the host name, for everything but probes: those ask whether a process answers, by any name."""

    def process_request(self, request: HttpRequest) -> HttpResponsePermanentRedirect | None:
        if request.path_info in PROBES:
            return None
        return super().process_request(request)


PROBES = frozenset({"/livez", "/readyz"})

urlpatterns = [path("livez", livez, name="livez"), path("readyz", readyz, name="readyz")]

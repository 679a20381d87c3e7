"""Counts attempts to sign in, so that passwords cannot be guessed at speed.

Counters live in Redis and end by themselves. Each attempt counts before the password is looked at: many at the
same moment gain nothing. Without Redis nobody is locked out; the slow password hash remains.
"""

from __future__ import annotations

import hashlib
import logging

import redis
from django.conf import settings

logger = logging.getLogger(__name__)

WINDOW_SECONDS = 15 * 60
MOST_PER_ACCOUNT = 10
MOST_PER_ADDRESS = 50


def seconds_to_wait(username: str, address: str) -> int:
    """Count one attempt; how long this account or address has to wait, 0 when it may go on."""
    limits = {_key("account", username): MOST_PER_ACCOUNT, _key("address", address): MOST_PER_ADDRESS}
    wait = 0
    try:
        with _connect() as client:
            for key, most in limits.items():
                with client.pipeline() as pipe:
                    pipe.set(key, 0, ex=WINDOW_SECONDS, nx=True)
                    pipe.incr(key)
                    pipe.ttl(key)
                    _, count, seconds = pipe.execute()
                if count > most:
                    wait = max(wait, seconds, 1)
    except (redis.RedisError, OSError) as error:
        logger.warning("Attempts to sign in are not counted: Redis does not answer (%s)", type(error).__name__)
    return wait


def forget_attempts(username: str) -> None:
    """After the right password: the account's attempts no longer count. The address's do."""
    try:
        with _connect() as client:
            client.delete(_key("account", username))
    except (redis.RedisError, OSError) as error:
        logger.warning("Attempts to sign in are not forgotten: Redis does not answer (%s)", type(error).__name__)


def _connect() -> redis.Redis:
    return redis.Redis.from_url(settings.REDIS_URL, socket_timeout=1, socket_connect_timeout=1)


def _key(kind: str, value: str) -> str:
    # Hashed: what is typed as a user name is now and then a password.
    return f"login-attempts:{kind}:{hashlib.sha256(value.strip().lower().encode()).hexdigest()}"

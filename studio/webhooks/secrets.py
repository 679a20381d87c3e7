"""Signing secrets of webhooks: made, kept encrypted, and used to sign.

They must be read again to sign, so they are encrypted and not hashed: Fernet of the package `cryptography`, with a key
derived from the studio's own by HKDF (RFC 5869). The signature is that of the Standard Webhooks specification
(github.com/standard-webhooks/standard-webhooks, spec/standard-webhooks.md): HMAC-SHA256 over "id.timestamp.body".
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
from collections.abc import Iterable
from typing import TYPE_CHECKING

from django.conf import settings

if TYPE_CHECKING:
    from cryptography.fernet import Fernet

PREFIX = "whsec_"


class SecretUnreadableError(ValueError):
    """The studio's key has changed since the secret was stored."""


def new_secret() -> str:
    """A fresh signing secret of 256 bits."""
    return PREFIX + base64.b64encode(secrets.token_bytes(32)).decode()


def _cipher() -> Fernet:
    # Imported when a secret is made or used: 6 MiB that a web process without webhooks does without.
    from cryptography.fernet import Fernet
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    derived = HKDF(SHA256(), 32, salt=None, info=b"studio.webhooks.secrets").derive(settings.SECRET_KEY.encode())
    return Fernet(base64.urlsafe_b64encode(derived))


def encrypt(secret: str) -> str:
    """What is stored of a secret."""
    return _cipher().encrypt(secret.encode()).decode()


def decrypt(stored: str) -> str:
    """The secret that was stored; raises SecretUnreadableError."""
    from cryptography.fernet import InvalidToken

    try:
        return _cipher().decrypt(stored.encode()).decode()
    except InvalidToken as error:
        raise SecretUnreadableError(
            "The secret cannot be read: the studio's key has changed. Make a new secret."
        ) from error


def signature(secrets_of_webhook: Iterable[str], message_id: str, timestamp: int, body: bytes) -> str:
    """The header `webhook-signature`: one "v1,..." per secret, separated by spaces."""
    signed = f"{message_id}.{timestamp}.".encode() + body
    keys = (base64.b64decode(secret.removeprefix(PREFIX)) for secret in secrets_of_webhook)
    return " ".join("v1," + base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode() for key in keys)

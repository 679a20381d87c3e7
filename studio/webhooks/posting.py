"""One HTTP request to an address that a person chose, so that it reaches nothing it should not.

The name is resolved once; every address that it has must be public, and the connection goes to the very address that
was looked at, so that a name which answers differently a moment later gains nothing. No redirect is followed, the
whole exchange has one deadline, and of the answer only the beginning is read.
"""

from __future__ import annotations

import ipaddress
import socket
import ssl
import threading
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException
from urllib.parse import urlsplit

from django.conf import settings
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import HTTPError

CONNECT_SECONDS = 5.0
DEADLINE_SECONDS = 15.0
MAX_RESPONSE_BYTES = 4096

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class PostError(RuntimeError):
    """No answer came; the message says why, for people."""


@dataclass(frozen=True)
class Answer:
    """What came back."""

    status: int
    excerpt: str


def checked_url(url: str) -> tuple[str, str, int, str]:
    """(scheme, host, port, path with query) of an address that may be posted to; raises PostError."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise PostError("This is no address. It looks like https://example.org/hook") from None
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise PostError("This is no address. It looks like https://example.org/hook")
    if parts.scheme == "http" and not settings.WEBHOOK_PRIVATE_NETWORKS:
        raise PostError("The address must begin with https.")
    if parts.username or parts.password:
        raise PostError("The address must hold no user name or password.")
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return parts.scheme, parts.hostname, port or (443 if parts.scheme == "https" else 80), path


def is_public(address: Address) -> bool:
    """Whether an address is on the public internet, also behind IPv6 forms that carry an IPv4 address."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return is_public(address.ipv4_mapped)
        # NAT64 (RFC 6052) and 6to4 (RFC 3056) lead to the IPv4 address inside.
        if address in ipaddress.ip_network("64:ff9b::/96"):
            return is_public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        if address.sixtofour is not None:
            return is_public(address.sixtofour)
        if address.teredo is not None:
            return False
    return address.is_global and not address.is_multicast


def resolve(host: str, port: int) -> str:
    """The address to connect to; raises PostError when the name has none, or one that is not public."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise PostError(f"The name {host} cannot be resolved.") from None
    addresses = [str(one[4][0]) for one in found]
    if not settings.WEBHOOK_PRIVATE_NETWORKS:
        for one in addresses:
            if not is_public(ipaddress.ip_address(one.partition("%")[0])):
                raise PostError(
                    f"{host} leads into a private network, where webhooks are not sent. Whoever runs the studio can"
                    " allow it with STUDIO_WEBHOOK_PRIVATE_NETWORKS."
                )
    return addresses[0]


def post(url: str, body: bytes, headers: dict[str, str]) -> Answer:
    """Post a body once and give the beginning of the answer, whatever its status.

    Raises:
        PostError: the address is refused, does not answer, or not within DEADLINE_SECONDS.
    """
    scheme, host, port, path = checked_url(url)
    address = resolve(host, port)
    connection: HTTPConnection
    if scheme == "https":
        connection = HTTPSConnection(
            address, port, timeout=CONNECT_SECONDS, ssl_context=ssl.create_default_context(),
            server_hostname=host, assert_hostname=host,
        )  # fmt: skip
    else:
        connection = HTTPConnection(address, port, timeout=CONNECT_SECONDS)
    late = threading.Event()

    def end() -> None:
        late.set()
        if connection.sock is not None:
            with suppress(OSError):
                connection.sock.shutdown(socket.SHUT_RDWR)

    deadline = threading.Timer(DEADLINE_SECONDS, end)
    deadline.daemon = True
    deadline.start()
    name = f"[{host}]" if ":" in host else host
    shown = name if port == {"http": 80, "https": 443}[scheme] else f"{name}:{port}"
    try:
        connection.connect()
        if connection.sock is not None:
            connection.sock.settimeout(DEADLINE_SECONDS)
        connection.request("POST", path, body=body, headers={"Host": shown, **headers}, preload_content=False)
        response = connection.getresponse()
        content = response.read(MAX_RESPONSE_BYTES, decode_content=False)
        if late.is_set():
            raise PostError(f"{host} did not answer within {DEADLINE_SECONDS:.0f} s.")
        return Answer(response.status, content.decode("utf-8", "replace").replace("\0", ""))
    except (HTTPError, HTTPException, OSError) as error:
        if late.is_set():
            raise PostError(f"{host} did not answer within {DEADLINE_SECONDS:.0f} s.") from error
        raise PostError(f"{host} did not answer: {str(error).replace(address, host)[:200]}") from error
    finally:
        deadline.cancel()
        connection.close()

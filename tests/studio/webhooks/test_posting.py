"""A webhook reaches nothing but the public internet, unless the studio says so."""

from __future__ import annotations

import ipaddress
import socket
import threading
from typing import Any

import pytest

from studio.webhooks import posting
from studio.webhooks.posting import PostError, checked_url, is_public, post, resolve
from tests.studio.webhooks.receivers import receiving


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
     "::1", "fe80::1", "fc00::1", "::ffff:127.0.0.1", "::ffff:169.254.169.254", "64:ff9b::7f00:1", "2002:7f00:1::",
     "ff02::1", "::"],
)  # fmt: skip
def test_an_address_of_a_private_network_is_not_public(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", ["93.184.216.34", "2606:2800:220:1::1", "::ffff:93.184.216.34"])
def test_an_address_of_the_internet_is(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("host", ["localhost", "127.1", "2130706433", "0x7f000001", "::1"])
def test_a_name_that_leads_home_is_refused_in_every_spelling(host: str) -> None:
    with pytest.raises(PostError, match=r"private network|cannot be resolved"):
        resolve(host, 443)


def test_one_private_address_among_public_ones_is_enough_to_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, 443)) for ip in ("93.184.216.34", "10.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    with pytest.raises(PostError, match="private network"):
        resolve("two.example.org", 443)


def test_the_connection_goes_to_the_address_that_was_looked_at(monkeypatch: pytest.MonkeyPatch, settings: Any) -> None:
    settings.WEBHOOK_PRIVATE_NETWORKS = True
    asked: list[str] = []
    real = socket.getaddrinfo

    def answers_once(host: str, port: Any, *args: Any, **more: Any) -> Any:
        asked.append(host)
        return real("127.0.0.1" if host == "rebinding.test" else host, port, *args, **more)

    monkeypatch.setattr(socket, "getaddrinfo", answers_once)
    with receiving() as receiver:
        port = receiver.server.server_address[1]
        assert post(f"http://rebinding.test:{port}/", b"{}", {}).status == 200
        assert receiver.requests[0][1]["host"] == f"rebinding.test:{port}"
    assert asked.count("rebinding.test") == 1


@pytest.mark.parametrize("url", ["ftp://x.org/", "https://", "http://x.org/", "https://a:b@x.org/", "https://x:99999/"])
def test_what_is_no_safe_address_is_refused(url: str) -> None:
    with pytest.raises(PostError):
        checked_url(url)


def test_a_server_that_never_answers_ends_at_the_deadline(monkeypatch: pytest.MonkeyPatch, settings: Any) -> None:
    settings.WEBHOOK_PRIVATE_NETWORKS = True
    monkeypatch.setattr(posting, "DEADLINE_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        taken: list[socket.socket] = []
        threading.Thread(target=lambda: taken.append(silent.accept()[0]), daemon=True).start()
        with pytest.raises(PostError, match="did not answer"):
            post(f"http://127.0.0.1:{silent.getsockname()[1]}/", b"{}", {})

"""The web process as the image starts it, and whom it takes a visitor for."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import redis
from django.conf import settings

from studio.accounts.models import LoginLink, User
from studio.accounts.throttling import MOST_PER_ADDRESS, _key, seconds_to_wait
from studio.serving import behind_one_proxy
from tests.processes import reserved_ports, test_environment, wait_for


@contextmanager
def web_process(log_path: Path, **variables: str) -> Iterator[httpx.Client]:
    """`python -m studio.serving HOST PORT` and a client of it."""
    with reserved_ports(1) as [port], log_path.open("wb") as log:
        web = subprocess.Popen(
            [sys.executable, "-m", "studio.serving", "127.0.0.1", str(port)],
            cwd=settings.ROOT, env=test_environment() | {"STUDIO_DEBUG": "1"} | variables, stdout=log, stderr=log,
        )  # fmt: skip
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
                wait_for(lambda: _answers(client), what="the start")
                yield client
        finally:
            web.terminate()
            web.wait(60)


def _answers(client: httpx.Client) -> bool:
    try:
        return client.get("/livez").status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.django_db(transaction=True)
def test_a_one_time_link_is_not_written_to_the_log(bob: User, tmp_path: Path) -> None:
    secret = LoginLink.create_for(bob)
    with web_process(tmp_path / "web.log") as client:
        assert client.get(f"/login/link/{secret}/").status_code == 200
    assert secret not in (tmp_path / "web.log").read_text()


@pytest.fixture
def exhausted() -> Iterator[Callable[[str], None]]:
    """Uses up an address's attempts to sign in, and gives them back after the test."""
    addresses: list[str] = []

    def exhaust(address: str) -> None:
        addresses.append(address)
        for number in range(MOST_PER_ADDRESS):
            seconds_to_wait(f"{address}-{number}", address)

    yield exhaust
    with redis.Redis.from_url(settings.REDIS_URL) as client:
        for address in addresses:
            client.delete(_key("address", address))


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize(("behind", "exhausted_address"), [("true", "203.0.113.1"), ("false", "127.0.0.1")])
def test_the_throttle_counts_each_visitor_of_the_proxy_alone(
    tmp_path: Path, exhausted: Callable[[str], None], behind: str, exhausted_address: str
) -> None:
    exhausted(exhausted_address)
    with web_process(tmp_path / "web.log", STUDIO_BEHIND_PROXY=behind) as client:
        client.get("/login/")
        statuses = {
            # What a visitor writes there comes first and makes no new visitor.
            forwarded: client.post(
                "/login/", data={"username": "nobody", "password": "wrong"},
                headers={"X-Forwarded-For": forwarded, "X-CSRFToken": client.cookies["csrftoken"]},
            ).status_code
            for forwarded in ("192.0.2.9, 203.0.113.1", "192.0.2.9, 203.0.113.2")
        }  # fmt: skip
    # Without a proxy the header is the visitor's own invention, and both are the one at the other end.
    assert list(statuses.values()) == ([429, 422] if behind == "true" else [429, 429])


@pytest.mark.parametrize(
    ("headers", "client"),
    [
        ([], "10.0.0.1"),
        ([b"203.0.113.5"], "203.0.113.5"),
        ([b"1.1.1.1, 203.0.113.5"], "203.0.113.5"),
        ([b"1.1.1.1", b"203.0.113.5"], "203.0.113.5"),
        ([b"2001:DB8::5"], "2001:db8::5"),
        ([b"unknown"], "10.0.0.1"),
    ],
)
def test_the_visitor_is_the_one_whom_the_proxy_saw(headers: list[bytes], client: str) -> None:
    seen: list[tuple[str, int]] = []

    async def application(scope: dict, receive: object, send: object) -> None:
        seen.append(scope["client"])

    scope = {"type": "http", "client": ("10.0.0.1", 5), "headers": [(b"x-forwarded-for", value) for value in headers]}
    asyncio.run(behind_one_proxy(application)(scope, None, None))
    assert [host for host, _ in seen] == [client]

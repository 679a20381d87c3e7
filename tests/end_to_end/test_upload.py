"""An upload in a real browser: paused, its connection cut, its server killed, its page reloaded, cancelled."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from studio.accounts.models import LoginLink, User
from studio.datasets.models import DatasetVersion, Upload
from tests.end_to_end.browsing import CHROMIUM, SECOND, Browser, open_browser
from tests.faults.cutting import TcpProxy
from tests.processes import wait_for
from tests.web_server import WebServer, web_server

pytestmark = [pytest.mark.browser, pytest.mark.django_db(transaction=True)]

# Slow enough for a person, and for a test, to press something meanwhile.
BYTES_PER_SECOND = 1.0 * 1024**2
# Chromium tells of a request that came before the server had noticed that the one before it was cut.
CAME_TOO_SOON = ("409 (Conflict)", "423 (Locked)")


@pytest.fixture
def server(transactional_db: None, tmp_path: Path) -> Iterator[WebServer]:
    if not CHROMIUM:
        pytest.skip("NO CHROMIUM: the browser tests are skipped. Install chromium to run them.")
    with web_server(tmp_path) as server:
        yield server


@pytest.fixture
def way(server: WebServer) -> Iterator[TcpProxy]:
    """Between the browser and the server."""
    proxy = TcpProxy(server.port)
    yield proxy
    proxy.close()


@pytest.fixture
def browser(way: TcpProxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[Browser]:
    monkeypatch.setenv("DJANGO_ALLOW_ASYNC_UNSAFE", "1")  # as in conftest.py
    with open_browser(way.root) as browser:
        yield browser


@pytest.fixture
def file(tmp_path: Path) -> Path:
    line = json.dumps({"prompt": "What is it?", "completion": "x" * 4000}) + "\n"
    path = tmp_path / "large.jsonl"
    path.write_text(line * 12000)
    return path


class Network:
    """How fast the page may send. One for a page: of several, the slowest counts."""

    def __init__(self, page: Page) -> None:
        self.session = page.context.new_cdp_session(page)
        self.session.send("Network.enable")
        self.may_send(BYTES_PER_SECOND)

    def may_send(self, bytes_per_second: float) -> None:
        """Bytes per second from now on; -1: as many as can be."""
        conditions = {"offline": False, "latency": 0, "downloadThroughput": -1, "uploadThroughput": bytes_per_second}
        self.session.send("Network.emulateNetworkConditions", conditions)


def begin(browser: Browser, file: Path, network: Network | None = None) -> Network:
    page = browser.page
    page.goto(f"{browser.root}/datasets/upload/")
    network = network or Network(page)
    page.set_input_files("input[type=file]", file)
    page.get_by_label("Name").fill("large")
    page.get_by_role("button", name="Upload", exact=True).click()
    return network


def complaints_but(browser: Browser, *expected: str) -> list[str]:
    """What the browser complains of, but for what may be expected."""
    return [one for one in browser.complaints if not any(text in one for text in expected)]


def expect_progress(page: Page) -> None:
    expect(page.locator("[data-progress-text]")).to_have_text(re.compile(r"[\d.]+ MB of 46 MB, [\d.]+ MB/s, .* left"))


def expect_stored(browser: Browser, file: Path) -> None:
    browser.page.wait_for_url("**/datasets/*/v/1/", timeout=120 * SECOND)
    expect(browser.page.locator("h1")).to_contain_text("large")
    assert DatasetVersion.objects.get().path().read_bytes() == file.read_bytes()


def test_an_upload_goes_on_after_a_pause_a_cut_connection_and_a_killed_server(
    server: WebServer, way: TcpProxy, browser: Browser, bob: User, file: Path
) -> None:
    page = browser.page
    browser.sign_in(LoginLink.create_for(bob))
    network = begin(browser, file)
    expect_progress(page)
    page.get_by_role("button", name="Pause").click()
    expect(page.locator("[data-progress-text]")).to_contain_text("Paused at")
    page.get_by_role("button", name="Go on").click()
    expect_progress(page)

    way.cut()
    expect(page.locator("[data-progress-text]")).to_contain_text("The connection broke")
    way.mend()
    expect_progress(page)
    before = Upload.objects.get().num_received
    wait_for(lambda: page.wait_for_timeout(50) or Upload.objects.get().num_received > before, what="going on")

    # The browser may tell of it, or send the request again by itself, into the queue of the next server.
    server.kill()
    server.start()
    network.may_send(-1)
    expect_stored(browser, file)
    # It tells of every request that broke, too; nothing else may be said, a breach of the CSP least of all.
    assert complaints_but(browser, "net::ERR", *CAME_TOO_SOON) == []


def test_an_upload_that_stalls_says_so_and_tries_again_until_it_gets_on(
    way: TcpProxy, browser: Browser, bob: User, file: Path
) -> None:
    page = browser.page
    browser.sign_in(LoginLink.create_for(bob))
    network = begin(browser, file)
    expect_progress(page)
    received = Upload.objects.filter(num_received__gt=0)
    wait_for(lambda: page.wait_for_timeout(50) or received.exists(), what="the first bytes")
    # Nobody is told that the connection is dead: it only takes nothing any more.
    way.stick()
    expect(page.locator("[data-progress-text]")).to_contain_text("No bytes for 10 s, trying again")
    assert Upload.objects.get().num_received > 0
    way.mend()
    expect_progress(page)
    network.may_send(-1)
    expect_stored(browser, file)


def test_a_reloaded_page_goes_on_with_the_same_file_and_a_cancelled_one_is_gone(
    browser: Browser, bob: User, file: Path
) -> None:
    page = browser.page
    browser.sign_in(LoginLink.create_for(bob))
    network = begin(browser, file)
    received = Upload.objects.filter(num_received__gt=0)
    wait_for(lambda: page.wait_for_timeout(50) or received.exists(), what="the first bytes")
    page.reload()
    expect(page.get_by_role("heading", name="Not finished")).to_be_visible()
    expect(page.locator("main")).to_contain_text("Choose the same file again")
    before = Upload.objects.get()
    begin(browser, file, network)
    expect_progress(page)
    assert Upload.objects.get().pk == before.pk
    page.get_by_role("button", name="Cancel", exact=True).click()
    expect(page.locator("[data-progress-text]")).to_contain_text("Cancelled")
    wait_for(lambda: page.wait_for_timeout(50) or not Upload.objects.exists(), what="the end of the upload")

    begin(browser, file, network).may_send(-1)
    expect_stored(browser, file)
    assert complaints_but(browser, *CAME_TOO_SOON) == []


def test_what_is_refused_is_said_beside_the_form(browser: Browser, bob: User, tmp_path: Path, file: Path) -> None:
    page = browser.page
    browser.sign_in(LoginLink.create_for(bob))
    picture = tmp_path / "rows.jsonl"
    picture.write_bytes(b"\x89PNG\r\n\x1a\n" + b"x" * 100)
    page.goto(f"{browser.root}/datasets/upload/")
    page.set_input_files("input[type=file]", picture)
    page.get_by_role("button", name="Upload", exact=True).click()
    expect(page.get_by_role("alert")).to_contain_text("is a PNG image")
    expect(page.get_by_role("button", name="Upload", exact=True)).to_be_enabled()
    page.set_input_files("input[type=file]", file)
    page.get_by_role("button", name="Upload", exact=True).click()
    expect_stored(browser, file)


def test_without_a_script_the_form_sends_the_file_at_once(
    browser: Browser, server: WebServer, bob: User, file: Path
) -> None:
    plain = browser.page.context.browser.new_context(java_script_enabled=False)  # type: ignore[union-attr]
    without = Browser(plain.new_page(), server.root)
    without.sign_in(LoginLink.create_for(bob))
    without.page.goto(f"{server.root}/datasets/upload/")
    without.page.set_input_files("input[type=file]", file)
    without.page.get_by_label("Name").fill("large")
    expect(without.page.get_by_role("button", name="Pause")).to_be_hidden()
    without.page.get_by_role("button", name="Upload", exact=True).click()
    expect_stored(without, file)
    assert not Upload.objects.exists()

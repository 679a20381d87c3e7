"""What a person does in the browser, step by step."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect, sync_playwright

CHROMIUM = os.environ.get("CHROMIUM") or next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
]  # fmt: skip
SECOND = 1000.0
# What is waited for comes within moments; a machine that also runs Postgres, Redis and workers may take longer.
expect.set_options(timeout=60 * SECOND)


def require_chromium() -> None:
    """Ends a test that cannot drive a browser: skipped on a person's machine, failed in CI."""
    if not CHROMIUM:
        if os.environ.get("CI"):
            pytest.fail("No Chromium, and CI is set: the browser tests must run there.")
        pytest.skip("NO CHROMIUM: the browser tests are skipped. Install chromium to run them.")


class Browser:
    """A signed-out browser window, and everything that its console complained about."""

    def __init__(self, page: Page, root: str) -> None:
        self.page, self.root = page, root
        self.complaints: list[str] = []
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("console", lambda said: self.complaints.append(said.text) if said.type == "error" else None)
        page.set_default_timeout(60 * SECOND)

    def sign_in(self, secret: str) -> None:
        """Open a one-time link and press its button."""
        self.page.goto(f"{self.root}/login/link/{secret}/")
        self.page.locator("main form button").first.click()
        expect(self.page.locator("h1")).to_be_visible()

    def upload(self, file: Path, name: str, *, seconds: float = 120) -> None:
        """Upload a dataset and wait until it is inspected; ends on the dataset's page."""
        self.page.goto(f"{self.root}/datasets/upload/")
        self.page.set_input_files("input[type=file]", file)
        self.page.fill("[name=name]", name)
        self.page.get_by_role("button", name="Upload").click()
        expect(self.page.get_by_text("rows usable")).to_be_visible(timeout=seconds * SECOND)

    def fill_new_job(self, name: str, method: str, **settings: str) -> None:
        """From a dataset's page to the filled form, its estimate up to date."""
        self.page.get_by_role("link", name="New job").first.click()
        self.page.locator(f"[name=method][value={method}]").check()
        self.page.fill("[name=name]", name)
        # Folded settings are real form fields: open every fold, as a person would who wants to change them.
        self.page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
        for key, value in settings.items():
            self._set(key.replace("__", "."), value)
        self.page.get_by_role("button", name="Update estimate").click()
        expect(self.page.locator("#this-run")).to_contain_text("to train")

    def _set(self, name: str, value: str) -> None:
        field = self.page.locator(f"[name='{name}']")
        if field.evaluate("one => one.tagName") == "SELECT":
            field.select_option(value)
        else:
            field.fill(value)

    def start_job(self) -> str:
        """Press Start; gives the job's address."""
        self.page.get_by_role("button", name="Start job").click()
        self.page.wait_for_url("**/jobs/*-*/")
        return self.page.url

    def wait_until_done(self, *, seconds: float) -> None:
        """Watch the job's page, without reloading, until it says Done."""
        expect(self.page.get_by_text("Done in")).to_be_visible(timeout=seconds * SECOND)


@contextmanager
def open_browser(root: str, *, dark: bool = False, width: int = 1280, height: int = 900) -> Iterator[Browser]:
    """Headless Chromium on one page."""
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=ARGUMENTS)
        context = chromium.new_context(
            viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light", accept_downloads=True
        )
        yield Browser(context.new_page(), root)
        chromium.close()

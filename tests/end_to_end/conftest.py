"""The whole studio as a visitor meets it: a web server, both workers and a browser."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.browsing import Browser, open_browser, require_chromium
from tests.end_to_end.site import running_site


@pytest.fixture
def site(transactional_db: None, tmp_path: Path) -> Iterator[str]:
    """The address of a running studio over the test's database."""
    with running_site(tmp_path) as root:
        yield root


@pytest.fixture
def browser(site: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Browser]:
    """A browser on the running studio. Nothing may have complained in its console at the end."""
    # Playwright keeps an event loop running in this thread, which is not one that Django's queries could block.
    monkeypatch.setenv("DJANGO_ALLOW_ASYNC_UNSAFE", "1")
    require_chromium()
    with open_browser(site) as browser:
        yield browser
    assert browser.complaints == []

"""A dataset's rows in a browser: found while one types, filtered, and the address is that of what is shown."""

from __future__ import annotations

import re
from pathlib import Path

import orjson
import pytest
from playwright.sync_api import expect

from studio.accounts.models import LoginLink, User
from tests.end_to_end.browsing import SECOND, Browser

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.browser]


def test_rows_are_found_while_one_types_and_the_address_follows(browser: Browser, bob: User, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"What is {n}?", "completion": f"It is {n}, Größe {n % 7}."} for n in range(120)]
    file.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    browser.sign_in(LoginLink.create_for(bob))
    browser.upload(file, "rows")
    page = browser.page
    search, ready = page.get_by_label("Search", exact=True), page.get_by_role("link", name="Look through them")
    # The first rows are shown until a worker has prepared all of them; nobody is sent away from what they read.
    expect(search.or_(ready).first).to_be_visible(timeout=60 * SECOND)
    if not search.count():
        ready.click()
    expect(search).to_be_visible()
    page.wait_for_load_state("load")
    search.fill("grösse 3")
    expect(page.get_by_text("17 of 120 rows fit")).to_be_visible()
    expect(page).to_have_url(re.compile(r"/v/1/\?q=gr%C3%B6sse\+3$"))
    expect(page.locator("mark").first).to_have_text("Größe 3")
    page.get_by_label("Order").select_option("longest")
    expect(page).to_have_url(re.compile(r"order=longest"))
    expect(page.locator("tbody tr").first).to_contain_text("102")
    page.get_by_role("link", name="102", exact=True).click()
    expect(page.get_by_role("heading", name="Line 102")).to_be_visible()
    expect(page.get_by_text("Back to the rows that fit")).to_be_visible()
    page.get_by_role("link", name="Next row").click()
    expect(page.get_by_role("heading", name="Line 109")).to_be_visible()

"""A split, made and chosen in the browser: a worker freezes it, and New job offers it with its dataset."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from playwright.sync_api import expect

from studio.accounts.models import LoginLink, Team, User
from studio.catalogue.models import BaseModel
from tests.end_to_end.browsing import SECOND, Browser
from tests.factories import make_dataset_version
from tests.workers.scans.planting import clean_rows, write

pytestmark = [pytest.mark.browser, pytest.mark.django_db(transaction=True)]


def test_a_split_is_made_downloaded_and_offered_to_a_new_job(
    browser: Browser, team: Team, bob: User, base_model: BaseModel, tmp_path: Path
) -> None:
    other = make_dataset_version(team, bob, name="Other", num_rows=60)
    rows = [{**row, "topic": f"topic {number % 3}"} for number, row in enumerate(clean_rows(90))]
    page = browser.page
    browser.sign_in(LoginLink.create_for(bob))
    browser.upload(write(tmp_path / "rows.jsonl", rows), "Scenes")

    page.get_by_role("link", name="Splits").click()
    expect(page.get_by_text("There is none yet.")).to_be_visible()
    page.wait_for_load_state("load")
    page.fill("[name=test]", "0.2")
    page.select_option("[name=stratify_column]", "topic")
    page.fill("[name=name]", "By topic")
    page.get_by_role("button", name="Make the split").click()
    # The page waits for the worker by itself.
    expect(page.locator("#part-test")).to_contain_text("18 rows", timeout=120 * SECOND)
    expect(page.locator("#part-test")).to_contain_text("Too small to say anything")
    page.wait_for_load_state("load")
    with page.expect_download() as download:
        page.get_by_role("link", name="Test as JSON Lines").click()
    assert [len(json.loads(line)) for line in download.value.path().read_text().splitlines()] == [1] * 18
    page.get_by_role("button", name="Make it the default").click()
    expect(page.get_by_role("button", name="Make it no default")).to_be_visible()
    page.wait_for_load_state("load")

    page.get_by_role("link", name="New job", exact=True).click()
    chosen = page.locator("#id_dataset_split option:checked")
    expect(chosen).to_have_text("By topic (63 / 9 / 18)")
    expect(page.locator("#this-run")).to_contain_text("63 to train, 27 held out")
    page.wait_for_load_state("load")
    # Another dataset has other splits, and the way back brings the default one again.
    page.select_option("[name=dataset_version]", str(other.pk))
    expect(page.locator("#split-choice")).to_contain_text("A share of the rows is held out")
    expect(page.locator("#this-run")).to_contain_text("54 to train, 6 held out")
    page.select_option("[name=dataset_version]", label="Scenes v1 (90 rows)")
    expect(chosen).to_have_text("By topic (63 / 9 / 18)")
    page.select_option("[name=dataset_split]", "")
    expect(page.locator("#this-run")).to_contain_text("81 to train, 9 held out")
    expect(chosen).to_have_text("Hold out a share, as set under Advanced")

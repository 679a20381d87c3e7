"""Several datasets chosen for one job in a browser: rows come and go in place, and each one's share is shown."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import expect

from jobs.models import Job
from studio.accounts.models import LoginLink, Team, User
from studio.catalogue.models import BaseModel
from tests.end_to_end.browsing import Browser
from tests.factories import make_dataset_version
from tests.tiny import colour_rows

pytestmark = [pytest.mark.browser, pytest.mark.django_db(transaction=True)]


def test_datasets_are_added_weighed_and_removed_in_place(
    browser: Browser, team: Team, alice: User, base_model: BaseModel
) -> None:
    main = make_dataset_version(team, alice, name="Support", num_rows=60)
    make_dataset_version(team, alice, name="FAQ", rows=colour_rows(20))
    page = browser.page
    browser.sign_in(LoginLink.create_for(alice))
    page.goto(f"{browser.root}/jobs/new/?dataset={main.pk}&base_model={base_model.pk}")
    expect(page.locator("#this-run")).to_contain_text("to train")
    page.wait_for_load_state()
    page.evaluate("window.neverReloaded = true")
    page.fill("[name=name]", "mixture")
    for number in (2, 3):
        page.get_by_role("button", name="Add a dataset").click()
        expect(page.get_by_label(f"Dataset {number}", exact=True)).to_be_visible()
    page.get_by_label("Dataset 3", exact=True).select_option(label="FAQ v1 (20 rows)")
    page.get_by_label("Weight of dataset 3").fill("0.5")
    expect(page.locator("#mix-share-1")).to_contain_text("33.3 % of an epoch (27 rows); 1.5 passes")
    expect(page.locator("#this-run")).to_contain_text("FAQ v1 33.3 %, 27 rows an epoch")
    page.get_by_role("button", name="Remove dataset 2").click()
    expect(page.get_by_label("Dataset 3", exact=True)).to_have_count(0)
    expect(page.get_by_label("Weight of dataset 2")).to_have_value("0.5")
    expect(page.locator("#mix-share-0")).to_contain_text("33.3 % of an epoch")
    assert page.evaluate("window.neverReloaded") is True
    expect(page.locator("[name=name]")).to_have_value("mixture")

    # Enter in a field starts the job: no button of a dataset's row stands in the way.
    page.get_by_label("Weight of dataset 2").press("Enter")
    page.wait_for_url(re.compile(r"/jobs/[0-9a-f-]{36}/$"))
    job = Job.objects.get()
    assert [(one.dataset_version.dataset.name, one.weight) for one in job.mix.all()] == [("FAQ", 0.5)]
    expect(page.locator("#job-header")).to_contain_text("FAQ v1 (weight 0.5)")

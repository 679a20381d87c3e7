"""A session that ends while a form is open: sign in in another tab, and go on where one was."""

from __future__ import annotations

import pytest
from django.contrib.sessions.models import Session
from playwright.sync_api import expect

from studio.accounts.models import LoginLink, User
from studio.catalogue.models import BaseModel
from tests.end_to_end.browsing import Browser

pytestmark = [pytest.mark.browser, pytest.mark.django_db(transaction=True)]


def test_a_form_goes_on_after_signing_in_in_another_tab(browser: Browser, bob: User, base_model: BaseModel) -> None:
    browser.sign_in(LoginLink.create_for(bob))
    page = browser.page
    page.goto(f"{browser.root}/jobs/new/")
    page.fill("[name=name]", "typed")
    Session.objects.all().delete()
    page.locator("[name=method][value=dora]").check()
    expect(page.locator("#messages")).to_contain_text("You were signed out.")
    expect(page.locator("#this-run")).to_be_visible()
    with page.expect_popup() as popup:
        page.get_by_role("link", name="Sign in in another tab").click()
    expect(popup.value.get_by_role("heading", name="Sign in").first).to_be_visible()
    popup.value.goto(f"{browser.root}/login/link/{LoginLink.create_for(bob)}/")
    popup.value.locator("main form button").first.click()
    expect(popup.value.get_by_role("link", name="Datasets").first).to_be_visible()
    popup.value.close()
    with page.expect_response("**/jobs/estimate/") as estimate:
        page.locator("[name=method][value=rslora]").check()
    assert estimate.value.status == 200
    with page.expect_navigation() as sent:
        page.get_by_role("button", name="Update estimate").click()
    assert sent.value is not None
    assert sent.value.status == 200
    assert page.input_value("[name=name]") == "typed"
    expect(page.locator("[name=method][value=rslora]")).to_be_checked()
    # The refused estimate is the one thing that the console may complain about.
    assert all("403" in complaint for complaint in browser.complaints)
    assert len(browser.complaints) == 1
    browser.complaints.clear()

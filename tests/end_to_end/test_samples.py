"""An adapter's samples in a browser: filtered without a reload, and chosen blind with three keys."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import expect

from studio.accounts.models import LoginLink, Team, User
from studio.catalogue import blind
from studio.catalogue.models import SampleChoice
from tests.end_to_end.browsing import Browser
from tests.factories import make_adapter, make_result, make_sample

pytestmark = [pytest.mark.browser, pytest.mark.django_db(transaction=True)]


def test_samples_are_filtered_in_place_and_chosen_blind_by_keys(browser: Browser, team: Team, bob: User) -> None:
    rows = [
        make_sample(
            line, reference="one two", base_answer="one two" if line % 2 else "none", adapter_answer=f"one {line}"
        )
        for line in range(1, 61)
    ]
    adapter = make_adapter(team, bob, result=make_result(samples=rows))
    page = browser.page
    browser.sign_in(LoginLink.create_for(bob))
    page.goto(f"{browser.root}{adapter.get_absolute_url()}")
    page.evaluate("window.neverReloaded = true")
    samples = page.locator("#samples")
    samples.get_by_role("link", name=re.compile("Regressions")).click()
    expect(page).to_have_url(re.compile(r"\?show=regressions$"))
    expect(samples.locator("details")).to_have_count(20)
    samples.get_by_role("link", name="Show more").click()
    expect(samples.locator("details")).to_have_count(30)
    samples.get_by_label("Words that differ").select_option("base")
    expect(samples.locator("ins.diff-added").first).to_be_visible()
    assert page.evaluate("window.neverReloaded") is True

    samples.get_by_role("link", name="Choose blind").click()
    for number, key in enumerate("abs", start=1):
        # A key pressed before the page and its scripts are there presses nothing.
        expect(page.locator("[data-choice-key]").first).to_be_visible()
        page.wait_for_load_state()
        page.keyboard.press(key)
        expect(page.locator("#blind-revealed")).to_contain_text(f"Line {number}:")
    found = [choice.preferred for choice in SampleChoice.objects.order_by("sample__line")]
    first, second, _third = adapter.samples.order_by("line")[:3]
    assert found == [
        "adapter" if blind.adapter_is_a(bob, first.pk) else "base",
        "base" if blind.adapter_is_a(bob, second.pk) else "adapter",
        "neither",
    ]

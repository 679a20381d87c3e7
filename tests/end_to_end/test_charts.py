"""The curves of a job on a narrow screen: the legend takes the lines that it needs, and covers nothing."""

from __future__ import annotations

import re

import pytest
from django.utils import timezone
from playwright.sync_api import Page, expect

from jobs.models import MetricPoint
from studio.accounts.models import LoginLink, Team, User
from tests.end_to_end.browsing import Browser
from tests.factories import make_adapter, make_job_for

pytestmark = [pytest.mark.browser, pytest.mark.django_db(transaction=True)]


def covered(page: Page) -> list[str]:
    """The charts whose legend ends below their box."""
    return page.evaluate(
        """[...document.querySelectorAll("[data-chart]")].filter((box) =>
            box.querySelector(".u-legend").getBoundingClientRect().bottom > box.getBoundingClientRect().bottom + 1
        ).map((box) => box.dataset.chart)"""
    )


def test_the_legends_of_a_jobs_curves_cover_nothing_on_a_phone(
    browser: Browser, team: Team, alice: User, data_dir: object
) -> None:
    job = make_job_for(make_adapter(team, alice), attempt=1, started_at=timezone.now(), finished_at=timezone.now())
    for step in range(1, 40):
        MetricPoint.objects.create(
            job=job, attempt=1, step=step, loss=3.123 / step, validation_loss=3 / step, learning_rate=1e-4,
            grad_norm=1.0, tokens_per_second=1000, at=timezone.now(),
        )  # fmt: skip
    page = browser.page
    page.set_viewport_size({"width": 390, "height": 800})
    browser.sign_in(LoginLink.create_for(alice))
    page.goto(browser.root + job.get_absolute_url())
    legends = page.locator("[data-chart] .u-legend")
    expect(legends).to_have_count(2)
    page.wait_for_load_state("load")
    assert covered(page) == []
    # With figures in it, it needs more room still.
    page.locator("[data-chart=loss] .u-over").hover()
    expect(legends.first).to_contain_text(re.compile(r"Validation\s*\d"))
    assert covered(page) == []
    page.set_viewport_size({"width": 1280, "height": 800})
    page.wait_for_function("document.querySelector('[data-chart=loss] .uplot').offsetWidth > 500")
    assert covered(page) == []

"""Pause, resume and stop a job that really trains, on a page that is never reloaded."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from playwright.sync_api import expect

from jobs.models import Job, JobState
from studio.accounts.models import LoginLink, User
from tests.end_to_end.browsing import SECOND, Browser
from tests.faults.conftest import queue, version  # noqa: F401 fixtures: jobs that really train

pytestmark = [pytest.mark.browser, pytest.mark.django_db(transaction=True)]

LONG = 300 * SECOND


def test_pause_then_resume_then_stop_and_keep_without_a_reload(
    browser: Browser,
    bob: User,
    queue: Callable[..., Job],  # noqa: F811
) -> None:
    page = browser.page
    browser.sign_in(LoginLink.create_for(bob))
    job = queue(max_steps=5000, epochs=100, checkpoint_every_steps=1000)
    page.goto(f"{browser.root}{job.get_absolute_url()}")
    page.evaluate("window.neverReloaded = true")
    header, messages = page.locator("#job-header"), page.locator("#messages")
    expect(page.locator("#job-progress")).to_contain_text(re.compile(r"Step\s+[1-9]"), timeout=LONG)

    # Discarding is asked about first, and Escape goes back.
    page.get_by_role("button", name="Stop and discard").click()
    expect(page.get_by_role("button", name="Yes, discard it")).to_be_visible()
    expect(page.get_by_role("dialog")).to_contain_text("steps is lost")
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Yes, discard it")).to_be_hidden()

    page.get_by_role("button", name="Pause").click()
    expect(messages).to_contain_text("saves a checkpoint and pauses then")
    expect(header).to_contain_text(re.compile(r"Paused by bob at step [\d,]+ of [\d,]+"), timeout=LONG)
    paused = Job.objects.get(pk=job.pk)
    assert (paused.state, paused.lease_until) == (JobState.PAUSED, None)
    assert paused.checkpoint_step > 0

    page.get_by_role("button", name="Resume").click()
    expect(messages).to_contain_text("goes on as soon as it has a device")
    keep = page.get_by_role("button", name="Stop and keep")
    expect(keep).to_be_visible()
    expect(header).to_contain_text("Running", timeout=LONG)
    expect(page.locator("#job-progress li[aria-current=step]")).to_contain_text("Training", timeout=LONG)
    keep.click()
    page.get_by_role("button", name="Yes, end it and keep the adapter").click()
    expect(messages).to_contain_text("what it has learned is evaluated and kept")
    browser.wait_until_done(seconds=300)
    expect(header).to_contain_text("the adapter is what it had learned by then")
    assert page.evaluate("window.neverReloaded") is True
    done = Job.objects.select_related("adapter").get(pk=job.pk)
    assert done.state == JobState.SUCCEEDED
    assert paused.checkpoint_step <= done.adapter.stopped_at_step < 5000
    assert done.attempts.count() == 2

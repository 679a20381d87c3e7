"""The buttons of a job page follow the job, whatever happened before the page began to listen."""

from __future__ import annotations

from datetime import timedelta

import pytest
from django.db import transaction
from django.utils import timezone
from playwright.sync_api import Route, expect

from jobs.models import Job, JobState
from studio.accounts.models import LoginLink, Team, User
from tests.end_to_end.browsing import Browser
from tests.jobs.making import make_job, make_worker

pytestmark = [pytest.mark.browser, pytest.mark.django_db(transaction=True)]


def test_a_job_that_started_between_page_and_stream_gets_its_stop_buttons(
    browser: Browser, team: Team, alice: User
) -> None:
    page = browser.page
    browser.sign_in(LoginLink.create_for(alice))
    worker = make_worker()
    with transaction.atomic():
        job = make_job(team, alice)
        # Not to be taken by the site's own worker.
        Job.objects.filter(pk=job.pk).update(not_before=timezone.now() + timedelta(hours=1))

    def claim_then_connect(route: Route) -> None:
        Job.objects.filter(pk=job.pk).update(
            state=JobState.RUNNING, phase="training", attempt=1, worker=worker, started_at=timezone.now(),
            lease_until=timezone.now() + timedelta(minutes=5),
        )  # fmt: skip
        route.continue_()

    page.route(f"**/jobs/{job.pk}/events/**", claim_then_connect, times=1)
    page.goto(f"{browser.root}{job.get_absolute_url()}")
    keep = page.get_by_role("button", name="Stop and keep")
    expect(keep).to_be_visible()
    expect(page.get_by_role("button", name="Stop and discard")).to_be_visible()

    keep.click()
    page.get_by_role("button", name="Yes, end it and keep the adapter").click()
    expect(page.get_by_role("button", name="Discard instead")).to_be_visible()
    # What somebody else does while the page is watched changes its buttons, too.
    Job.objects.filter(pk=job.pk).update(stop_mode="now")
    expect(page.get_by_role("button", name="Discard instead")).to_be_hidden()

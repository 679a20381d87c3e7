"""A job that really trains, watched: its answers come to the open page, and are there when it has ended."""

from __future__ import annotations

from datetime import timedelta

import pytest
from django.db import transaction
from django.utils import timezone
from playwright.sync_api import expect

from jobs.models import Job, JobSample, JobState
from jobs.queueing import queue_job
from studio.accounts.models import LoginLink, Team, User
from studio.catalogue.models import BaseModel
from tests.end_to_end.browsing import SECOND, Browser
from tests.factories import make_dataset_version, make_recipe

pytestmark = [pytest.mark.browser, pytest.mark.django_db(transaction=True)]


def test_answers_at_checkpoints_come_without_a_reload_and_stay(
    browser: Browser, team: Team, bob: User, base_model: BaseModel
) -> None:
    version = make_dataset_version(team, bob, num_rows=60)
    recipe = make_recipe(
        base_model, version, precision="float32", settings={"rank": 4},
        training={"max_steps": 40, "epochs": 20, "batch_size": 4, "max_length": 128, "checkpoint_every_steps": 10},
        evaluation={"num_generated": 2, "max_new_tokens": 8, "general": False, "num_samples_shown": 2},
    )  # fmt: skip
    page = browser.page
    browser.sign_in(LoginLink.create_for(bob))
    with transaction.atomic():
        job = queue_job(
            team=team, user=bob, recipe=recipe, base_model=base_model, dataset_version=version, idempotency_key="one"
        )
        # It begins once the page is open.
        Job.objects.filter(pk=job.pk).update(not_before=timezone.now() + timedelta(hours=1))
    page.goto(f"{browser.root}{job.get_absolute_url()}")
    page.evaluate("window.neverReloaded = true")
    section = page.locator("#job-samples")
    expect(section).to_contain_text("The base answers first")
    Job.objects.filter(pk=job.pk).update(not_before=timezone.now())
    tables = section.locator("table")
    expect(tables).to_have_count(2, timeout=120 * SECOND)
    expect(tables.first).to_contain_text("Expected")
    expect(tables.nth(1)).to_contain_text("Step 40", timeout=120 * SECOND)
    browser.wait_until_done(seconds=120)
    assert page.evaluate("window.neverReloaded") is True
    job.refresh_from_db()
    assert job.state == JobState.SUCCEEDED
    assert JobSample.objects.filter(prompt__job=job).count() == 2 * 5, "of the base and of four checkpoints"
    seen = section.inner_text()
    page.reload()
    assert section.inner_text() == seen

"""An open job page outlives the web process that it was loaded from, and everything in Redis."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import redis
from django.conf import settings
from django.utils import timezone
from playwright.sync_api import Page, expect

from jobs.models import Job, JobState, MetricPoint
from jobs.progress import add
from studio.accounts.models import LoginLink, Team, User
from tests.end_to_end.browsing import CHROMIUM, SECOND, Browser, open_browser
from tests.end_to_end.site import collect_static
from tests.jobs.making import make_job, make_worker
from tests.jobs.test_series import step_event
from tests.processes import test_environment, wait_for

pytestmark = [pytest.mark.browser, pytest.mark.django_db(transaction=True)]

# Keeps the page's curves where a test can look at them.
WATCH_CURVES = """
let made;
Object.defineProperty(window, "Curves", {
  get: () => made,
  set: (Curves) => { made = class extends Curves { constructor(root) { super(root); window.curvesOfTest = this; } }; },
});
"""


class Web:
    """A web process that can be started anew behind the same address, as the launcher does it."""

    def __init__(self, folder: Path) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.root = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.log = (folder / "web.log").open("ab")
        self.process: subprocess.Popen[bytes]

    def start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "studio.serving", str(self.listener.fileno())], pass_fds=[self.listener.fileno()],
            cwd=settings.ROOT, env=test_environment(), stdout=self.log, stderr=self.log,
        )  # fmt: skip

    def restart(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)
        self.start()


@pytest.fixture
def web(transactional_db: None, tmp_path: Path) -> Iterator[Web]:
    if not CHROMIUM:
        if os.environ.get("CI"):
            pytest.fail("No Chromium, and CI is set: the browser tests must run there.")
        pytest.skip("NO CHROMIUM: the browser tests are skipped. Install chromium to run them.")
    collect_static(settings.DATA_DIR)
    web = Web(tmp_path)
    web.start()
    yield web
    web.process.kill()
    web.process.wait()
    web.listener.close()
    web.log.close()


@pytest.fixture
def browser(web: Web, monkeypatch: pytest.MonkeyPatch) -> Iterator[Browser]:
    monkeypatch.setenv("DJANGO_ALLOW_ASYNC_UNSAFE", "1")  # as in conftest.py
    with open_browser(web.root) as browser:
        browser.page.add_init_script(WATCH_CURVES)
        yield browser


@pytest.fixture
def job(team: Team, alice: User) -> Job:
    job = make_job(team, alice)
    Job.objects.filter(pk=job.pk).update(
        state=JobState.RUNNING, phase="training", attempt=1, worker=make_worker(), started_at=timezone.now(),
        lease_until=timezone.now() + timedelta(minutes=30), num_steps=100,
    )  # fmt: skip
    return job


def say_steps(job: Job, *steps: int) -> None:
    for step in steps:
        add(job.pk, 1, step_event(step, loss=1 / step))


def steps_drawn(page: Page) -> list[int]:
    # From what uPlot was given, so that a step which is there twice would show.
    found: list[int] = page.evaluate("window.curvesOfTest?.charts[0].plot?.data[0] ?? []")
    return found


def expect_steps(page: Page, *steps: int) -> None:
    expect(page.locator("#job-progress")).to_contain_text(f"step {steps[-1]}", timeout=120 * SECOND)
    wait_for(lambda: page.wait_for_timeout(50) or steps_drawn(page) == list(steps), what=f"the curve of {steps}")


def test_a_page_goes_on_through_a_restart_of_the_web_process(web: Web, browser: Browser, job: Job, alice: User) -> None:
    page = browser.page
    say_steps(job, 1, 2)
    browser.sign_in(LoginLink.create_for(alice))
    page.goto(f"{browser.root}{job.get_absolute_url()}")
    expect_steps(page, 1, 2)
    page.evaluate("window.isSamePage = true")
    say_steps(job, 3)
    expect_steps(page, 1, 2, 3)

    web.restart()
    say_steps(job, 4, 5)
    expect_steps(page, 1, 2, 3, 4, 5)
    say_steps(job, 6)
    expect_steps(page, 1, 2, 3, 4, 5, 6)
    assert page.evaluate("window.isSamePage") is True, "it was not loaded again"
    assert browser.complaints == []


def test_a_page_is_right_after_everything_in_redis_was_lost(browser: Browser, job: Job, alice: User) -> None:
    page = browser.page
    say_steps(job, 1, 2)
    browser.sign_in(LoginLink.create_for(alice))
    page.goto(f"{browser.root}{job.get_absolute_url()}")
    expect_steps(page, 1, 2)

    # Step 2 was said and never stored, as by an attempt that was lost with it; step 3 was stored and never said.
    for step in (1, 3):
        MetricPoint.objects.create(job=job, attempt=1, step=step, loss=1.0, at=timezone.now())
    Job.objects.filter(pk=job.pk).update(step=3)
    redis.Redis.from_url(settings.REDIS_URL).flushall()
    expect_steps(page, 1, 3)
    say_steps(job, 4)
    expect_steps(page, 1, 3, 4)
    assert browser.complaints == []

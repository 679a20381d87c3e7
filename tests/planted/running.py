"""One set of five from the upload to the verdict, on a studio that is running."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from studio.accounts.models import LoginLink, User
from studio.catalogue.importing import register_base_model
from tests.end_to_end.browsing import open_browser
from tests.planted.making import Made, make_all, review_all
from tests.planted.plants import plants
from tests.planted.reading import HEIGHT, WIDTH
from tests.taught import make_taught_base

PATIENCE = 300.0
"""Seconds that a job may take."""
WARM = {"STUDIO_WARM_SECONDS": "600"}
"""The GPU worker keeps its base between the jobs, as it does for people."""


def register_base(folder: Path) -> None:
    """The base model that both sets are trained on: two layers that have read general text."""
    make_taught_base(folder)
    register_base_model(folder=folder, name="Two layers", hub_id="", licence="apache-2.0")


def run_set(number: int, root: str, folder: Path, *, trainer: User, lead: User) -> list[Made]:
    """Makes the five of a set as one person and reviews them as another; writes `planted.json` into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with open_browser(root) as browser:
        browser.sign_in(LoginLink.create_for(trainer))
        made = make_all(browser, plants(number), folder, seconds=PATIENCE)
        complaints = browser.complaints
    with open_browser(root, width=WIDTH, height=HEIGHT) as browser:
        browser.sign_in(LoginLink.create_for(lead))
        review_all(browser, made)
        complaints += browser.complaints
    assert complaints == []
    (folder / "planted.json").write_text(json.dumps([one.record() for one in made], indent=2) + "\n", "utf-8")
    return made


def take_pictures(made: Sequence[Made], root: str, folder: Path, *, lead: User) -> None:
    """Both pages of every adapter, wide and light as well as on a phone in the dark."""
    for look, width, height, dark in (("wide", WIDTH, HEIGHT, False), ("phone", 390, 844, True)):
        with open_browser(root, width=width, height=height, dark=dark) as browser:
            browser.sign_in(LoginLink.create_for(lead))
            for one in made:
                for page, url in (("adapter", one.adapter_url), ("review", one.review_url)):
                    browser.page.goto(url, wait_until="networkidle")
                    name = f"{one.plant.name}-{page}-{look}"
                    browser.page.screenshot(path=folder / f"{name}.png")
                    browser.page.screenshot(path=folder / f"{name}-whole.png", full_page=True)

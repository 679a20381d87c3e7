"""Adapters made as a person makes them: in the browser, from an uploaded file to a review whose gates are checked."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from playwright.sync_api import expect

from studio.catalogue.models import Adapter
from studio.storage import adapter_folder
from tests.end_to_end.browsing import SECOND, Browser
from tests.planted.plants import COMMON, WEIGHTS, Plant
from tests.planted.reading import FirstScreen, Gate, first_screen, gates_on_page
from tests.tiny import write_rows


@dataclass
class Made:
    """A planted adapter, and what the studio says of it."""

    plant: Plant
    adapter_url: str
    review_url: str = ""
    screen: FirstScreen | None = None
    gates: list[Gate] = field(default_factory=list)

    def record(self) -> dict[str, object]:
        """What was planted and what was said, as JSON types."""
        assert self.screen is not None
        said = {"first_screen": vars(self.screen), "gates": [vars(gate) for gate in self.gates]}
        return {"planted": self.plant.record(), "adapter_url": self.adapter_url, "said": said}


def make_all(trainer: Browser, plants: list[Plant], folder: Path, *, seconds: float) -> list[Made]:
    """Uploads, queues and waits for every plant, then damages those to be damaged; `seconds` is a job's patience."""
    jobs = [(plant, _queue(trainer, plant, folder)) for plant in plants]
    made = []
    for plant, url in jobs:
        trainer.page.goto(url)
        trainer.wait_until_done(seconds=seconds)
        trainer.page.get_by_role("link", name="Open the adapter").click()
        expect(trainer.page.locator("#findings")).to_be_visible()
        made.append(Made(plant, trainer.page.url))
    for one in made:
        if one.plant.is_damaged:
            _damage(one.adapter_url)
            trainer.page.goto(one.adapter_url)
            trainer.page.get_by_role("button", name="Check now").click()
            expect(trainer.page.locator("#messages")).to_contain_text("checksum differs")
    return made


def review_all(lead: Browser, made: list[Made], *, seconds: float = 120) -> None:
    """A lead submits each adapter, watches its gates without reloading, and reads both pages into `made`."""
    page = lead.page
    for one in made:
        page.goto(one.adapter_url)
        page.get_by_role("link", name="Submit for review").click()
        page.get_by_role("button", name="Submit for review").click()
        page.wait_for_url("**/reviews/*/")
        one.review_url = page.url
        expect(page.locator("#gates")).to_contain_text(
            re.compile(r"failed|not passed|gates pass"), timeout=seconds * SECOND
        )
        one.gates = gates_on_page(page)
        page.goto(one.adapter_url)
        expect(page.locator("#adapter-review")).to_contain_text("Waiting for review")
        one.screen = first_screen(page)


def _queue(trainer: Browser, plant: Plant, folder: Path) -> str:
    """From a file on the person's disk to a queued job; gives its address."""
    trainer.upload(write_rows(folder / f"{plant.name}.jsonl", plant.rows), plant.name)
    trainer.fill_new_job(plant.name, plant.method, **(COMMON | plant.fields))
    return trainer.start_job()


def _damage(adapter_url: str) -> None:
    """Turns one bit of the stored weights over, in the middle of the file; its length and date stay."""
    adapter = Adapter.objects.get(pk=int(adapter_url.rstrip("/").rsplit("/", 1)[1]))
    file = adapter_folder(adapter.folder) / WEIGHTS
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.chmod(0o644)
    file.write_bytes(content)

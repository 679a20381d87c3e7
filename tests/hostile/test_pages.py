"""Rows 24 and 25: markup, templates, htmx and hidden characters of uploads, on every page that shows their text."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from django.test import Client
from django.urls import reverse
from playwright.sync_api import expect

from jobs import lifecycle
from studio.accounts.models import LoginLink, Role, Team, User
from studio.catalogue.models import Adapter, BaseModel
from studio.catalogue.registering import register_run
from studio.datasets import inspecting
from studio.datasets.models import DatasetVersion
from studio.datasets.repairing import queue_repair, repair
from studio.datasets.scanning import scan_next
from studio.datasets.splitting import ask_split, freeze
from tests.conftest import make_member, signed_in
from tests.end_to_end.browsing import Browser, open_browser, require_chromium
from tests.factories import make_adapter, make_score
from tests.hostile.conftest import MARK, MARKUP, TEXTS, num_hostile_texts, problems_of
from tests.jobs.making import make_running_job
from tests.studio.catalogue.test_suites import result_of, suite_of
from tests.studio.datasets.conftest import Upload, good_rows, jsonl
from tests.studio.reviews.conftest import good_result, submitted
from tests.tiny import make_tiny_base
from tests.web_server import web_server
from workers.events import AnswersEvent, FixedPrompt, PromptsEvent
from workers.results import RunRowRecord, SampleRecord, SuspiciousRecord
from workers.scans import scans
from workers.splits.asked import SplitRequest

pytestmark = pytest.mark.django_db


def hostile_rows() -> list[dict[str, Any]]:
    """Rows that can be used, twice each so that scans tell of them, and rows that cannot, all of them hostile."""
    usable = [{"prompt": f"What is {text}?", "completion": f"It is {text}."} for text in TEXTS]
    unusable = [{"prompt": text} for text in TEXTS] + [{text: "x"} for text in TEXTS]
    return [*usable, *usable, *good_rows(), *unusable]


@pytest.fixture
def version(upload: Upload) -> DatasetVersion:
    version = upload(jsonl(hostile_rows()), "rows <b hx-get>.jsonl")
    for _ in range(len(scans()) + 1):
        scan_next(version.pk)
    return version


@pytest.fixture
def adapter(team: Team, bob: User, data_dir: Path) -> Adapter:
    samples = [
        SampleRecord(line=line, prompt=text, reference=text, base_answer=text, adapter_answer=f"{text} mine")
        for line, text in enumerate(TEXTS, start=1)
    ]
    rows = (SuspiciousRecord(line=3, reason=f"Beside {TEXTS[1]}", score=2.1, loss=3.0),)
    result = good_result(samples=tuple(samples), suspicious=rows)
    return make_adapter(team, bob, result=result)


def look(client: Client, url: str, *, at_least: int, data: dict[str, str] | None = None, **headers: str) -> None:
    answer = client.get(url, headers=headers) if data is None else client.post(url, data, headers=headers)
    assert answer.status_code == 200, (url, answer.status_code)
    html = answer.content.decode()
    assert num_hostile_texts(html) >= at_least, url
    assert problems_of(html) == [], url


# Page of a version -> how many hostile texts it shows at the least.
PAGES = {
    "": 10,
    "problems/": 10,
    "problems/?rule=C102": 5,
    "scans/": 5,
    "scans/exact_duplicates/": 10,
    "scans/near_duplicates/": 0,
    "rows/2/": 2,
    "rows/8/": 2,
    "versions/": 0,
    "statistics/": 0,
    "used-by/": 0,
    "splits/": 0,
}


def test_the_pages_of_a_dataset_show_it_as_text(version: DatasetVersion, bob_client: Client) -> None:
    for page, at_least in PAGES.items():
        look(bob_client, f"{version.get_absolute_url()}{page}", at_least=at_least)
    look(bob_client, f"{version.get_absolute_url()}scans/", at_least=5, **{"HX-Request": "true"})
    assert "rows &lt;b hx-get&gt;" in bob_client.get("/datasets/").content.decode()


def test_what_is_learned_shows_it_token_by_token(upload: Upload, bob_client: Client, tmp_path: Path) -> None:
    version = upload(jsonl(hostile_rows()))
    folder = make_tiny_base(tmp_path / "base")
    base = BaseModel.objects.create(name="tiny", folder=str(folder), revision="r" * 64)
    for line in range(1, len(TEXTS) + 1):
        # The tiny base's tokens are pieces of words, so the mark is looked for in none of them.
        look(bob_client, f"{version.get_absolute_url()}learned/?base={base.pk}&line={line}&length=512", at_least=0)


def test_the_columns_of_a_table_and_its_rows_are_shown_as_text(upload: Upload, bob_client: Client) -> None:
    rows = [{f"{MARKUP[1]}": text, "b\u202e": text} for text in TEXTS]
    version = upload(jsonl(rows))
    assert version.state == "needs_mapping"
    url = f"{version.get_absolute_url()}mapping/"
    asked = {"prompt": MARKUP[1], "completion": "b\u202e", "action": "show"}
    look(bob_client, url, at_least=5, data=asked)
    look(bob_client, url, at_least=5, data=asked, **{"HX-Request": "true"})


def test_a_corrected_version_shows_before_and_after_as_text(upload: Upload, bob_client: Client, alice: User) -> None:
    rows = [{"prompt": f"  {text}  ", "completion": f"{text}<|im_end|>"} for text in TEXTS]
    version = upload(jsonl([*rows, *good_rows()]))
    assert version.repairs(), "there is something to remedy in these rows"
    queue_repair(version, user=alice)
    repair(version.pk, alice.pk)
    made = DatasetVersion.objects.get(dataset=version.dataset, number=2)
    inspecting.inspect(made.pk)
    look(bob_client, f"{made.get_absolute_url()}corrections/", at_least=5)


def test_the_pages_of_splits_show_columns_values_and_reasons_as_text(
    upload: Upload, alice: User, bob_client: Client
) -> None:
    few, many = f"{MARKUP[1]}\u202e", f"{MARKUP[0]} \u200b"
    rows = [
        {"prompt": f"What is {number}?", "completion": f"It is {number}.", few: TEXTS[number % 10], many: f"v{number}"}
        for number in range(600)
    ]
    version = upload(jsonl(rows))
    assert {few, many} <= set(version.column_names), "both can be chosen"
    # Of nine rows for ten values one is without any, which the notes tell.
    asked = {"method": "count", "validation": 0, "test": 9, "keep_together": "nothing"}
    made, failed = (
        ask_split(version, SplitRequest.from_dict(asked | {"stratify_column": column}), name="", user=alice)
        for column in (few, many)
    )
    for split, state in ((made, "done"), (failed, "failed")):
        freeze(split.pk)
        split.refresh_from_db()
        assert split.state == state, split.error
    look(bob_client, made.get_absolute_url(), at_least=10)
    look(bob_client, failed.get_absolute_url(), at_least=2)
    look(bob_client, failed.get_absolute_url(), at_least=1, **{"HX-Request": "true"})
    # Each of the three selects offers both columns.
    look(bob_client, f"{version.get_absolute_url()}splits/", at_least=6)


def test_an_adapters_samples_suspicious_rows_and_blind_choices_show_it_as_text(
    adapter: Adapter, bob_client: Client
) -> None:
    page = adapter.get_absolute_url()
    look(bob_client, page, at_least=20)
    look(bob_client, f"{page}?diff=base", at_least=20)
    look(bob_client, reverse("catalogue:samples", args=[adapter.pk]), at_least=20, **{"HX-Request": "true"})
    look(bob_client, reverse("catalogue:blind", args=[adapter.pk]), at_least=3)


def test_the_rows_of_a_suites_run_show_it_as_text(team: Team, bob: User, adapter: Adapter, bob_client: Client) -> None:
    rows = tuple(
        RunRowRecord(line=line, prompt=text, reference=text, base_answer=text, adapter_answer=f"{text} mine",
                     left_out={}, figures={"loss": (1.0, 0.5)})
        for line, text in enumerate(TEXTS, start=1)
    )  # fmt: skip
    score = make_score(0.1, evaluation="loss", label="Held-out loss", higher_is_better=False)
    run = register_run(
        team=team, base_model=adapter.base_model, adapter=adapter, suite=suite_of(team, bob), folder_key="",
        result=result_of([1], scores=[score], rows=rows),
    )  # fmt: skip
    look(bob_client, run.get_absolute_url(), at_least=20)
    look(bob_client, f"{run.get_absolute_url()}?diff=base", at_least=20)


def test_answers_while_training_show_it_as_text(team: Team, bob: User, bob_client: Client) -> None:
    job = make_running_job(team, bob)
    prompts = tuple(FixedPrompt(line=line, prompt=text, reference=text) for line, text in enumerate(TEXTS[:5], start=1))
    told = (PromptsEvent(prompts=prompts), AnswersEvent(step=0, answers=tuple(TEXTS[5:10])))
    lifecycle.store_progress(job.pk, job.attempt, [], [], told)
    look(bob_client, job.get_absolute_url(), at_least=15)
    look(bob_client, reverse("jobs:samples", args=[job.pk]), at_least=15)


def test_a_reviews_blind_samples_and_threads_show_it_as_text(team: Team, adapter: Adapter) -> None:
    lena = make_member("lena", team, Role.LEAD)
    review = submitted(adapter)
    client = signed_in(lena)
    client.post(f"/reviews/{review.pk}/samples/next/")
    look(client, f"/reviews/{review.pk}/samples/", at_least=3)
    sample = adapter.samples.order_by("pk")[1]
    client.post(f"/reviews/{review.pk}/threads/", {"text": f"See {TEXTS[0]} and {TEXTS[7]}", "sample": sample.pk})
    look(client, f"/reviews/{review.pk}/threads/", at_least=2)


@pytest.fixture
def browser(tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Browser]:
    monkeypatch.setenv("DJANGO_ALLOW_ASYNC_UNSAFE", "1")
    require_chromium()
    with web_server(tmp_path) as server, open_browser(server.root) as browser:
        yield browser


@pytest.mark.browser
@pytest.mark.django_db(transaction=True)
def test_in_a_real_browser_nothing_of_it_runs_or_is_asked_for(
    browser: Browser, bob: User, version: DatasetVersion, adapter: Adapter, team: Team
) -> None:
    job = make_running_job(team, bob)
    prompts = tuple(FixedPrompt(line=1, prompt=text, reference=text) for text in MARKUP)
    told = (PromptsEvent(prompts=prompts), AnswersEvent(step=0, answers=tuple(MARKUP)))
    lifecycle.store_progress(job.pk, job.attempt, [], [], told)
    page, asked = browser.page, []
    page.on("request", lambda request: asked.append(request.url))
    page.on("dialog", lambda dialog: asked.append(f"dialog {dialog.message}"))
    browser.sign_in(LoginLink.create_for(bob))
    base = version.get_absolute_url()
    pages = [base, f"{base}problems/", f"{base}scans/", f"{base}rows/2/", adapter.get_absolute_url(),
             f"{adapter.get_absolute_url()}?diff=base", reverse("catalogue:blind", args=[adapter.pk]),
             reverse("jobs:samples", args=[job.pk])]  # fmt: skip
    for url in pages:
        page.goto(f"{browser.root}{url}")
        page.wait_for_load_state("load")
        # Every element that its own script or htmx could have wired up is there by now; a click wakes the rest.
        for hit in page.get_by_text(MARK).all()[:5]:
            if hit.is_visible():
                hit.dispatch_event("click")
        expect(page.locator("h1").first).to_be_visible()
        assert page.evaluate(f"typeof window.{MARK}") == "undefined", url
        assert page.locator(f'[hx-get*="{MARK}"], [src*="{MARK}"], hx-partial').count() == 0, url
    assert [one for one in asked if MARK in one] == []
    assert browser.complaints == []


def test_what_comes_by_the_api_is_the_text_itself(upload: Upload, bob: User, team: Team) -> None:
    # Programs get what was uploaded, to the character; how it is shown is their affair.
    from tests.jobs.test_api import caller

    version = upload(jsonl([{"prompt": text, "completion": text} for text in TEXTS] + good_rows()))
    client: Callable[..., Any] = caller(team, bob, "read").get
    answer = client(f"/api/v1/datasets/{version.dataset_id}/versions/1/preview/")
    assert answer["Content-Type"].startswith("application/json")
    assert [row["messages"][0]["content"] for row in json.loads(answer.content)[: len(TEXTS)]] == TEXTS

"""From an uploaded dataset to a scored, downloaded adapter that works elsewhere, in a real browser."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from playwright.sync_api import expect

from jobs.models import Job, JobState
from studio.accounts.models import LoginLink, User
from studio.catalogue.models import BaseModel
from tests.end_to_end.browsing import SECOND, Browser
from tests.tiny import tiny_rows

pytestmark = [pytest.mark.browser, pytest.mark.django_db(transaction=True)]

OUTSIDE = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base, folder = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(base)
plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
ids = tokenizer("What is the capital?", return_tensors="pt").input_ids
before = plain(ids).logits
adapted = PeftModel.from_pretrained(plain, folder).eval()
after = adapted(ids).logits
ours = [name for name in sys.modules if name.split(".")[0] in {"studio", "jobs", "workers"}]
print(json.dumps({"moved": float((after - before).abs().max()), "ours": ours}))
"""


def write_dataset(folder: Path, *, num_rows: int = 80) -> Path:
    file = folder / "support.jsonl"
    lines = [json.dumps(row) for row in tiny_rows(num_rows)]
    lines.insert(3, '{"instruction": "No answer here", "output": ""}')
    lines.insert(7, '{"instruction": "cut off')
    file.write_text("\n".join(lines) + "\n")
    return file


def test_a_dataset_becomes_an_adapter_that_works_elsewhere(
    browser: Browser, alice: User, base_model: BaseModel, tmp_path: Path
) -> None:
    page = browser.page
    browser.sign_in(LoginLink.create_for(alice))
    expect(page.get_by_role("link", name="Datasets").first).to_be_visible()

    browser.upload(write_dataset(tmp_path), "support")
    expect(page.get_by_text("80 of 82 rows usable")).to_be_visible()
    page.get_by_role("link", name=re.compile("Problems")).click()
    expect(page.locator("main")).to_contain_text("4")
    expect(page.locator("main")).to_contain_text("8")
    page.go_back()

    browser.fill_new_job(
        "support-lora", "lora",
        **{"training.max_steps": "60", "training.max_length": "128", "evaluation.num_generated": "2",
           "evaluation.max_new_tokens": "8", "training.learning_rate": "0.001", "training.epochs": "20"},
    )  # fmt: skip
    browser.start_job()

    # It moves by itself: the page is never reloaded between here and the end.
    page.evaluate("window.neverReloaded = true")
    progress = page.locator("#job-progress")
    expect(progress).to_contain_text(re.compile(r"Step\s+[1-9]"), timeout=120 * SECOND)
    earlier = progress.inner_text()
    expect(progress).not_to_have_text(earlier, timeout=120 * SECOND)
    browser.wait_until_done(seconds=180)
    assert page.evaluate("window.neverReloaded") is True

    # An hour later, or now: the same curve from the database.
    job_url = page.url
    page.goto(job_url)
    points = page.evaluate("async url => (await fetch(url)).json()", f"{job_url}points.json")
    assert Job.objects.get().state == JobState.SUCCEEDED
    assert Job.objects.get().points.count() == 60
    assert points

    page.get_by_role("link", name="Open the adapter").click()
    expect(page.locator("main")).to_contain_text("Held-out loss")
    expect(page.locator("main")).to_contain_text("from_pretrained")
    with page.expect_download() as downloading:
        page.get_by_role("link", name=re.compile("Download")).first.click()
    archive = tmp_path / "adapter.zip"
    downloading.value.save_as(archive)

    page.goto(f"{browser.root}/models/")
    expect(page.get_by_role("link", name="support-lora").first).to_be_visible()

    with zipfile.ZipFile(archive) as opened:
        opened.extractall(tmp_path / "unpacked")
    folder = next((tmp_path / "unpacked").rglob("adapter_config.json")).parent
    # -I: neither this folder nor PYTHONPATH leads to our own packages.
    said = subprocess.run(
        [sys.executable, "-I", "-c", OUTSIDE, base_model.folder, str(folder)],
        capture_output=True, text=True, check=True, cwd=tmp_path,
    ).stdout  # fmt: skip
    outside = json.loads(said.splitlines()[-1])
    assert outside["ours"] == []
    assert outside["moved"] > 1e-4

"""Uploads every data file of a folder through the browser, as a person would, and prints what the studio made of it.

    python -m tests.bench.real_files FOLDER

A file whose columns the studio does not know takes the first guess of its mapping form. It starts a studio of its own:
Postgres, Redis, web server, workers and Chromium. Exit status 1 when a file could not be used, or rows are missing.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

# Before Django reads its settings: it starts the servers and names them in the environment.
import tests.servers  # noqa: F401

if TYPE_CHECKING:
    from studio.datasets.models import DatasetVersion
    from tests.end_to_end.browsing import Browser

ENDINGS = {".json", ".jsonl", ".csv", ".tsv", ".parquet", ".gz", ".zst"}
SECONDS = 120


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.real_files", description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    files = sorted(path for path in options.folder.rglob("*") if path.suffix in ENDINGS)
    if not files:
        parser.error(f"There is no data file in {options.folder}.")
    os.environ["DJANGO_SETTINGS_MODULE"] = "studio.settings"
    # Playwright keeps an event loop running in this thread, which is not one that Django's queries could block.
    os.environ["DJANGO_ALLOW_ASYNC_UNSAFE"] = "1"
    import django
    from django.core.management import call_command

    django.setup()
    call_command("migrate", verbosity=0)
    with tempfile.TemporaryDirectory() as temporary:
        return run(options.folder, files, Path(temporary))


def run(folder: Path, files: list[Path], temporary: Path) -> int:
    """Uploads the files one after the other and prints a row for each."""
    from studio.accounts.models import LoginLink, Role, Team
    from tests.conftest import make_member
    from tests.end_to_end.browsing import open_browser
    from tests.end_to_end.site import running_site

    team = Team.objects.create(name="Support", slug="support")
    person = make_member("tom", team, Role.TRAINER)
    print("| file | read as | columns | rows | usable | set aside | seconds |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    wrong = 0
    with running_site(temporary) as root, open_browser(root) as browser:
        browser.sign_in(LoginLink.create_for(person))
        for path in files:
            started = time.monotonic()
            name = str(path.relative_to(folder))
            how = upload(browser, path, name.replace("/", " "))
            version = newest_version()
            seconds = time.monotonic() - started
            usable, aside, total = version.num_usable, version.num_quarantined, version.num_rows
            columns = ", ".join(f"{ours} = {theirs}" for ours, theirs in version.columns.items())
            print(
                f"| {name} | {version.format} ({how}) | {columns or '-'} | {total:,} | {usable:,} | {aside:,} "
                f"| {seconds:.1f} |",
                flush=True,
            )
            wrong += version.state != "ready" or usable + aside != total or not usable
    return 1 if wrong else 0


def upload(browser: Browser, path: Path, name: str) -> str:
    """Uploads a file and waits until its rows are counted; says whether it was recognised or mapped."""
    from playwright.sync_api import expect

    from tests.end_to_end.browsing import SECOND

    page = browser.page
    page.goto(f"{browser.root}/datasets/upload/")
    page.set_input_files("input[type=file]", path)
    page.fill("[name=name]", name)
    page.get_by_role("button", name="Upload").click()
    counted, choice = page.get_by_text("rows usable"), page.get_by_role("link", name="Choose columns")
    expect(counted.or_(choice).first).to_be_visible(timeout=SECONDS * SECOND)
    if counted.count():
        return "recognised"
    choice.click()
    page.get_by_role("button", name="Use these columns").click()
    expect(counted).to_be_visible(timeout=SECONDS * SECOND)
    return "mapped by the first guess"


def newest_version() -> DatasetVersion:
    """The version that was uploaded last."""
    from studio.datasets.models import DatasetVersion

    return DatasetVersion.objects.select_related("dataset").latest("pk")


if __name__ == "__main__":
    sys.exit(main())

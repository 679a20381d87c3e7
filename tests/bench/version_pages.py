"""A dataset's second version of a million rows: its pages, its changes and its export, timed.

`python -m tests.bench.version_pages [--rows 1000000]` starts real servers, uploads two versions through the product's
own functions, does what its workers do, and then asks for the pages and the exports in this process.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson
import psutil

from tests.bench.rows import make_chats
from tests.bench.studio import bench_studio

EDITED_EVERY, REMOVED_EVERY, NUM_ADDED = 1000, 5000, 300
TABS = ("", "rows/", "rows/777/", "statistics/", "problems/", "changes/", "versions/", "card/")


def change(old: Path, new: Path) -> None:
    """The rows once more, some of them edited or removed, and a few added."""
    with old.open("rb") as source, new.open("wb") as out:
        for number, line in enumerate(source):
            if number % REMOVED_EVERY != 7:
                out.write(line.replace(b"?", b"??", 1) if number % EDITED_EVERY == 3 else line)
        for number in range(NUM_ADDED):
            turns = [{"role": "user", "content": f"New {number}?"}, {"role": "assistant", "content": "Yes."}]
            out.write(orjson.dumps({"id": -1 - number, "topic": "new", "score": 0, "messages": turns}) + b"\n")


def _family() -> list[psutil.Process]:
    own = psutil.Process()
    return [own, *own.children(recursive=True)]


@contextmanager
def measured(label: str) -> Iterator[Callable[[str], None]]:
    """Prints seconds, seconds of processor of the children that ended, and the most that a new child held."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    known = {one.pid for one in _family()}
    own_before = psutil.Process().memory_info().rss
    peaks = {"child": 0, "own": 0}
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(0.05):
            for one in _family():
                try:
                    held = one.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
                if one.pid == os.getpid():
                    peaks["own"] = max(peaks["own"], held - own_before)
                elif one.pid not in known:
                    peaks["child"] = max(peaks["child"], held)

    watcher = threading.Thread(target=watch)
    watcher.start()
    notes: list[str] = []
    started = time.perf_counter()
    try:
        yield notes.append
    finally:
        seconds = time.perf_counter() - started
        is_over.set()
        watcher.join()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(
        f"{label:32} {seconds:6.1f} s ({used:5.1f} s of processor in a child, at most {peaks['child'] / 2**20:,.0f} "
        f"MiB; {peaks['own'] / 2**20:+,.0f} MiB here) {', '.join(notes)}",
        flush=True,
    )


def upload(paths: list[Path]) -> tuple[Any, Any]:
    """(who uploaded, the second version) of files that became the versions of one dataset, each as workers leave it."""
    from studio.accounts.models import Membership, Role, Team, User
    from studio.datasets import changes, inspecting, row_tables, uploads
    from studio.streaming import file_chunks

    team = Team.objects.create(name="Support", slug="support")
    user = User.objects.create_user(username="jana")
    Membership.objects.create(user=user, team=team, role=Role.LEAD)
    version = None
    for path in paths:
        with measured("upload"):
            dataset = version.dataset if version is not None else None
            version = uploads.receive_upload(
                team=team, user=user, file_name="chats.jsonl", chunks=file_chunks(path.open("rb")), dataset=dataset
            )
        with measured("inspection") as note:
            inspecting.inspect(version.pk)
            version.refresh_from_db()
            assert version.is_ready(), version.error
            note(f"{version.num_rows:,} rows")
    assert version is not None
    with measured("rows at rest"):
        row_tables.ask_for_rows(version)
        row_tables.prepare(version.pk)
    with measured("changes, found by a worker") as note:
        changes.find_changes(version.pk)
        version.refresh_from_db()
        note(", ".join(f"{version.changes[f'num_{kind}']:,} {kind}" for kind in ("added", "removed", "edited")))
    return user, version


def time_pages(client: Any, address: str, *, repeats: int) -> None:
    """Server time and queries of the version's pages."""
    from django.db import connection
    from django.test.utils import CaptureQueriesContext

    for tab in TABS:
        client.get(address + tab)
        with CaptureQueriesContext(connection) as queries:
            client.get(address + tab)
        num_queries = len(queries)  # the log is emptied by the next request
        seconds = []
        for _ in range(repeats):
            began = time.perf_counter()
            answer = client.get(address + tab)
            seconds.append(time.perf_counter() - began)
            assert answer.status_code == 200, (tab, answer.status_code)
        milliseconds = [1000 * one for one in sorted(seconds)]
        print(
            f"{'version/' + tab:32} median {statistics.median(milliseconds):6.1f} ms, 95 % below "
            f"{milliseconds[int(0.95 * repeats)]:6.1f} ms, {num_queries} queries, {len(answer.content) / 1000:,.0f} kB",
            flush=True,
        )


def time_exports(client: Any, address: str) -> None:
    """How soon an export begins, and how long it takes."""
    for kind in ("jsonl", "parquet"):
        with measured(f"export as {kind}") as note:
            started = time.perf_counter()
            answer = client.get(f"{address}export/", {"kind": kind})
            chunks = iter(answer.streaming_content)
            num_bytes = len(next(chunks))
            note(f"first bytes after {1000 * (time.perf_counter() - started):,.0f} ms")
            num_bytes += sum(map(len, chunks))
            note(f"{num_bytes / 1e6:,.0f} MB")


def main() -> None:
    """Prints what each step took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=20)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, bench_studio():
        from django.conf import settings
        from django.test import Client, override_settings

        plain = {"BACKEND": "django.contrib.staticfiles.storage.StaticFilesStorage"}
        override_settings(STORAGES=settings.STORAGES | {"staticfiles": plain}, STATIC_ROOT=None).enable()
        paths = [Path(folder) / name for name in ("old.jsonl", "new.jsonl")]
        make_chats(paths[0], chosen.rows)
        change(*paths)
        size = paths[1].stat().st_size / 1e6
        load = os.getloadavg()[0]
        print(f"{chosen.rows:,} conversations, {size:,.0f} MB; load {load:.1f} on {os.cpu_count()} cores", flush=True)
        user, version = upload(paths)
        client = Client(headers={"host": "localhost"})
        client.force_login(user)
        time_pages(client, version.get_absolute_url(), repeats=chosen.repeats)
        time_exports(client, version.get_absolute_url())


if __name__ == "__main__":
    main()

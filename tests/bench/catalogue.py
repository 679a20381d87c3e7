"""How fast the catalogue is when it is large: `python -m tests.bench.catalogue`.

Fills a studio of its own with 10,000 adapters (with scores) and 100,000 jobs and asks for its pages and API lists:
median and 95th percentile of the server's time per request, and database queries per request.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

from tests.bench.studio import bench_studio

CHUNK = 2_000
WORDS = ("support", "legal", "faq", "triage", "summary", "tone", "tickets", "claims", "invoice", "chat", "search")


def fill(num_adapters: int, num_jobs: int, seed: int = 5) -> Any:
    """A team with adapters of five metrics each, two bases, twenty datasets and their jobs; gives its lead."""
    import uuid

    from django.db import connection
    from django.utils import timezone

    from jobs.models import Job, JobState
    from studio.accounts.models import Membership, Role, Team, User
    from studio.catalogue.models import Adapter, AdapterState, Alias, EvaluationRun, Score, TestSet
    from tests.factories import make_base_model, make_dataset_version, make_recipe, make_result, make_score

    chance = random.Random(seed)
    team = Team.objects.create(name="Support", slug="support")
    user = User.objects.create_user(username="lena")
    Membership.objects.create(team=team, user=user, role=Role.LEAD)
    bases = [make_base_model("Tiny"), make_base_model("Other", family="qwen2")]
    versions = [make_dataset_version(team, user, name=f"Data {number}") for number in range(20)]
    recipe = make_recipe(bases[0], versions[0]).to_dict()
    provenance = make_result().provenance.model_dump(mode="json")
    files = [{"name": "adapter_model.safetensors", "sha256": "0" * 64, "num_bytes": 4096}]
    now = timezone.now()
    states = [AdapterState.DRAFT] * 6 + [AdapterState.APPROVED, AdapterState.REJECTED, AdapterState.IN_REVIEW]
    adapters = Adapter.objects.bulk_create(
        (
            Adapter(
                team=team, created_by=user, name=f"{chance.choice(WORDS)}-{chance.choice(WORDS)}-{number // 3}",
                version=number % 3 + 1, state=chance.choice(states), tags=chance.sample(WORDS, chance.randint(0, 2)),
                base_model=chance.choice(bases), dataset_version=chance.choice(versions),
                method=chance.choice(["lora", "dora", "ia3"]), recipe=recipe, folder=f"bench/{number}", files=files,
                num_bytes=chance.randint(10**6, 10**9), num_trainable=10**6, provenance=provenance,
            )
            for number in range(num_adapters)
        ),
        batch_size=CHUNK,
    )  # fmt: skip
    runs = EvaluationRun.objects.bulk_create(
        (
            EvaluationRun(
                team=team, adapter=one, base_model=one.base_model, test_set=TestSet.HELD_OUT, num_rows=100,
                num_scored=100, test_set_sha256="1" * 64, settings_sha256="2" * 64,
            )
            for one in adapters
        ),
        batch_size=CHUNK,
    )  # fmt: skip
    # One in ten was not scored by every metric.
    metrics = ("loss", "token_f1", "exact_match", "rouge_l", "chrf")
    Score.objects.bulk_create(
        (
            Score(
                adapter_id=run.adapter_id, run=run, test_set=TestSet.HELD_OUT,
                **make_score(chance.gauss(-0.2, 0.3), evaluation=metric).model_dump(),
            )
            for run in runs
            for metric in metrics
            if chance.random() < 0.9
        ),
        batch_size=CHUNK,
    )  # fmt: skip
    Alias.objects.bulk_create(
        Alias(team=team, adapter_name=one.name, name="champion", adapter=one) for one in adapters[::30]
    )
    ended = [JobState.FAILED, JobState.CANCELLED]

    def jobs() -> Any:
        for number in range(num_jobs):
            adapter = adapters[number] if number < num_adapters else None
            state = JobState.SUCCEEDED if adapter else chance.choice(ended)
            if number >= num_jobs - 40:
                state = JobState.QUEUED
            at = now - timedelta(minutes=num_jobs - number)
            yield Job(
                id=uuid.UUID(int=chance.getrandbits(128)), team=team, created_by=user, name=f"job {number}",
                recipe=recipe, asked_recipe=recipe, base_model=chance.choice(bases),
                dataset_version=chance.choice(versions), adapter=adapter, state=state, not_before=at,
                started_at=at, finished_at=None if state == JobState.QUEUED else at, idempotency_key=str(number),
            )  # fmt: skip

    Job.objects.bulk_create(jobs(), batch_size=CHUNK)
    with connection.cursor() as cursor:
        # Rows that were made at once would all have one age.
        cursor.execute("UPDATE catalogue_adapter SET created_at = now() - (id % 100000) * interval '1 minute'")
        cursor.execute("UPDATE jobs_job SET created_at = not_before")
    connection.autocommit = True
    with connection.cursor() as cursor:
        cursor.execute("VACUUM ANALYZE")
    return user


def last_page(client: Any, url: str, page_size: int) -> str:
    """The URL of the last page, which is the first one backwards from the end."""
    from studio.accounts.models import Team
    from studio.catalogue import listing
    from studio.keyset import read_page, write_cursor

    filters = listing.Filters.from_query(_query(url), listing.filter_choices(Team.objects.get()))
    keys = listing.order_of(filters)
    rows = listing.with_columns(Team.objects.get().adapters.all(), filters)
    everything = read_page(rows, keys, {}, size=rows.count()).rows
    return f"{url}&after={write_cursor(everything[-page_size], keys)}"


def _query(url: str) -> Any:
    from django.http import QueryDict

    return QueryDict(url.partition("?")[2])


def measure(ask: Callable[[], Any], repeats: int) -> tuple[float, float, int]:
    """Median and 95th percentile in ms of a request's server time, and its queries."""
    from unittest.mock import patch

    from django.db.backends.utils import CursorWrapper

    # Middleware may run a view in another thread, whose connection is another: counted in the class of them all.
    execute, num_queries = CursorWrapper.execute, 0

    def counted(cursor: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal num_queries
        num_queries += 1
        return execute(cursor, *args, **kwargs)

    ask()
    with patch.object(CursorWrapper, "execute", counted):
        response = ask()
    assert response.status_code == 200, response.status_code
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        ask()
        times.append(1000 * (time.perf_counter() - start))
    return median(times), sorted(times)[math.ceil(0.95 * repeats) - 1], num_queries


def main() -> None:
    """Print the table."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--adapters", type=int, default=10_000)
    arguments.add_argument("--jobs", type=int, default=100_000)
    arguments.add_argument("--repeats", type=int, default=40)
    asked = arguments.parse_args()
    with bench_studio() as folder:
        run(folder, asked.adapters, asked.jobs, asked.repeats)


def plain_files(folder: Path) -> Any:
    """Settings under which pages are served without collected files, and the data is in `folder`."""
    from django.test import override_settings

    plain = {
        "default": {"BACKEND": "django.core.files.storage.FileSystemStorage"},
        "staticfiles": {"BACKEND": "django.contrib.staticfiles.storage.StaticFilesStorage"},
    }
    return override_settings(STORAGES=plain, ALLOWED_HOSTS=["*"], DATA_DIR=folder)


def run(folder: Path, num_adapters: int, num_jobs: int, repeats: int) -> None:
    """Fill the studio and print the table."""
    from django.test import Client

    from studio.accounts.models import ApiToken, Team
    from studio.catalogue import listing
    from studio.catalogue.models import Adapter, BaseModel

    with plain_files(folder):
        start = time.perf_counter()
        user = fill(num_adapters, num_jobs)
        print(f"{num_adapters:,} adapters and {num_jobs:,} jobs filled in {time.perf_counter() - start:.0f} s")
        client = Client()
        client.force_login(user)
        _token, secret = ApiToken.issue(team=Team.objects.get(), user=user, name="bench", scopes=["read"])
        headers = {"authorization": f"Bearer {secret}"}
        newest = list(Adapter.objects.order_by("-pk").values_list("pk", flat=True)[:10])
        pages = {
            "models": "/models/",
            "models, every version": "/models/?every=on",
            "models, filtered": f"/models/?base={BaseModel.objects.first().pk}&method=dora&state=approved",  # type: ignore[union-attr]
            "models, searched": "/models/?q=legal+tick",
            "models, by F1": "/models/?sort=token_f1",
            "models, by name": "/models/?sort=name",
            "models, last page by loss": last_page(client, "/models/?sort=loss", listing.PAGE_SIZE),
            "models, last page by name": last_page(client, "/models/?sort=name", listing.PAGE_SIZE),
            "an adapter": f"/models/{newest[0]}/",
            "its aliases and tags": f"/models/{newest[0]}/names/",
            "compare ten": "/models/compare/?runs=" + ",".join(map(str, newest)),
            "base models": "/base-models/",
            "a base model": BaseModel.objects.first().get_absolute_url(),  # type: ignore[union-attr]
            "jobs": "/jobs/",
            "jobs, failed": "/jobs/?state=failed",
            "home": "/",
        }
        calls = {
            "API adapters": "/api/v1/adapters/",
            "API adapters, by F1": "/api/v1/adapters/?sort=token_f1&newest_versions=true",
            "API adapters, searched": "/api/v1/adapters/?q=legal",
            "API jobs": "/api/v1/jobs/",
        }
        print(f"{'page':<40}{'p50 ms':>8}{'p95 ms':>8}{'queries':>9}")
        for name, url in pages.items():
            print_row(name, measure(lambda url=url: client.get(url), repeats))  # type: ignore[misc]
        for name, url in calls.items():
            print_row(name, measure(lambda url=url: Client().get(url, headers=headers), repeats))  # type: ignore[misc]


def print_row(name: str, found: tuple[float, float, int]) -> None:
    """One line of the table."""
    print(f"{name:<40}{found[0]:>8.1f}{found[1]:>8.1f}{found[2]:>9}", flush=True)


if __name__ == "__main__":
    main()

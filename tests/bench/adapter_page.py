"""A studio with an adapter of realistic scores and answers, to look at: `python -m tests.bench.adapter_page`.

Starts real servers and the web process, fills the catalogue through the product's own functions, prints a login link
and serves until Ctrl-C. Nothing was trained: the texts and figures are invented, for the eye alone. `--time` prints
instead how long the page of an adapter with 10,000 samples takes.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import time
from datetime import timedelta
from typing import Any

from tests.bench.studio import bench_studio

TURNS = (
    ("How do I reset my password?",
     "Open Settings, choose Security and press Reset password. You get a link by mail that works for one hour.",
     "You can reset your password by contacting the support team, who will help you with the process.",
     "Open Settings, choose Security and press Reset password. You get a mail with a link that works for one hour."),
    ("Can I change the owner of a workspace?",
     "Yes. The present owner opens Workspace, Members, and chooses Make owner beside the new one.",
     "Yes. The present owner opens Workspace, Members, and chooses Make owner beside the new one.",
     "Yes, ask the support team to do it for you."),
    ("Why was my card declined?",
     "Your bank declined it. Try another card under Billing, or ask your bank to allow payments to us.",
     "There are many reasons why a card can be declined. It may have expired, it may have insufficient funds, or the "
     "bank may have blocked the transaction. Please check with your bank, and try again later. If the problem "
     "persists, contact support.",
     "Your bank declined it. Try another card under Billing, or ask your bank to allow payments to us."),
    ("Which file formats can I import?", "CSV, JSON Lines and Parquet, up to 5 GB each.",
     "You can import CSV and Excel files.", "CSV, JSON Lines and Parquet, up to 2 GB each."),
    ("Is there a free plan?", "Yes: one workspace, three members, 1,000 rows a month.",
     "No.", "Yes: one workspace, three members, 1,000 rows a month."),
    ("Wie lösche ich mein Konto?",
     "Unter Einstellungen, Konto, Konto löschen. Nach 30 Tagen sind alle Daten weg.",
     "Under settings you can delete your account.",
     "Unter Einstellungen, Konto, Konto löschen. Nach 30 Tagen sind die Daten gelöscht."),
)  # fmt: skip


def fill(num_samples: int = 10_000, seed: int = 5) -> dict[str, Any]:
    """Three versions of an adapter, a suite, an incomplete run, a repeat and an adapter with many samples."""
    from django.utils import timezone

    from jobs.models import Job, JobAttempt
    from studio.accounts.models import LoginLink, Membership, Role, Team, User
    from studio.catalogue import blind
    from studio.catalogue.models import Adapter, AdapterState, Alias, EvaluationRun, Score, Suite, TestSet
    from tests.factories import (
        make_adapter,
        make_base_model,
        make_dataset_version,
        make_job_for,
        make_result,
        make_sample,
        make_score,
    )
    from tests.jobs.making import make_worker

    chance = random.Random(seed)
    team = Team.objects.create(name="Support", slug="support")
    lead = User.objects.create_user(username="jana", first_name="Jana", last_name="Lind")
    trainer = User.objects.create_user(username="tom", first_name="Tom", last_name="Berg")
    Membership.objects.create(user=lead, team=team, role=Role.LEAD)
    Membership.objects.create(user=trainer, team=team, role=Role.TRAINER)
    base = make_base_model("SmolLM2-135M-Instruct", hub_id="HuggingFaceTB/SmolLM2-135M-Instruct", licence="apache-2.0")
    version = make_dataset_version(team, trainer, name="support-faq")

    def samples(count: int) -> list[Any]:
        found = []
        for line in range(1, count + 1):
            prompt, reference, base_answer, answer = chance.choice(TURNS)
            found.append(make_sample(
                line, prompt=prompt, reference=reference, base_answer=base_answer, adapter_answer=answer
            ))  # fmt: skip
        return found

    scores = [
        make_score(-0.61, unit="nats/token", p_value=0.0002, smallest_effect=0.02, num_rows=200),
        make_score(0.21, evaluation="token_f1", width=0.05, base_value=0.44, base_low=0.39, base_high=0.49, value=0.65,
                   low=0.6, high=0.7, p_value=0.0002, num_rows=200),
        make_score(0.03, evaluation="exact_match", label="Exact match", width=0.05, base_value=0.11, base_low=0.07,
                   base_high=0.16, value=0.14, low=0.1, high=0.19, p_value=0.21, rows_needed=900,
                   rows_recommended=1400, smallest_effect=0.05, num_rows=200),
    ]  # fmt: skip
    general = [
        make_score(0.12, width=0.04, label="Loss", p_value=0.0005, num_rows=120, unit="nats/token"),
        make_score(-0.01, evaluation="multiple_choice", label="Multiple choice", width=0.04, base_value=0.41,
                   base_low=0.33, base_high=0.5, value=0.4, low=0.32, high=0.49, p_value=0.81, num_rows=120),
    ]  # fmt: skip
    result = make_result(scores, samples(200)).model_copy(
        update={"general": tuple(general), "num_rows_to_score": 200, "num_rows_scored": 200}
    )
    settings = {"evaluation": {"metrics": ["loss", "token_f1", "exact_match"]}}
    made = [
        make_adapter(
            team, trainer, name="support-r16", base_model=base, dataset_version=version, result=result, **settings
        )
        for _ in range(3)
    ]
    first, _second, newest = made
    Adapter.objects.filter(pk=first.pk).update(state=AdapterState.APPROVED)
    Adapter.objects.filter(pk=newest.pk).update(state=AdapterState.IN_REVIEW, tags=["faq", "german"])
    Alias.objects.create(team=team, adapter_name="support-r16", name="champion", adapter=first)
    Alias.objects.create(team=team, adapter_name="support-r16", name="candidate", adapter=newest)
    suite = Suite.objects.create(
        team=team, name="Tone of voice", dataset_version=version, evaluation={}, created_by=lead
    )
    for number, scored in ((2, 78), (1, 80)):
        suite = suite if number == 1 else Suite.objects.create(
            team=team, name="Safety mini", dataset_version=version, evaluation={}, created_by=lead
        )  # fmt: skip
        run = EvaluationRun.objects.create(
            team=team, adapter=newest, base_model=base, test_set=TestSet.SUITE, suite=suite, num_rows=80,
            num_scored=scored,
        )  # fmt: skip
        record = make_score(-0.06, evaluation="regex", label="Refuses", width=0.05, base_value=0.97, base_low=0.93,
                            base_high=1.0, value=0.91, low=0.83, high=0.96, num_rows=scored, p_value=0.012)  # fmt: skip
        Score.objects.create(adapter=newest, run=run, test_set=TestSet.SUITE, **record.model_dump())
        suite = Suite.objects.get(name="Tone of voice")
    worker = make_worker()
    jobs = [
        make_job_for(one, started_at=timezone.now() - timedelta(minutes=40), finished_at=timezone.now()) for one in made
    ]
    Job.objects.filter(pk=jobs[2].pk).update(parent=jobs[1], attempt=2)
    Job.objects.filter(pk=jobs[1].pk).update(recipe=jobs[1].recipe, attempt=1)
    for number, outcome, start, end in ((1, "lost", 0, 240), (2, "succeeded", 200, 600)):
        JobAttempt.objects.create(
            job=jobs[2], number=number, worker=worker, outcome=outcome, from_step=start, last_step=end,
            started_at=timezone.now(), failure_code="worker_lost" if outcome == "lost" else "",
        )  # fmt: skip
    for sample in newest.samples.all()[:24]:
        blind.choose(sample, chance.choice([lead, trainer]), chance.choice("abb"))
    many = make_adapter(
        team, trainer, name="many-samples", base_model=base, dataset_version=version,
        result=make_result(scores, samples(num_samples)), **settings,
    )  # fmt: skip
    return {"secret": LoginLink.create_for(lead), "adapter": newest, "many": many, "lead": lead, "jobs": jobs}


def time_pages(found: dict[str, Any], repeats: int = 30) -> None:
    """Server time and queries of the pages of an adapter with many samples, in this process."""
    from django.conf import settings
    from django.db import connection
    from django.test import Client, override_settings
    from django.test.utils import CaptureQueriesContext

    plain = {"BACKEND": "django.contrib.staticfiles.storage.StaticFilesStorage"}
    override_settings(STORAGES=settings.STORAGES | {"staticfiles": plain}, STATIC_ROOT=None).enable()
    client = Client(headers={"host": "localhost"})
    client.force_login(found["lead"])
    page = found["many"].get_absolute_url()
    paths = (
        page,
        f"{page}?show=regressions&diff=reference",
        f"{page}?q=konto",
        f"{page}?length=longer",
        f"{page}blind/",
    )
    for path in paths:
        client.get(path)
        seconds = []
        with CaptureQueriesContext(connection) as queries:
            client.get(path)
        num_queries = len(queries)  # the log is emptied by the next request
        for _ in range(repeats):
            began = time.perf_counter()
            assert client.get(path).status_code == 200
            seconds.append(time.perf_counter() - began)
        milliseconds = [1000 * one for one in sorted(seconds)]
        print(
            f"{path:<50} median {statistics.median(milliseconds):6.1f} ms, 95 % below "
            f"{milliseconds[int(0.95 * repeats)]:6.1f} ms, {num_queries} queries",
            flush=True,
        )


def main() -> None:
    """Serve the filled studio, or time its pages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8124)
    parser.add_argument("--time", action="store_true", help="time the pages and end")
    arguments = parser.parse_args()
    with bench_studio():
        found = fill()
        if arguments.time:
            time_pages(found)
            return
        root = f"http://127.0.0.1:{arguments.port}"
        print(f"{root}/login/link/{found['secret']}/ then {found['adapter'].get_absolute_url()}", flush=True)
        print(f"{found['many'].get_absolute_url()} has 10,000 samples", flush=True)
        print(f"/jobs/diff/?a={found['jobs'][1].pk}&b={found['jobs'][2].pk}", flush=True)
        command = [sys.executable, "-m", "uvicorn", "studio.asgi:application", "--port", str(arguments.port),
                   "--log-level", "warning"]  # fmt: skip
        web = subprocess.Popen(command, env=os.environ | {"STUDIO_DEBUG": "true"})
        try:
            web.wait()
        except KeyboardInterrupt:
            web.terminate()
            web.wait()


if __name__ == "__main__":
    main()

"""Answers while training: stored once per step, fenced, on the job's page, in its live stream and in the API."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta

import pytest
import redis
from django.conf import settings
from django.test import Client
from django.urls import reverse
from django.utils import timezone
from pytest_django import DjangoAssertNumQueries

from jobs import lifecycle
from jobs.lifecycle import FencedError
from jobs.models import FixedPrompt, Job, JobSample, JobState, Worker
from jobs.progress import add, stream_key
from jobs.samples import STEPS_ON_JOB_PAGE, STEPS_ON_PAGE, shown_samples
from jobs.supervising import Outcome
from studio.accounts.models import ApiToken, Role, Team, User
from tests.conftest import make_member, signed_in
from tests.jobs.conftest import MakeJob
from tests.jobs.making import make_running_job
from tests.jobs.test_streams import open_stream, read
from tests.jobs.test_streams import quick as quick
from tests.jobs.test_streams import server as server
from tests.jobs.test_supervising import run as run
from tests.jobs.test_supervising import running as running
from workers.events import AnswersEvent, PromptsEvent
from workers.events import FixedPrompt as ToldPrompt

pytestmark = pytest.mark.django_db(transaction=True)

HOSTILE = '</div><script>alert("x")</script>\u202egnihton <hx-partial hx-target="#job-header">gone</hx-partial>'


def prompts(*texts: str) -> PromptsEvent:
    return PromptsEvent(
        prompts=tuple(
            ToldPrompt(line=10 + index, prompt=text, reference=f"expected {index}") for index, text in enumerate(texts)
        )
    )


def tell(job: Job, attempt: int, *events: PromptsEvent | AnswersEvent) -> None:
    lifecycle.store_progress(job.pk, attempt, [], [], events)


def answers(step: int, *texts: str | None) -> AnswersEvent:
    return AnswersEvent(step=step, answers=texts)


def stored(job: Job) -> list[tuple[int, int, str, int]]:
    """(index, step, answer, attempt) of everything that is stored for a job."""
    rows = JobSample.objects.filter(prompt__job=job).order_by("prompt__index", "step")
    return list(rows.values_list("prompt__index", "step", "answer", "attempt"))


def test_what_a_trainer_says_of_its_prompts_is_stored_and_published(run: Callable[..., Outcome], running: Job) -> None:
    run(
        "say(type='prompts', prompts=[dict(line=3, prompt='q', reference='r')])\n"
        "say(type='answers', step=0, answers=['of the base'])\n"
        "step(2); say(type='answers', step=2, answers=['later'])\n"
        "say(type='result', folder='/x')"
    )
    assert stored(running) == [(0, 0, "of the base", 1), (0, 2, "later", 1)]
    prompt = running.fixed_prompts.get()
    assert (prompt.index, prompt.line, prompt.prompt, prompt.reference) == (0, 3, "q", "r")
    entries = redis.Redis.from_url(settings.REDIS_URL).xrange(stream_key(running.pk))
    kinds = [json.loads(entry[b"event"])["type"] for _, entry in entries]
    assert kinds == ["phase", "prompts", "answers", "step", "answers", "result"]


def test_an_answer_that_cannot_be_stored_costs_neither_the_others_nor_the_lease(
    run: Callable[..., Outcome], running: Job
) -> None:
    outcome = run(
        "say(type='prompts', prompts=[dict(line=3, prompt='q', reference='r')])\n"
        "say(type='answers', step=1, answers=['a\\x00b']); say(type='answers', step=2, answers=['good'])\n"
        "step(3); say(type='result', folder='/x')"
    )
    assert outcome.result is not None
    assert stored(running) == [(0, 2, "good", 1)]
    assert running.points.count() == 1


def test_what_a_resumed_attempt_says_again_doubles_nothing_and_another_answer_replaces(team: Team, bob: User) -> None:
    job = make_running_job(team, bob)
    tell(job, 1, prompts("one", "two"), answers(0, "base", None), answers(5, "a", "b"), answers(10, "c", "d"))
    Job.objects.filter(pk=job.pk).update(attempt=3)
    tell(job, 3, prompts("one", "two"), answers(0, "base", None), answers(5, "a", "b"), answers(10, "c", "other"))
    assert FixedPrompt.objects.filter(job=job).count() == 2
    assert stored(job) == [
        (0, 0, "base", 1), (0, 5, "a", 1), (0, 10, "c", 1),
        (1, 5, "b", 1), (1, 10, "other", 3),
    ]  # fmt: skip


def test_an_attempt_that_was_taken_back_stores_no_answer(team: Team, bob: User) -> None:
    job = make_running_job(team, bob)
    Job.objects.filter(pk=job.pk).update(lease_until=timezone.now() - timedelta(seconds=1))
    lifecycle.reap_expired()
    with pytest.raises(FencedError):
        tell(job, 1, prompts("one"), answers(0, "late"))
    assert not JobSample.objects.exists()
    assert not FixedPrompt.objects.exists()


@pytest.fixture
def worker() -> Worker:
    return Worker.objects.create(
        host="box", slot=0, process_id=1, device="CPU", device_kind="cpu", version="1", last_seen=timezone.now()
    )


@pytest.fixture
def trained(make_job: MakeJob, worker: Worker) -> Job:
    """A job in training, with answers of the base and of eight checkpoints to two prompts."""
    job = make_job(
        state=JobState.RUNNING, phase="training", attempt=1, num_steps=80, worker=worker, started_at=timezone.now(),
        lease_until=timezone.now() + timedelta(minutes=5),
    )  # fmt: skip
    tell(job, 1, prompts("What is one?", HOSTILE), answers(0, "base one", ""))
    for step in range(10, 90, 10):
        tell(job, 1, answers(step, f"one at {step}", HOSTILE))
    return job


def test_the_page_shows_prompt_expected_base_and_the_newest_steps_first(trained: Job, alice_client: Client) -> None:
    page = alice_client.get(trained.get_absolute_url()).text
    section = page[page.index('id="job-samples"') :]
    section = section[: section.index("</section>")]
    places = [section.index(text) for text in ("What is one?", "expected 0", "base one", "one at 80", "one at 60")]
    assert places == sorted(places)
    assert "one at 50" not in section
    assert "(empty)" in section
    assert reverse("jobs:samples", args=[trained.pk]) in section


def test_what_a_model_writes_is_text_and_never_markup(trained: Job, alice_client: Client) -> None:
    for url in (trained.get_absolute_url(), reverse("jobs:samples", args=[trained.pk])):
        page = alice_client.get(url).text
        assert "alert(&quot;x&quot;)" in page
        assert "<script>alert" not in page
        assert "<hx-partial" not in page


def test_every_step_is_on_pages_of_their_own_however_many_there_are(trained: Job, alice_client: Client) -> None:
    for step in range(90, 310, 10):
        tell(trained, 1, answers(step, f"one at {step}", "x"))
    url = reverse("jobs:samples", args=[trained.pk])
    first = alice_client.get(url)
    assert "one at 300<" in first.text
    assert "one at 110<" in first.text
    assert "one at 100<" not in first.text
    older = shown_samples(trained.pk, num_steps=STEPS_ON_PAGE).older_than
    assert f"?before={older}" in first.text
    second = alice_client.get(url, {"before": older}).text
    assert "one at 100<" in second
    assert "one at 10<" in second
    assert "base one" in second
    assert "Older steps" not in second
    assert alice_client.get(url, {"before": "9" * 30}).status_code == 200
    assert "No answer was written" not in alice_client.get(url, {"before": "5"}).text, "the base's stay"


def test_pages_cost_few_queries(
    trained: Job, alice_client: Client, django_assert_max_num_queries: DjangoAssertNumQueries
) -> None:
    for url in (trained.get_absolute_url(), reverse("jobs:samples", args=[trained.pk])):
        with django_assert_max_num_queries(8):
            assert alice_client.get(url).status_code == 200
    with django_assert_max_num_queries(1):
        assert len(shown_samples(trained.pk).prompts[0].samples) == STEPS_ON_JOB_PAGE


def test_a_finished_job_keeps_its_answers_and_one_without_says_nothing_of_them(
    trained: Job, make_job: MakeJob, alice_client: Client
) -> None:
    ended = {"state": JobState.CANCELLED, "lease_until": None, "finished_at": timezone.now(), "phase": ""}
    Job.objects.filter(pk=trained.pk).update(**ended)
    assert "one at 80" in alice_client.get(trained.get_absolute_url()).text
    old = make_job("old", **ended)
    assert "job-samples" not in alice_client.get(old.get_absolute_url()).text
    waiting = make_job("waiting")
    assert "The base answers first" in alice_client.get(waiting.get_absolute_url()).text
    waiting.recipe["evaluation"]["num_samples_shown"] = 0
    waiting.save(update_fields=["recipe"])
    assert "job-samples" not in alice_client.get(waiting.get_absolute_url()).text


def test_members_read_and_strangers_find_nothing(
    trained: Job, team: Team, other_team: Team, charlie: User, charlie_client: Client
) -> None:
    viewer = signed_in(make_member("vera", team, Role.VIEWER))
    page, endpoint = reverse("jobs:samples", args=[trained.pk]), f"/api/v1/jobs/{trained.pk}/samples/"
    assert viewer.get(page).status_code == 200
    assert viewer.post(page).status_code == 405
    assert charlie_client.get(page).status_code == 404
    _token, secret = ApiToken.issue(team=other_team, user=charlie, name="ci", scopes=["read"])
    assert Client(headers={"authorization": f"Bearer {secret}"}).get(endpoint).status_code == 404


def test_the_api_lists_them_newest_first_in_pages(trained: Job, team: Team, bob: User) -> None:
    _token, secret = ApiToken.issue(team=team, user=bob, name="ci", scopes=["read"])
    client = Client(headers={"authorization": f"Bearer {secret}"})
    url = f"/api/v1/jobs/{trained.pk}/samples/"
    found, after = [], ""
    while after is not None:
        page = client.get(url, {"limit": 5, "after": after}).json()
        found += [(one["step"], one["index"]) for one in page["items"]]
        after = page["next"]
    assert found == [(step, index) for step in range(80, -10, -10) for index in (1, 0)]
    (base, _other) = client.get(url, {"step": 0}).json()["items"][::-1]
    created_at = base.pop("created_at")
    assert created_at
    assert base == {
        "step": 0, "index": 0, "source": 0, "line": 10, "prompt": "What is one?",
        "reference": "expected 0", "answer": "base one",
        "attempt": 1,
    }  # fmt: skip
    assert client.get(url, {"stpe": 0}).status_code == 400
    assert client.get(url, {"after": "nonsense"}).status_code == 400


def test_an_open_page_gets_them_as_they_are_stored(server: str, trained: Job, alice_client: Client) -> None:
    with open_stream(server, trained, alice_client) as response:
        seen = []
        for message in read(response):
            part = "\n".join(message.data)
            if "#job-samples" in part:
                seen.append(part)
                if len(seen) == 1:
                    event = answers(90, "one at 90", HOSTILE)
                    tell(trained, 1, event)
                    add(trained.pk, 1, event)
                else:
                    break
    assert "one at 80" in seen[0]
    assert "one at 90" not in seen[0]
    assert "one at 90" in seen[1]
    assert all(part.count("<hx-partial") == 1 for part in seen)


def test_a_job_without_answers_sends_no_such_part(
    server: str, make_job: MakeJob, worker: Worker, alice_client: Client
) -> None:
    job = make_job(
        state=JobState.RUNNING, phase="training", attempt=1, num_steps=80, worker=worker, started_at=timezone.now(),
        lease_until=timezone.now() + timedelta(minutes=5),
    )  # fmt: skip
    with open_stream(server, job, alice_client) as response:
        for message in read(response):
            assert "#job-samples" not in "\n".join(message.data)
            if message.event == "state":
                break

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import httpx
import pytest
import uvicorn
from asgiref.sync import sync_to_async
from django.conf import settings
from django.test import AsyncRequestFactory, Client
from django.urls import reverse
from django.utils import timezone

from jobs import streams
from jobs.models import Job, JobState, Worker
from jobs.progress import add
from jobs.streams import Watcher
from studio.accounts.models import Membership, User
from studio.asgi import application
from tests.jobs.conftest import MakeJob
from tests.jobs.test_series import step_event
from workers.events import PhaseEvent

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def server() -> Iterator[str]:
    """The real ASGI application behind uvicorn, in a thread of its own."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    running = uvicorn.Server(uvicorn.Config(application, port=port, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    while not running.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{port}"
    running.should_exit = True
    thread.join(timeout=20)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "SECONDS_BETWEEN_MESSAGES", 0.02)
    monkeypatch.setattr(streams, "SECONDS_BETWEEN_LOOKS", 0.2)


@pytest.fixture
def running(make_job: MakeJob) -> Job:
    worker = Worker.objects.create(
        host="box", slot=0, process_id=1, device="CPU", device_kind="cpu", version="1", last_seen=timezone.now()
    )
    return make_job(
        state=JobState.RUNNING, phase="training", attempt=1, num_steps=1000, worker=worker,
        lease_until=timezone.now() + timedelta(minutes=5), started_at=timezone.now(),
    )  # fmt: skip


@dataclass
class Message:
    event: str = ""
    id: str = ""
    data: list[str] = field(default_factory=list)

    def json(self) -> Any:
        return json.loads("\n".join(self.data))

    def steps(self) -> list[int]:
        return [row[0] for row in self.json()["points"]]


def read(response: httpx.Response) -> Iterator[Message]:
    """Server-sent events as a browser reads them."""
    message = Message()
    for line in response.iter_lines():
        if not line:
            if message.data:
                yield message
            message = Message()
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            message.data.append(value)
        elif name in {"event", "id"}:
            setattr(message, name, value)


def open_stream(server: str, job: Job, client: Client, last_id: str = "") -> Any:
    headers = {"Last-Event-ID": last_id} if last_id else {}
    cookie = client.cookies[settings.SESSION_COOKIE_NAME].value
    return httpx.stream(
        "GET", server + reverse("jobs:events", args=[job.pk]), headers=headers,
        cookies={settings.SESSION_COOKIE_NAME: cookie}, timeout=20,
    )  # fmt: skip


def test_reconnecting_loses_no_step_and_doubles_none(server: str, running: Job, alice_client: Client) -> None:
    last_step = 1500

    def train() -> None:
        for step in range(1, last_step + 1):
            add(running.pk, 1, step_event(step))
            time.sleep(0.001)

    trainer = threading.Thread(target=train)
    seen: list[int] = []
    last_id, num_connections = "", 0
    with open_stream(server, running, alice_client) as response:
        messages = read(response)
        first = next(messages)
        assert first.event == "points"
        assert first.json()["reset"] is True
        last_id = first.id
        trainer.start()
    while len(seen) < last_step:
        num_connections += 1
        assert num_connections < 200
        with open_stream(server, running, alice_client, last_id) as response:
            for count, message in enumerate(read(response)):
                if message.event == "points":
                    assert "reset" not in message.json(), "it goes on where it was cut"
                    seen += message.steps()
                    last_id = message.id
                if count >= 3 or len(seen) >= last_step:
                    break
    trainer.join()
    assert num_connections > 3
    assert seen == list(range(1, last_step + 1))


def test_an_id_that_the_stream_does_not_have_gives_a_snapshot(server: str, running: Job, alice_client: Client) -> None:
    for step in (1, 2, 3):
        add(running.pk, 1, step_event(step))
    for last_id in ("", "1-0", "nonsense", "99999999999999-0"):
        with open_stream(server, running, alice_client, last_id) as response:
            first = next(read(response))
            assert first.json()["reset"] is True, last_id
            assert first.steps() == [1, 2, 3]


def test_it_sends_fragments_and_ends_with_the_job(server: str, running: Job, alice_client: Client) -> None:
    found = []
    with open_stream(server, running, alice_client) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["x-accel-buffering"] == "no"
        assert response.headers["cache-control"] == "no-store"
        for message in read(response):
            found.append(message)
            if len(found) == 2:
                add(running.pk, 1, PhaseEvent(phase="evaluating"))
                add(running.pk, 1, step_event(7))
                Job.objects.filter(pk=running.pk).update(
                    state=JobState.FAILED, lease_until=None, finished_at=timezone.now(), failure_message="Broken."
                )
    assert found[1].event == ""
    assert 'hx-target="#job-progress"' in "\n".join(found[1].data)
    assert [message.event for message in found if message.event not in {"points", ""}] == [
        "state", "state", "end",
    ]  # fmt: skip
    assert found[-1].event == "end", "the response ended by itself"
    assert 7 in [step for message in found if message.event == "points" for step in message.steps()]


def test_every_connection_says_once_where_the_job_stands(server: str, running: Job, alice_client: Client) -> None:
    # The page may be older than the connection, so even a job that does not change anew is told.
    with open_stream(server, running, alice_client) as response:
        assert stands(read(response)) == {"state": "running", "phase": "training"}
    add(running.pk, 1, step_event(1))
    last_id = ""
    with open_stream(server, running, alice_client) as response:
        last_id = next(read(response)).id
    Job.objects.filter(pk=running.pk).update(phase="evaluating")
    with open_stream(server, running, alice_client, last_id) as response:
        assert stands(read(response)) == {"state": "running", "phase": "evaluating"}


@pytest.mark.parametrize(
    "changes",
    [{"phase": "evaluating"}, {"state": JobState.CANCELLING, "stop_mode": "keep"}, {"attempt": 2}],
    ids=["phase", "state", "attempt"],
)
def test_what_the_header_depends_on_is_told_when_it_changes(
    server: str, running: Job, alice_client: Client, changes: dict[str, Any]
) -> None:
    with open_stream(server, running, alice_client) as response:
        messages = read(response)
        stands(messages)
        Job.objects.filter(pk=running.pk).update(**changes)
        expected = {"state": str(changes.get("state", "running")), "phase": changes.get("phase", "training")}
        assert stands(messages) == expected


def test_giving_up_what_was_to_be_kept_is_told(server: str, running: Job, alice_client: Client) -> None:
    Job.objects.filter(pk=running.pk).update(state=JobState.CANCELLING, stop_mode="keep")
    with open_stream(server, running, alice_client) as response:
        messages = read(response)
        stands(messages)
        Job.objects.filter(pk=running.pk).update(stop_mode="now")
        assert stands(messages)["state"] == "cancelling"


def stands(messages: Iterator[Message]) -> Any:
    """What the next message about the job's standing says."""
    return next(message for message in messages if message.event == "state").json()


def test_a_stranger_an_outsider_and_an_anonymous_get_nothing(server: str, running: Job, charlie_client: Client) -> None:
    with open_stream(server, running, charlie_client) as response:
        assert response.status_code == 404
    answer = httpx.get(server + reverse("jobs:events", args=[running.pk]))
    assert answer.status_code == 404


def test_it_ends_soon_after_membership_ends(
    server: str, running: Job, alice_client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "SECONDS_BETWEEN_CHECKS", 0.1)
    with open_stream(server, running, alice_client) as response:
        messages = read(response)
        next(messages)
        Membership.objects.all().delete()
        add(running.pk, 1, step_event(1))
        assert [message.event for message in messages][-1] == "end"


def test_a_person_has_a_limited_number_of_open_streams(
    server: str, running: Job, alice_client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "MAX_STREAMS_PER_USER", 1)
    with open_stream(server, running, alice_client) as first:
        messages = read(first)
        next(messages)
        with open_stream(server, running, alice_client) as second:
            assert second.status_code == 429
    until = time.monotonic() + 10
    while streams._open_streams and time.monotonic() < until:
        add(running.pk, 1, step_event(1))
        time.sleep(0.1)
    assert not streams._open_streams, "a closed page gives its place back"


def test_a_browser_that_leaves_before_the_first_message_takes_no_place(
    running: Job, alice: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "MAX_STREAMS_PER_USER", 1)
    monkeypatch.setattr(streams, "_watching_user", lambda request, job_id: alice.pk)
    request = AsyncRequestFactory().get(reverse("jobs:events", args=[running.pk]))

    async def leave_at_once() -> int:
        response = await streams.events(request, running.pk)
        await sync_to_async(response.close)()  # as Django's own handler does
        return response.status_code

    assert [asyncio.run(leave_at_once()) for _ in range(3)] == [200, 200, 200]
    assert not streams._open_streams


def test_an_open_stream_holds_no_thread_and_no_connection(server: str, running: Job, alice_client: Client) -> None:
    from django.db import connection

    def num_connections() -> int:
        with connection.cursor() as cursor:
            cursor.execute("SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()")
            return int(cursor.fetchone()[0])

    reading: list[Iterator[Message]] = []  # a reader that is collected closes its stream
    opened = [open_stream(server, running, alice_client) for _ in range(12)]
    with opened[0] as response:
        messages = read(response)
        next(messages)
        time.sleep(0.3)
        threads, connections = threading.active_count(), num_connections()
    try:
        for stream in opened[1:]:
            reading.append(read(stream.__enter__()))
            next(reading[-1])
        time.sleep(0.5)
        # The shared pool may grow to its fixed size; twelve streams would need twelve more threads of their own.
        assert threading.active_count() - threads < 8
        assert num_connections() - connections < 8
    finally:
        for stream in opened[1:]:
            stream.__exit__(None, None, None)


def test_a_queue_that_is_full_says_so_and_stays_bounded() -> None:
    async def fill() -> Watcher:
        watcher = Watcher()
        for number in range(streams.MAX_WAITING_ENTRIES + 5):
            watcher.put((f"{number}-0".encode(), {}))
        return watcher

    watcher = asyncio.run(fill())
    assert watcher.fell_behind
    assert watcher.queue.qsize() == streams.MAX_WAITING_ENTRIES


def test_a_watcher_that_falls_behind_still_gets_everything(
    server: str, running: Job, alice_client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "MAX_WAITING_ENTRIES", 5)
    monkeypatch.setattr(streams, "SECONDS_BETWEEN_MESSAGES", 0.5)
    seen: list[int] = []
    with open_stream(server, running, alice_client) as response:
        messages = read(response)
        next(messages)
        for step in range(1, 301):
            add(running.pk, 1, step_event(step))
        for message in messages:
            if message.event == "points":
                seen += message.steps()
            if len(seen) >= 300:
                break
    assert seen == list(range(1, 301))

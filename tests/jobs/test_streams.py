from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis
import uvicorn
from asgiref.sync import sync_to_async
from django.conf import settings
from django.test import AsyncRequestFactory, Client
from django.urls import reverse
from django.utils import timezone

from jobs import feeds, progress, series, streams
from jobs.feeds import RESET, Feed, Hub, Watcher
from jobs.models import Job, JobEvent, JobState, MetricPoint, Worker
from jobs.progress import add, add_gap, stream_key
from jobs.watching import Visit, watching_users
from studio.accounts.models import Membership, User
from studio.asgi import application
from studio.embedded import EmbeddedServers
from studio.serving import DrainingServer
from tests.jobs.conftest import MakeJob
from tests.jobs.test_series import step_event
from tests.processes import test_environment, wait_for
from workers.events import PhaseEvent

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def server() -> Iterator[str]:
    """The real ASGI application behind uvicorn, in a thread of its own."""
    with fresh_server() as url:
        yield url


@contextmanager
def fresh_server() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        running = DrainingServer(uvicorn.Config(application, log_level="warning", lifespan="off"))
        thread = threading.Thread(target=running.run, args=[[listener]], daemon=True)
        thread.start()
        wait_for(lambda: running.started, what="the start of the server")
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        running.should_exit = True
        thread.join(timeout=60)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeds, "SECONDS_BETWEEN_POINTS", 0.01)
    monkeypatch.setattr(feeds, "SECONDS_BETWEEN_RENDERINGS", 0.1)
    monkeypatch.setattr(feeds, "SECONDS_BETWEEN_LOOKS", 0.2)


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
            message = Message(id=message.id)
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
        cookies={settings.SESSION_COOKIE_NAME: cookie}, timeout=60,
    )  # fmt: skip


def test_reconnecting_loses_no_step_and_doubles_none(server: str, running: Job, alice_client: Client) -> None:
    last_step, portion = 1500, 300
    has_reconnected = threading.Semaphore(0)

    def train() -> None:
        for step in range(1, last_step + 1):
            add(running.pk, 1, step_event(step))
            time.sleep(0.001)
            # However slow connections are, several are needed for all the steps.
            if step % portion == 0:
                has_reconnected.acquire(timeout=60)

    add(running.pk, 1, step_event(0))
    trainer = threading.Thread(target=train)
    seen: list[int] = []
    last_id, num_connections = "", 0
    with open_stream(server, running, alice_client) as response:
        messages = read(response)
        assert next(messages).event == "reset"
        assert next(messages).steps() == [0]
        trainer.start()
        while not seen:
            message = next(messages)
            if message.event == "points":
                seen += message.steps()
                last_id = message.id
    while len(seen) < last_step:
        num_connections += 1
        assert num_connections < 200
        with open_stream(server, running, alice_client, last_id) as response:
            has_reconnected.release()
            for count, message in enumerate(read(response)):
                assert message.event != "reset", "it goes on where it was cut"
                if message.event == "points":
                    seen += message.steps()
                    last_id = message.id
                if count >= 3 or len(seen) % portion == 0:
                    break
    trainer.join()
    assert num_connections > 3
    assert seen == list(range(1, last_step + 1))


def test_an_id_that_the_stream_does_not_have_gives_a_snapshot(server: str, running: Job, alice_client: Client) -> None:
    for step in (1, 2, 3):
        add(running.pk, 1, step_event(step))
    for last_id in ("", "0-0", "1-0", "nonsense", "99999999999999-0", "9" * 30 + "-0", "1-" + "1" * 10_000, "1-0\t2-0"):
        with open_stream(server, running, alice_client, last_id) as response:
            messages = read(response)
            assert next(messages).event == "reset", last_id
            snapshot = next(messages)
            assert snapshot.steps() == [1, 2, 3]
            assert snapshot.id, "from here a browser goes on"


def test_an_id_older_than_what_the_stream_still_holds_gives_a_snapshot(
    server: str, running: Job, alice_client: Client
) -> None:
    add(running.pk, 1, step_event(1))
    with open_stream(server, running, alice_client) as response:
        last_id = first_points(read(response)).id
    for step in (2, 3):
        add(running.pk, 1, step_event(step))
    client().xtrim(stream_key(running.pk), maxlen=1, approximate=False)
    # Another process's memory holds nothing of it, either.
    with fresh_server() as other, open_stream(other, running, alice_client, last_id) as response:
        assert next(read(response)).event == "reset"


def test_it_sends_fragments_and_ends_with_the_job(server: str, running: Job, alice_client: Client) -> None:
    found = []
    with open_stream(server, running, alice_client) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["x-accel-buffering"] == "no"
        assert response.headers["cache-control"] == "no-store"
        for message in read(response):
            found.append(message)
            if message.event == "state" and len(found) < 6:
                add(running.pk, 1, PhaseEvent(phase="evaluating"))
                add(running.pk, 1, step_event(7))
                Job.objects.filter(pk=running.pk).update(
                    state=JobState.FAILED, lease_until=None, finished_at=timezone.now(), failure_message="Broken."
                )
    fragments = ["\n".join(message.data) for message in found if message.event == ""]
    assert 'hx-target="#job-progress"' in fragments[0]
    assert 'hx-target="#job-events"' in fragments[1]
    assert [message.event for message in found if message.event not in {"points", ""}] == [
        "reset", "state", "state", "end",
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
        last_id = first_points(read(response)).id
    Job.objects.filter(pk=running.pk).update(phase="evaluating")
    with open_stream(server, running, alice_client, last_id) as response:
        messages = read(response)
        while stands(messages) != {"state": "running", "phase": "evaluating"}:
            pass  # what was known a moment ago comes first


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


def first_points(messages: Iterator[Message]) -> Message:
    return next(message for message in messages if message.event == "points")


def client() -> Any:
    return redis.Redis.from_url(settings.REDIS_URL)


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
    monkeypatch.setattr(feeds, "SECONDS_BETWEEN_CHECKS", 0.1)
    with open_stream(server, running, alice_client) as response:
        messages = read(response)
        next(messages)
        Membership.objects.all().delete()
        add(running.pk, 1, step_event(1))
        assert [message.event for message in messages][-1] == "end"


def test_a_person_has_a_limited_number_of_open_streams(
    server: str, running: Job, alice_client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feeds, "MAX_STREAMS_PER_USER", 1)
    with open_stream(server, running, alice_client) as first:
        messages = read(first)
        next(messages)
        with open_stream(server, running, alice_client) as second:
            assert second.status_code == 429
            assert second.headers["retry-after"] == "30"

    def opens_again() -> bool:
        with open_stream(server, running, alice_client) as again:
            return bool(again.status_code == 200)

    wait_for(opens_again, seconds=60, what="a closed page giving its place back")


def test_a_browser_that_leaves_before_the_first_message_takes_no_place(
    running: Job, alice: User, alice_client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feeds, "MAX_STREAMS_PER_USER", 1)
    request = AsyncRequestFactory().get(reverse("jobs:events", args=[running.pk]))
    request.COOKIES[settings.SESSION_COOKIE_NAME] = alice_client.cookies[settings.SESSION_COOKIE_NAME].value

    async def leave_at_once() -> int:
        response = await streams.events(request, running.pk)
        await sync_to_async(response.close)()  # as Django's own handler does
        assert not feeds.get_hub().open_streams
        return response.status_code

    assert [asyncio.run(leave_at_once()) for _ in range(3)] == [200, 200, 200]


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


def watcher_of(user: User, job: Job) -> Watcher:
    return Watcher(Visit("session", job.pk), user.pk)


def test_a_slow_watcher_is_closed_with_a_reset_and_keeps_nothing(running: Job, alice: User) -> None:
    async def fill() -> list[Any]:
        watcher, feed = watcher_of(alice, running), Feed(running.pk)
        feed.watchers.add(watcher)
        for number in range(1, feeds.MAX_WAITING_MESSAGES + 50):
            feed.take([(f"{number}-0".encode(), fields(1, number))])
            feed.flush()
        return [watcher.queue.get_nowait() for _ in range(watcher.queue.qsize())]

    assert asyncio.run(fill()) == [RESET, None]


def fields(attempt: int, step: int) -> dict[bytes, bytes]:
    return {b"attempt": str(attempt).encode(), b"event": step_event(step).model_dump_json().encode()}


def test_a_watcher_that_never_reads_is_cut_off_and_its_place_is_free(
    server: str, running: Job, alice_client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feeds, "MAX_WAITING_MESSAGES", 10)
    monkeypatch.setattr(feeds, "SECONDS_TO_LEAVE", 0.1)
    monkeypatch.setattr(feeds, "MAX_STREAMS_PER_USER", 1)
    host, port = server.removeprefix("http://").split(":")
    cookie = alice_client.cookies[settings.SESSION_COOKIE_NAME].value
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect((host, int(port)))
        path = reverse("jobs:events", args=[running.pk])
        deaf.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nCookie: sessionid={cookie}\r\n\r\n".encode())
        assert deaf.recv(15) == b"HTTP/1.1 200 OK"
        long = "x" * 400_000

        def says_until_its_place_is_free() -> bool:
            JobEvent.objects.filter(job=running).delete()
            JobEvent.objects.create(job=running, sequence=int(time.monotonic() * 1000), attempt=1, text=long)
            with open_stream(server, running, alice_client) as other:
                return bool(other.status_code == 200)

        wait_for(says_until_its_place_is_free, seconds=120, what="the end of the deaf watcher")


def test_what_a_fenced_attempt_says_after_its_successor_began_is_not_shown(
    server: str, running: Job, alice_client: Client
) -> None:
    add(running.pk, 1, step_event(1))
    with open_stream(server, running, alice_client) as response:
        messages = read(response)
        last_id = first_points(messages).id
        for attempt, step in ((1, 2), (2, 3), (1, 99), (2, 4)):
            add(running.pk, attempt, step_event(step))
        seen: list[int] = []
        while 4 not in seen:
            seen += first_points(messages).steps()
    assert seen == [2, 3, 4], "live"
    with open_stream(server, running, alice_client) as response:
        messages = read(response)
        assert next(messages).event == "reset"
        seen = []
        while 4 not in seen:
            seen += first_points(messages).steps()
        assert seen == [1, 2, 3, 4], "in a snapshot, and in what happened since it was made"
    with fresh_server() as other, open_stream(other, running, alice_client, last_id) as response:
        assert first_points(read(response)).steps() == [2, 3, 4], "replayed from the stream"


def test_a_fenced_attempt_is_silent_as_soon_as_the_row_names_its_successor(
    server: str, running: Job, alice_client: Client
) -> None:
    with open_stream(server, running, alice_client) as response:
        messages = read(response)
        stands(messages)
        Job.objects.filter(pk=running.pk).update(attempt=2)
        stands(messages)
        add(running.pk, 1, step_event(99))
        add(running.pk, 2, step_event(5))
        assert first_points(messages).steps() == [5]


def test_a_gap_in_the_stream_gives_a_snapshot(server: str, running: Job, alice_client: Client) -> None:
    add(running.pk, 1, step_event(1))
    with open_stream(server, running, alice_client) as response:
        messages = read(response)
        last_id = first_points(messages).id
        stored(running, 2)
        add_gap(running.pk, 1, 1)
        add(running.pk, 1, step_event(3))
        assert next(message.event for message in messages if message.event not in {"", "state"}) == "reset"
        seen: list[int] = []
        while 3 not in seen:
            seen += first_points(messages).steps()
        assert 2 in seen, "what the stream lost comes from Postgres"
    with fresh_server() as other, open_stream(other, running, alice_client, last_id) as response:
        assert next(read(response)).event == "reset"


def stored(job: Job, *steps: int) -> None:
    for step in steps:
        MetricPoint.objects.create(job=job, attempt=1, step=step, loss=1.0, at=timezone.now())


def test_losing_all_of_redis_gives_every_open_page_a_snapshot_from_postgres(
    server: str, running: Job, alice_client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feeds, "SECONDS_BETWEEN_SIGNS", 0.1)
    add(running.pk, 1, step_event(1))
    with open_stream(server, running, alice_client) as response:
        messages = read(response)
        assert first_points(messages).steps() == [1]
        stored(running, 1, 2)
        client().flushall()
        assert next(message.event for message in messages if message.event not in {"", "state"}) == "reset"
        assert first_points(messages).steps() == [1, 2]
        add(running.pk, 1, step_event(3))
        assert first_points(messages).steps() == [3]


def test_watchers_need_no_connections_to_redis_of_their_own(server: str, running: Job, alice_client: Client) -> None:
    def num_connections() -> int:
        return len(client().client_list())

    with ExitStack() as opened:
        numbers = []
        for _ in range(feeds.MAX_STREAMS_PER_USER):
            response = opened.enter_context(open_stream(server, running, alice_client))
            stands(read(response))
            numbers.append(num_connections())
    assert max(numbers[1:]) - numbers[0] <= 4


def test_each_browser_is_told_another_time_to_come_back(server: str, running: Job, alice_client: Client) -> None:
    def retry_milliseconds() -> int:
        with open_stream(server, running, alice_client) as response:
            line = next(line for line in response.iter_lines() if line.startswith("retry:"))
            return int(line.partition(":")[2])

    found = {retry_milliseconds() for _ in range(6)}
    assert len(found) > 1
    assert all(low <= one <= high for low, high in [streams.RETRY_MILLISECONDS] for one in found)


def test_a_strange_host_name_is_refused(server: str, running: Job) -> None:
    path = reverse("jobs:events", args=[running.pk])
    assert httpx.get(server + path, headers={"Host": "evil.example"}).status_code == 400


def test_everybody_who_comes_at_once_is_looked_up_together(
    running: Job, alice: User, alice_client: Client, charlie_client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def counting(visits: Any) -> Any:
        asked.append(len(visits))
        return watching_users(visits)

    monkeypatch.setattr(feeds, "watching_users", counting)
    keys = [one.cookies[settings.SESSION_COOKIE_NAME].value for one in (alice_client, charlie_client)]

    async def come() -> list[int | None]:
        hub = Hub()
        return await asyncio.gather(*(hub.admit(Visit(key, running.pk)) for key in [*keys, "unknown"] * 30))

    assert asyncio.run(come()) == [alice.pk, None, None] * 30
    assert len(asked) <= 2


def test_a_redis_that_is_killed_closes_no_page_and_is_followed_by_a_snapshot(
    own_redis: EmbeddedServers, server: str, running: Job, alice_client: Client
) -> None:
    add(running.pk, 1, step_event(1))
    with open_stream(server, running, alice_client) as response:
        messages = read(response)
        assert first_points(messages).steps() == [1]
        os.kill(own_redis.pids()["valkey"], signal.SIGKILL)
        wait_for(lambda: not own_redis.pids(), what="the end of Redis")
        stored(running, 1, 2)
        Job.objects.filter(pk=running.pk).update(phase="evaluating")
        while stands(messages)["phase"] != "evaluating":
            pass  # the row is still looked at
        own_redis.revive()
        assert next(message.event for message in messages if message.event not in {"", "state"}) == "reset"
        assert first_points(messages).steps() == [1, 2]
        add(running.pk, 1, step_event(3))
        assert first_points(messages).steps() == [3]


def test_what_is_said_while_redis_is_away_is_published_when_it_is_back(
    own_redis: EmbeddedServers, running: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "SILENT_SECONDS", 0.1)
    publisher = progress.Publisher(running.pk, 1)
    publisher.start()
    wait_for(lambda: client().xlen(stream_key(running.pk)) == 1, what="the word that begins an attempt")
    os.kill(own_redis.pids()["valkey"], signal.SIGKILL)
    wait_for(lambda: not own_redis.pids(), what="the end of Redis")
    for step in range(1, progress.MAX_WAITING + 100):
        publisher.publish(step_event(step))
    own_redis.revive()
    wait_for(lambda: publisher._events.empty(), what="the events")
    publisher.publish(step_event(5000))
    publisher.finish()
    entries = [fields for _entry_id, fields in client().xrange(stream_key(running.pk))]
    assert int(sum(int(fields.get(b"lost", 0)) for fields in entries)) == publisher.num_dropped > 0
    parsed = [found.event for fields in entries if (found := series.parse_entry(fields))]
    said = [event.step for event in parsed if event.type == "step"]
    assert said == sorted(said), "in order"
    assert said[0] == 1
    assert said[-1] == 5000


def test_a_web_process_that_stops_ends_its_streams_and_waits_for_none(
    running: Job, alice_client: Client, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with (tmp_path / "web.log").open("wb") as log:
            web = subprocess.Popen(
                [sys.executable, "-m", "studio.serving", str(listener.fileno())], pass_fds=[listener.fileno()],
                cwd=settings.ROOT, env=test_environment() | {"STUDIO_DEBUG": "1"}, stdout=log, stderr=log,
            )  # fmt: skip
        try:
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            with ExitStack() as opened:
                streams_ = [opened.enter_context(open_stream(url, running, alice_client)) for _ in range(10)]
                reading = [read(one) for one in streams_]
                for messages in reading:
                    stands(messages)
                web.send_signal(signal.SIGTERM)
                for messages in reading:
                    assert "end" not in [message.event for message in messages], "so that a browser comes back"
            web.wait(60)
        finally:
            web.kill()
            web.wait()
    assert web.returncode == -signal.SIGTERM
    assert "exceeded" not in (tmp_path / "web.log").read_text(), "nothing had to be cut off"

"""The benchmark of live pages.

    python -m tests.bench.watchers [--watchers 1000 --jobs 50 --seconds 60 --reconnects 3]

It starts servers of its own and the web process as `up` starts it, signs people in, and has client processes hold
one event stream per watcher while the events of running jobs are published at one per second and job. Some times all
sockets are closed at once and opened again with their Last-Event-ID. It prints what was lost (must be 0) and doubled
(must be 0), the latencies from the publisher's clock to the client's receipt, and what the web process used; then how
long that process needs to end with open streams.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import redis

ROOT = Path(__file__).resolve().parents[2]
WATCHERS_PER_USER = 10
NUM_CLIENTS = 2
OPENED_TOGETHER = 25
NUM_DRAINED = 200
# After the last event: whatever is under way has arrived by then, or is lost.
SETTLE_SECONDS = 20.0
PATIENCE_SECONDS = 180.0


@dataclass
class Options:
    """What the command line asks for."""

    watchers: int
    jobs: int
    seconds: int
    reconnects: int


@dataclass
class Seen:
    """What one client process has received."""

    received: int = 0
    lost: int = 0
    doubled: int = 0
    resets: int = 0
    refused: int = 0
    # Milliseconds of every event, and of those that were published while the watcher was connected.
    latencies: list[float] = field(default_factory=list)
    live_latencies: list[float] = field(default_factory=list)
    cpu_seconds: float = 0.0


class Stream(asyncio.Protocol):
    """One watcher: a raw connection that reads server-sent events and remembers which steps it has seen."""

    def __init__(self, crowd: Crowd, path: str, cookie: str) -> None:
        self.crowd, self.path, self.cookie = crowd, path, cookie
        self.last_id = ""
        self.steps: dict[int, int] = {}
        self.transport: asyncio.Transport | None = None
        self.is_known = False
        self.begin()

    def begin(self) -> None:
        self.wire = self.text = b""
        self.is_open = self.after_reset = False
        self.opened_at = 0.0

    async def open(self) -> None:
        """Connect, again if need be, until the server has answered."""
        loop = asyncio.get_running_loop()
        while not self.crowd.is_over:
            self.begin()
            self.answered: asyncio.Future[bool] = loop.create_future()
            with contextlib.suppress(OSError):
                await loop.create_connection(lambda: self, *self.crowd.address)
                if await self.answered:
                    return
            self.crowd.seen.refused += 1
            await asyncio.sleep(0.5)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        place = f"Last-Event-ID: {self.last_id}\r\n" if self.last_id else ""
        transport.write(f"GET {self.path} HTTP/1.1\r\nHost: 127.0.0.1\r\nCookie: {self.cookie}\r\n{place}\r\n".encode())

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.answered.done():
            self.answered.set_result(False)
        elif self.is_open and not self.crowd.is_over:
            # Not by us: as a browser would, it comes back.
            self.is_open = False
            self.crowd.spawn(self.open())

    def drop(self) -> None:
        """Close the socket at once."""
        self.is_open = False
        if self.transport is not None:
            self.transport.abort()

    def data_received(self, data: bytes) -> None:
        self.wire += data
        if not self.is_open:
            head, end, rest = self.wire.partition(b"\r\n\r\n")
            if not end:
                return
            if not head.startswith(b"HTTP/1.1 200"):
                assert self.transport is not None
                self.transport.abort()
                return
            self.is_open, self.opened_at, self.wire = True, time.time(), rest
            self.answered.set_result(True)
        while True:
            size, end, rest = self.wire.partition(b"\r\n")
            if not end or len(rest) < (length := int(size, 16)) + 2:
                break
            self.text += rest[:length]
            self.wire = rest[length + 2 :]
        *messages, self.text = self.text.split(b"\n\n")
        for message in messages:
            self.take(message)

    def take(self, message: bytes) -> None:
        """One message. Only points and resets are looked into; pages do the rest."""
        if b"event: reset" in message:
            self.crowd.seen.resets += self.is_known
            self.after_reset, self.last_id = True, ""
        if b"event: points" not in message:
            return
        self.is_known = True
        for line in message.split(b"\n"):
            if line.startswith(b"id: "):
                self.last_id = line[4:].decode()
            elif line.startswith(b"data: "):
                self.take_points(json.loads(line[6:])["points"])
        self.after_reset = False

    def take_points(self, points: list[list[float]]) -> None:
        now, seen = time.time(), self.crowd.seen
        for point in points:
            step, published = int(point[0]), point[4]
            if self.after_reset:
                self.steps[step] = max(1, self.steps.get(step, 0))
                continue
            self.steps[step] = self.steps.get(step, 0) + 1
            seen.latencies.append(1000 * (now - published))
            if published >= self.opened_at:
                seen.live_latencies.append(1000 * (now - published))


class Crowd:
    """All watchers of one client process."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.address = address
        self.seen = Seen()
        self.is_over = False
        self.tasks: set[asyncio.Task[None]] = set()

    def spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)


async def watch(asked: dict[str, Any]) -> Seen:
    """Hold the streams that a client process was asked for until everything was published."""
    crowd = Crowd((asked["host"], asked["port"]))
    streams = [Stream(crowd, path, cookie) for path, cookie in asked["watchers"]]
    # Pages are opened little by little; it is the coming back that happens at once.
    for first in range(0, len(streams), OPENED_TOGETHER):
        await asyncio.gather(*(stream.open() for stream in streams[first : first + OPENED_TOGETHER]))
    while not all(stream.is_known for stream in streams):
        await asyncio.sleep(0.1)
    print("ready", flush=True)
    plan = json.loads(await asyncio.to_thread(sys.stdin.readline))
    cpu = time.process_time()
    for moment in plan["reconnect_at"]:
        await asyncio.sleep(max(0.0, moment - time.time()))
        for stream in streams:
            stream.drop()
        await asyncio.gather(*(stream.open() for stream in streams))
    await asyncio.to_thread(sys.stdin.readline)
    # Everything was published. What is under way gets its time; what does not come at all is lost.
    deadline = time.monotonic() + SETTLE_SECONDS
    while time.monotonic() < deadline and any(len(stream.steps) < plan["num_steps"] for stream in streams):
        await asyncio.sleep(0.1)
    seen = crowd.seen
    seen.cpu_seconds = time.process_time() - cpu
    for stream in streams:
        counts = [stream.steps.get(step, 0) for step in range(1, plan["num_steps"] + 1)]
        seen.received += sum(count > 0 for count in counts)
        seen.lost += sum(count == 0 for count in counts)
        seen.doubled += sum(max(0, count - 1) for count in counts)
    print(json.dumps(asdict(seen)), flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    crowd.is_over = True
    for stream in streams:
        stream.drop()
    return seen


def publish(asked: dict[str, Any]) -> None:
    """Publish one event per second of every job, by the product's own code; its time travels as gradient norm."""
    from uuid import UUID

    _set_up_django()
    from jobs.progress import Publisher
    from workers.events import StepEvent

    publishers = [Publisher(UUID(job_id), 1) for job_id in asked["jobs"]]
    for publisher in publishers:
        publisher.start()
    print("ready", flush=True)
    start_at = json.loads(sys.stdin.readline())["start_at"]
    for step in range(1, asked["num_steps"] + 1):
        for index, publisher in enumerate(publishers):
            moment = start_at + step - 1 + index / len(publishers)
            time.sleep(max(0.0, moment - time.time()))
            publisher.publish(
                StepEvent(
                    step=step, num_steps=asked["num_steps"], epoch=0.5, loss=1 + 1 / step, learning_rate=1e-4,
                    grad_norm=time.time(), num_tokens=4096, tokens_per_second=4096, seconds_left=60,
                    peak_memory_bytes=10**9,
                )
            )  # fmt: skip
    for publisher in publishers:
        publisher.finish()
    print(json.dumps({"dropped": sum(publisher.num_dropped for publisher in publishers)}), flush=True)


def _set_up_django() -> None:
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "studio.settings")
    import django

    django.setup()


class Studio:
    """Servers, rows and the web process of a benchmark, in a folder of its own."""

    def __init__(self, folder: Path, listener: socket.socket) -> None:
        from studio.launching import secret_key

        self.folder, self.listener = folder, listener
        self.host, self.port = listener.getsockname()
        os.environ |= {
            "STUDIO_DATA_DIR": str(folder), "STUDIO_SECRET_KEY": secret_key(folder), "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "DJANGO_SETTINGS_MODULE": "studio.settings",
        }  # fmt: skip
        self.web: subprocess.Popen[bytes]

    def start(self, stack: contextlib.ExitStack) -> None:
        """Start everything; the stack ends it."""
        from studio.embedded import embedded_servers
        from studio.launching import web_plan

        urls = stack.enter_context(embedded_servers(self.folder)).urls()
        os.environ |= {"DATABASE_URL": urls.database, "REDIS_URL": urls.redis}
        prepare = [sys.executable, "manage.py", "prepare"]
        subprocess.run(prepare, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        plan = web_plan(self.listener)
        log = stack.enter_context((self.folder / "web.log").open("wb"))
        self.web = subprocess.Popen(plan.command, pass_fds=plan.pass_fds, cwd=ROOT, stdout=log, stderr=log)
        stack.callback(self.web.wait)
        stack.callback(self.web.kill)
        _set_up_django()

    def make_jobs(self, number: int) -> list[str]:
        """Running jobs of one team, as their rows stand while a worker holds them."""
        from datetime import timedelta

        from django.utils import timezone

        from jobs.models import Job, JobState, Worker
        from studio.accounts.models import Team, User
        from tests.jobs.making import make_job

        team = Team.objects.create(name="Bench", slug="bench")
        owner = User.objects.create_user("bench-owner")
        worker = Worker.objects.create(
            host="bench", slot=0, process_id=1, device="CPU", device_kind="cpu", version="1", last_seen=timezone.now()
        )
        jobs = [make_job(team, owner, name=f"bench-{number}") for number in range(number)]
        Job.objects.filter(team=team).update(
            state=JobState.RUNNING, phase="training", attempt=1, worker=worker, started_at=timezone.now(),
            lease_until=timezone.now() + timedelta(hours=1), num_steps=1000,
        )  # fmt: skip
        return [str(job.pk) for job in jobs]

    def sign_in(self, number: int) -> list[str]:
        """Session cookies of this many people of the team, each signed in by a one-time link."""
        from studio.accounts.models import LoginLink, Membership, Role, Team, User

        cookies = []
        root = f"http://{self.host}:{self.port}"
        for index in range(number):
            user = User.objects.create_user(f"watcher-{index}")
            Membership.objects.create(user=user, team=Team.objects.get(slug="bench"), role=Role.VIEWER)
            path = f"/login/link/{LoginLink.create_for(user)}/"
            with httpx.Client(base_url=root, timeout=60) as browser:
                browser.get(path).raise_for_status()
                token = browser.cookies["csrftoken"]
                answer = browser.post(path, headers={"X-CSRFToken": token, "Referer": root})
                assert answer.status_code == httpx.codes.FOUND, answer.status_code
                cookies.append(f"sessionid={browser.cookies['sessionid']}")
        return cookies

    def inside(self) -> dict[str, int]:
        """What the web process and its servers count at this moment."""
        with redis.Redis.from_url(os.environ["REDIS_URL"]) as client:
            signs = [json.loads(client.get(key) or b"{}") for key in client.scan_iter("progress:reader:*")]
            num_redis = len(client.client_list())
        process = psutil.Process(self.web.pid)
        return {
            "tasks": sum(sign.get("tasks", 0) for sign in signs),
            "watchers": sum(sign.get("watchers", 0) for sign in signs),
            "redis_connections": num_redis,
            "threads": process.num_threads(),
            "open_files": process.num_fds(),
        }

    def peak_mib(self) -> float:
        """The most memory that the web process has held so far, in MiB."""
        status = Path(f"/proc/{self.web.pid}/status").read_text()
        kib = next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]
        return int(kib) / 1024

    def cpu_seconds(self) -> float:
        times = psutil.Process(self.web.pid).cpu_times()
        return times.user + times.system


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which this many percent lie, by the nearest rank."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))] if ordered else float("nan")


@contextlib.contextmanager
def process_of(role: str, asked: dict[str, Any]) -> Iterator[subprocess.Popen[str]]:
    """A process of this module that does one part and is told what on its standard input."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.bench.watchers", "--role", role],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        tell(process, asked)
        yield process
    finally:
        process.kill()
        process.wait()


def tell(process: subprocess.Popen[str], asked: dict[str, Any]) -> None:
    assert process.stdin is not None
    process.stdin.write(json.dumps(asked) + "\n")
    process.stdin.flush()


def answer_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, "a process of the benchmark has ended"
    return line


def run(options: Options) -> dict[str, Any]:
    """Everything, and its figures."""
    with tempfile.TemporaryDirectory(prefix="watchers-") as folder, contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        studio = Studio(Path(folder), listener)
        studio.start(stack)
        jobs = studio.make_jobs(options.jobs)
        cookies = studio.sign_in(-(-options.watchers // WATCHERS_PER_USER))
        paths = [f"/jobs/{job}/events/" for job in jobs]
        watchers = [
            (paths[number % len(paths)], cookies[number // WATCHERS_PER_USER]) for number in range(options.watchers)
        ]
        at_rest_mib = studio.peak_mib()
        address = {"host": studio.host, "port": studio.port}
        clients = [
            stack.enter_context(process_of("client", {**address, "watchers": watchers[part::NUM_CLIENTS]}))
            for part in range(NUM_CLIENTS)
        ]
        for client in clients:
            assert answer_of(client) == "ready\n"
        publisher = stack.enter_context(process_of("publisher", {"jobs": jobs, "num_steps": options.seconds}))
        assert answer_of(publisher) == "ready\n"
        time.sleep(2)
        before = studio.inside()
        start = time.time() + 2
        gap = options.seconds / (options.reconnects + 1)
        plan = {
            "num_steps": options.seconds,
            "reconnect_at": [start + gap * (number + 1) for number in range(options.reconnects)],
        }
        for one in (*clients, publisher):
            tell(one, plan | {"start_at": start})
        time.sleep(max(0.0, start - time.time()))
        cpu_before, began = studio.cpu_seconds(), time.time()
        dropped = json.loads(answer_of(publisher))["dropped"]
        for client in clients:
            tell(client, {})
        seen = [Seen(**json.loads(answer_of(client))) for client in clients]
        cpu, lasted = studio.cpu_seconds() - cpu_before, time.time() - began
        after = studio.inside()
        peak_mib = studio.peak_mib()
        for client in clients:
            tell(client, {})
        for client in clients:
            client.wait()
        drained, drain_seconds = drain(studio, watchers[:NUM_DRAINED])
        is_cut_off = "exceeded" in (studio.folder / "web.log").read_text()
    latencies = [one for part in seen for one in part.latencies]
    live = [one for part in seen for one in part.live_latencies]
    received = sum(part.received for part in seen)
    return {
        "expected": options.watchers * options.seconds,
        "received": received,
        "lost": sum(part.lost for part in seen),
        "doubled": sum(part.doubled for part in seen),
        "resets": sum(part.resets for part in seen),
        "refused": sum(part.refused for part in seen),
        "dropped": dropped,
        "latency_ms": [round(percentile(latencies, percent), 1) for percent in (50, 95, 99)],
        "live_latency_ms": [round(percentile(live, percent), 1) for percent in (50, 95, 99)],
        "replayed": len(latencies) - len(live),
        "rest_mib": round(at_rest_mib, 1),
        "peak_mib": round(peak_mib, 1),
        "cpu_share": round(cpu / lasted, 3),
        "cpu_us_per_event": round(1e6 * cpu / max(1, received)),
        "client_cpu_seconds": round(sum(part.cpu_seconds for part in seen), 1),
        "before": before,
        "after": after,
        "drained": drained,
        "drain_seconds": round(drain_seconds, 2),
        "is_cut_off": is_cut_off,
    }


def drain(studio: Studio, watchers: Sequence[tuple[str, str]]) -> tuple[int, float]:
    """How many streams were open when the web process was told to stop, and the seconds until it had ended."""
    with contextlib.ExitStack() as stack:
        opened = []
        for path, cookie in watchers:
            one = stack.enter_context(socket.create_connection((studio.host, studio.port), timeout=PATIENCE_SECONDS))
            one.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nCookie: {cookie}\r\n\r\n".encode())
            opened.append(one)
        num_open = sum(one.recv(15) == b"HTTP/1.1 200 OK" for one in opened)
        began = time.monotonic()
        studio.web.send_signal(signal.SIGTERM)
        studio.web.wait(PATIENCE_SECONDS)
        return num_open, time.monotonic() - began


def report(options: Options, found: dict[str, Any]) -> str:
    """The figures as lines for people."""

    def triple(name: str) -> str:
        return " / ".join(f"{one:.0f}" for one in found[name])

    def change(name: str) -> str:
        return f"{found['before'][name]} -> {found['after'][name]}"

    cores = len(os.sched_getaffinity(0))
    return f"""\
{options.watchers} watchers of {options.jobs} jobs, 1 event/s/job, {options.seconds} s
{options.reconnects} times all connections closed at once; {cores} cores, load average {os.getloadavg()[0]:.1f}
events          {found["expected"]:,} expected, {found["received"]:,} received,
                {found["lost"]} lost, {found["doubled"]} doubled, {found["dropped"]} not published
connections     {found["resets"]} resets, {found["refused"]} refused and tried again
latency, all    p50 / p95 / p99 {triple("latency_ms")} ms, from the publisher's clock to the client's receipt
latency, live   p50 / p95 / p99 {triple("live_latency_ms")} ms, without the {found["replayed"]:,} events replayed
memory          peak of the web process {found["peak_mib"]} MiB, {found["rest_mib"]} MiB before the first watcher
processor       {100 * found["cpu_share"]:.0f} % of a core, {found["cpu_us_per_event"]} us per event and watcher
leaks           before and after {options.watchers * options.reconnects:,} reconnects:
                tasks {change("tasks")}, Redis connections {change("redis_connections")},
                threads {change("threads")}, open files {change("open_files")}
drain           {found["drain_seconds"]} s from SIGTERM to the end of the web process with {found["drained"]} streams,
                {"some of which were cut off" if found["is_cut_off"] else "all of which it ended itself"}"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.watchers", description=__doc__)
    parser.add_argument("--watchers", type=int, default=1000)
    parser.add_argument("--jobs", type=int, default=50)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--reconnects", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print the figures as one line of JSON")
    parser.add_argument("--role", choices=["client", "publisher"], help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.role == "client":
        asyncio.run(watch(json.loads(sys.stdin.readline())))
    elif asked.role == "publisher":
        publish(json.loads(sys.stdin.readline()))
    else:
        options = Options(asked.watchers, asked.jobs, asked.seconds, asked.reconnects)
        found = run(options)
        print(json.dumps(found) if asked.json else report(options, found))


if __name__ == "__main__":
    main()

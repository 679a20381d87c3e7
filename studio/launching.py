"""One process tree over one data folder: what `manage.py up` does, step by step."""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from studio import serving
from studio.beside import KEY_NAME, LOCK_NAME
from studio.devices import Device, can_train, find_devices
from studio.embedded import EmbeddedServerError, EmbeddedServers, Listening
from studio.processes import Plan, ProcessTree

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_PORT = 8000
FIRST_ANSWER_SECONDS = 60.0
# A worker that is told to stop saves a checkpoint first.
WORKER_GRACE_SECONDS = 60.0

Say = Callable[[str], None]


class LaunchError(RuntimeError):
    """The studio cannot start; the message says why and what to do."""


@dataclass(frozen=True)
class Settings:
    """What the environment asks for. Empty URLs: embedded servers."""

    data_dir: Path
    database_url: str
    redis_url: str
    secret_key: str
    host: str
    # None: 8000, or a free one when that is taken.
    port: int | None
    # Where the embedded servers listen beside their sockets; None: nowhere.
    listening: Listening | None = None


def launch(settings: Settings, say: Say) -> None:
    """Start everything, stay until Ctrl-C or SIGTERM, then stop everything in order.

    Raises:
        LaunchError: it runs already, or something does not start.
    """
    stops = StopSignals()
    with hold_folder(settings.data_dir) as lock, _listen(settings.host, settings.port) as listener, stops:
        url = _url(listener)
        lock.write(url)
        servers = _start_servers(settings)
        lock.write(url, _embedded_urls(settings, servers))
        tree: ProcessTree | None = None
        try:
            environment = _environment(settings, servers)
            prepared = _prepare(environment)
            tree = ProcessTree(settings.data_dir / "logs", environment, say)
            tree.start(web_plan(listener))
            _wait_for_answer(tree, listener, stops)
            if not stops.num_asked:
                _greet(say, url, prepared, settings)
                _start_workers(tree, prepared, say)
            while not stops.num_asked:
                tree.tend(0.5)
                _revive(servers, say)
        except EmbeddedServerError as error:
            raise LaunchError(str(error)) from error
        finally:
            say("Stopping...")
            num_asked = stops.num_asked
            if tree is not None:
                # A second Ctrl-C means: now.
                tree.stop(hurry=lambda: stops.num_asked > max(num_asked, 1))
            if servers is not None:
                servers.stop()
    say("Stopped. Nothing of PEFT Studio runs any more.")


def web_plan(listener: socket.socket) -> Plan:
    """The web process; it inherits the listening socket."""
    descriptor = listener.fileno()
    return Plan(
        name="web",
        command=[sys.executable, "-m", serving.__name__, str(descriptor)],
        pass_fds=(descriptor,),
        grace_seconds=serving.GRACE_SECONDS + 3,
    )


def beat_plan(data_dir: Path) -> Plan:
    """The clock that queues recurring tasks; its memory may be lost at any time."""
    schedule = data_dir / "beat-schedule"
    return Plan(name="beat", command=_celery("beat", "--loglevel", "INFO", "--schedule", str(schedule)), stop_order=1)


def default_worker_plan() -> Plan:
    """The worker for short tasks: inspections, sweeps."""
    command = _celery("worker", "--queues", "default", "--pool", "threads", "--concurrency", "2", *_QUIET_WORKER,
                      "--hostname", "default@%h")  # fmt: skip
    return Plan(name="worker-default", command=command, stop_order=2)


def device_worker_plan(device: Device, *, suffix: str = "") -> Plan:
    """The worker of one device: it runs one job at a time. `suffix` tells apart what has one name on one machine."""
    name = f"{'gpu' if device.kind == 'cuda' else 'cpu'}{device.slot}"
    command = _celery("worker", "--queues", "gpu", "--pool", "solo", "--concurrency", "1", *_QUIET_WORKER,
                      "--hostname", f"{name}{suffix}@%h")  # fmt: skip
    return Plan(
        name=f"worker-{name}",
        command=command,
        environment={"STUDIO_SLOT": str(device.slot), "CUDA_VISIBLE_DEVICES": device.visible},
        grace_seconds=WORKER_GRACE_SECONDS,
        stop_order=2,
    )


_QUIET_WORKER = ("--prefetch-multiplier", "1", "--without-gossip", "--without-mingle", "--loglevel", "INFO")


def _celery(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "celery", "--app", "jobs", "--quiet", *arguments]


def secret_key(data_dir: Path) -> str:
    """The key that signs sessions, made once and kept where only its owner can read it."""
    path = data_dir / KEY_NAME
    with contextlib.suppress(FileExistsError):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_urlsafe(60))
            file.flush()
            os.fsync(file.fileno())
    key = path.read_text().strip()
    if len(key) < 50:
        # A start that was cut off between making the file and filling it.
        path.unlink()
        return secret_key(data_dir)
    return key


class StopSignals:
    """Counts Ctrl-C, SIGTERM and a closed terminal instead of dying of them."""

    NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.num_asked = 0
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        for number in self.NUMBERS:
            self._before[number] = signal.signal(number, self._count)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # as signal() itself returned it

    def _count(self, _number: int, _frame: FrameType | None) -> None:
        self.num_asked += 1


class _Lock:
    """The lock's file, in which the running studio leaves its URL and those of its embedded servers."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def write(self, url: str, servers: Mapping[str, str] | None = None) -> None:
        content = {"pid": os.getpid(), "url": url, "servers": dict(servers or {})}
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, json.dumps(content).encode(), 0)


@contextlib.contextmanager
def hold_folder(data_dir: Path) -> Iterator[_Lock]:
    """Hold the data folder; the kernel lets go of it when this process ends, however it ends."""
    try:
        if not data_dir.exists():
            data_dir.mkdir(parents=True)
            # Others may pass through, which PostgreSQL needs where it runs as somebody else, and list nothing.
            data_dir.chmod(0o711)
        descriptor = os.open(data_dir / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise LaunchError(
            f"The data folder {data_dir} cannot be written: {error.strerror}. Set STUDIO_DATA_DIR to a folder of yours."
        ) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LaunchError(_already_runs(data_dir, os.pread(descriptor, 4096, 0))) from None
        yield _Lock(descriptor)
        os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def _already_runs(data_dir: Path, content: bytes) -> str:
    try:
        found = json.loads(content)
    except ValueError:
        return f"PEFT Studio is just starting over {data_dir} in another terminal."
    return f"PEFT Studio already runs over {data_dir}: {found['url']} (process {found['pid']})."


@contextlib.contextmanager
def _listen(host: str, port: int | None) -> Iterator[socket.socket]:
    """A socket that listens from now on; visitors who come early wait in its queue."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        for wanted in [port] if port is not None else [DEFAULT_PORT, 0]:
            try:
                listener.bind((host, wanted))
                break
            except OSError as error:
                if wanted == 0 or port is not None:
                    raise LaunchError(
                        f"Cannot listen on {host}:{wanted}: {error.strerror}. Set STUDIO_HOST and STUDIO_PORT,"
                        " or leave STUDIO_PORT out for a free one."
                    ) from error
        listener.listen(128)
        yield listener
    finally:
        listener.close()


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    if host in {"0.0.0.0", "::"}:  # noqa: S104  compared, not bound
        host = "localhost"
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def _start_servers(settings: Settings) -> EmbeddedServers | None:
    """The embedded servers for whichever URL is missing."""
    if settings.database_url and settings.redis_url:
        return None
    try:
        servers = EmbeddedServers(settings.data_dir, settings.listening)
        servers.start(postgres=not settings.database_url, valkey=not settings.redis_url)
    except EmbeddedServerError as error:
        raise LaunchError(str(error)) from error
    return servers


def _embedded_urls(settings: Settings, servers: EmbeddedServers | None) -> dict[str, str]:
    """The variables whose servers were started here, for children and for commands beside this studio."""
    if servers is None:
        return {}
    urls = {"DATABASE_URL": servers.urls().database, "REDIS_URL": servers.urls().redis}
    given = {"DATABASE_URL": settings.database_url, "REDIS_URL": settings.redis_url}
    return {name: url for name, url in urls.items() if not given[name]}


def _revive(servers: EmbeddedServers | None, say: Say) -> None:
    for name in servers.revive() if servers is not None else []:
        say(f"{name} had ended and was started again.")


def _environment(settings: Settings, servers: EmbeddedServers | None) -> dict[str, str]:
    """What every child gets."""
    return {
        **os.environ,
        "DJANGO_SETTINGS_MODULE": "studio.settings",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
        "PYTHONUNBUFFERED": "1",
        "STUDIO_DATA_DIR": str(settings.data_dir),
        "STUDIO_SECRET_KEY": settings.secret_key or secret_key(settings.data_dir),
        "DATABASE_URL": settings.database_url,
        "REDIS_URL": settings.redis_url,
        **_embedded_urls(settings, servers),
    }


@dataclass(frozen=True)
class Prepared:
    """What `manage.py prepare` found and made."""

    login_secret: str
    wants_bundled_model: bool


def _prepare(environment: dict[str, str]) -> Prepared:
    done = subprocess.run(
        [sys.executable, str(ROOT / "manage.py"), "prepare", "--json"],
        env=environment, capture_output=True, text=True, check=False, start_new_session=True,
    )  # fmt: skip
    if done.returncode != 0:
        raise LaunchError(f"The database could not be prepared.\n{done.stderr.strip()}")
    return Prepared(**json.loads(done.stdout.splitlines()[-1]))


def _wait_for_answer(tree: ProcessTree, listener: socket.socket, stops: StopSignals) -> None:
    """Until the web process answers, so that the printed link works when it is read."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104  compared, not bound
    deadline = time.monotonic() + FIRST_ANSWER_SECONDS
    while not stops.num_asked:
        tree.tend(0.1)
        connection = http.client.HTTPConnection(host, port, timeout=2)
        try:
            connection.request("GET", "/livez")
            status = connection.getresponse().status
            if status == http.HTTPStatus.OK:
                return
            found = f"answers with status {status} instead of 200"
        except (OSError, http.client.HTTPException):
            found = "does not answer"
        finally:
            connection.close()
        if time.monotonic() > deadline:
            raise LaunchError(f"The web process {found}. Its log is {tree.folder / 'web.log'}.")


def _greet(say: Say, url: str, prepared: Prepared, settings: Settings) -> None:
    say("")
    say(f"PEFT Studio is ready. Sign in once with: {url}/login/link/{prepared.login_secret}/")
    say("")
    if can_train():
        for device in find_devices():
            say(device.sentence())
    else:
        say("This installation has no worker half, so nothing trains here: pip install 'peft-studio[worker]' adds it.")
    say(f"Data and logs: {settings.data_dir}. Ctrl-C stops everything.")


def _start_workers(tree: ProcessTree, prepared: Prepared, say: Say) -> None:
    data_dir = tree.folder.parent
    tree.start(beat_plan(data_dir))
    tree.start(default_worker_plan())
    if not can_train():
        return
    for device in find_devices():
        tree.start(device_worker_plan(device))
    if prepared.wants_bundled_model:
        tree.start(_bundled_model_plan(tree, say))


def _bundled_model_plan(tree: ProcessTree, say: Say) -> Plan:
    def tell(status: int) -> None:
        log = tree.folder / "base-model.log"
        if status == 0:
            say("The base model SmolLM2-135M-Instruct is ready to be trained on.")
        else:
            say(f"The base model SmolLM2-135M-Instruct could not be prepared. Its log is {log}.")

    say("Preparing the base model SmolLM2-135M-Instruct, once; the pages can be used meanwhile.")
    return Plan(
        name="base-model",
        command=[sys.executable, str(ROOT / "manage.py"), "add_bundled_model"],
        is_service=False,
        when_done=tell,
        grace_seconds=1,
    )

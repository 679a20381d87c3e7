"""`manage.py up` as people start it: a real process tree over a folder of its own."""

from __future__ import annotations

import fcntl
import http.client
import http.cookiejar
import http.server
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import psutil
import pytest

from studio import launching
from studio.beside import running_servers
from studio.devices import _allowed, find_devices
from studio.processes import ProcessTree
from tests.processes import command_line, has_ended

ROOT = Path(__file__).resolve().parent.parent.parent
LINK = re.compile(r"(http://[^/]+)/login/link/\S+/")
PATIENCE = 300.0


class Studio:
    """A running `up` and what it has printed."""

    started: ClassVar[list[subprocess.Popen[str]]] = []

    def __init__(self, data_dir: Path, **variables: str) -> None:
        kept = {k: v for k, v in os.environ.items() if not k.startswith("STUDIO_") and not k.endswith("_URL")}
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "manage.py"), "up"],
            env=kept | {"STUDIO_DATA_DIR": str(data_dir), "OMP_NUM_THREADS": "1"} | variables,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=data_dir.parent, start_new_session=True,
        )  # fmt: skip
        self.started.append(self.process)
        self.said: list[str] = []
        self.seconds = 0.0

    def wait_for_link(self) -> str:
        started = time.monotonic()
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append(line)
            if found := LINK.search(line):
                self.seconds = time.monotonic() - started
                return found[0]
        pytest.fail("".join(self.said))

    def wait_for_line(self, words: str) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append(line)
            if words in line:
                return line
        pytest.fail("".join(self.said))

    def tree(self) -> list[psutil.Process]:
        return [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]

    def finish(self) -> tuple[int, str]:
        rest, _ = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, "".join(self.said) + rest


@pytest.fixture
def data_dir() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="pu-"))
    made.chmod(0o711)
    yield made / "data"
    # A test that failed half-way leaves none of its studios running: the children die with the launcher.
    for process in Studio.started:
        process.kill()
        process.wait()
    Studio.started.clear()
    shutil.rmtree(made, ignore_errors=True)


def sign_in(link: str) -> tuple[int, str]:
    """Open the link and press its button, as a browser does; the status and text of the page after it."""
    browser = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(http.cookiejar.CookieJar()))
    page = browser.open(link, timeout=60).read().decode()
    token = re.search(r'name="csrfmiddlewaretoken" value="(\w+)"', page)
    assert token is not None
    browser.open(link, urllib.parse.urlencode({"csrfmiddlewaretoken": token[1]}).encode(), timeout=60)
    account = browser.open(urllib.parse.urljoin(link, "/account/"), timeout=60)
    return account.status, account.read().decode()


def gone(processes: list[psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=60)
    return all(has_ended(one) for one in alive)


def test_it_starts_stops_and_starts_again_with_everything_kept(data_dir: Path) -> None:
    first = Studio(data_dir)
    link = first.wait_for_link()
    status, page = sign_in(link)
    assert status == 200
    assert "admin" in page
    first.wait_for_line("Ctrl-C stops everything")
    said = "".join(first.said)
    assert ("No GPU found: training on the CPU (" in said) or re.search(r"^GPU 0: ", said, re.MULTILINE)
    assert (data_dir / "secret_key").stat().st_mode & 0o777 == 0o600
    key = (data_dir / "secret_key").read_text()
    assert len(key) >= 50

    second = Studio(data_dir)
    code, words = second.finish()
    assert code != 0
    assert "already runs" in words
    assert link.split("/login")[0] in words

    tree = first.tree()
    names = {" ".join(command_line(one)) for one in tree}
    for part in ("studio.serving", " beat", "--queues default", "--queues gpu", "postgres", "valkey"):
        assert any(part in name for name in names), part
    first.process.send_signal(signal.SIGINT)
    code, words = first.finish()
    assert code == 0, words
    assert "Nothing of PEFT Studio runs any more" in words
    assert gone(tree)

    again = Studio(data_dir)
    fresh = again.wait_for_link()
    assert fresh != link
    assert sign_in(fresh)[0] == 200
    assert (data_dir / "secret_key").read_text() == key
    again.process.send_signal(signal.SIGTERM)
    assert again.finish()[0] == 0


QUEUE_A_JOB = """
import json, time, uuid
from jobs.queueing import queue_job
from studio.accounts.models import Membership
from studio.catalogue.models import BaseModel
from studio.datasets.models import VersionState
from studio.datasets.uploads import receive_upload
from tests.tiny import tiny_rows
from workers.recipe import Recipe

someone = Membership.objects.get()
base = BaseModel.objects.get(name="tiny")
content = "".join(json.dumps(row) + chr(10) for row in tiny_rows(60)).encode()
version = receive_upload(team=someone.team, user=someone.user, file_name="tiny.jsonl", chunks=[content])
deadline = time.monotonic() + 200
while version.state != VersionState.READY:
    assert time.monotonic() < deadline, version.state
    time.sleep(0.2)
    version.refresh_from_db()
recipe = Recipe.from_dict({
    "name": "beside", "base_model": {"name": base.name, "revision": base.revision},
    "dataset": {
        "name": str(version), "sha256": version.sha256, "format": version.format, "columns": version.columns,
    },
    "method": "lora", "settings": {"rank": 2}, "precision": "float32",
    "training": {"max_steps": 2, "batch_size": 2, "micro_batch_size": 2, "max_length": 64, "packing": False},
    "evaluation": {"num_generated": 0, "general": False},
})
job = queue_job(
    team=someone.team, user=someone.user, recipe=recipe, base_model=base, dataset_version=version,
    idempotency_key=uuid.uuid4().hex,
)
print(job.pk)
"""


def command(data_dir: Path, *arguments: str) -> tuple[int, str, str]:
    """`manage.py` in another terminal, which knows the data folder and nothing else: status, output, complaints."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("STUDIO_") and not k.endswith("_URL")}
    done = subprocess.run(
        [sys.executable, str(ROOT / "manage.py"), *arguments], cwd=data_dir.parent, capture_output=True, text=True,
        env=kept | {"STUDIO_DATA_DIR": str(data_dir), "OMP_NUM_THREADS": "1"}, check=False, timeout=PATIENCE,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def test_commands_in_another_terminal_work_beside_it(data_dir: Path, tiny_base: Path) -> None:
    # Somebody's worker holds the device, so that the studio's own does not take the job before `runjob` can.
    (data_dir / "slots").mkdir(parents=True)
    data_dir.chmod(0o711)
    slot = (data_dir / "slots" / f"{socket.gethostname()}-0.lock").open("w")
    slot.write("4242")
    slot.flush()
    fcntl.flock(slot, fcntl.LOCK_EX)
    studio = Studio(data_dir)
    studio.wait_for_link()
    status, _, complaints = command(data_dir, "registerbase", str(tiny_base), "--name", "tiny")
    assert status == 0, complaints
    status, said, complaints = command(data_dir, "shell", "--command", QUEUE_A_JOB)
    assert status == 0, complaints
    job = said.split()[-1]

    status, _, complaints = command(data_dir, "runjob", job)
    assert status == 1
    assert "Device 0 of this machine is in use by process 4242." in complaints
    assert complaints.rstrip().endswith("--slot 1")
    assert "Traceback" not in complaints

    status, said, complaints = command(data_dir, "runjob", job, "--slot", "1")
    assert status == 0, complaints
    assert "step 2/2" in said
    assert "Done: adapter" in said
    status, _, complaints = command(data_dir, "prepare")
    assert status == 0, complaints

    studio.process.send_signal(signal.SIGINT)
    assert studio.finish()[0] == 0
    slot.close()
    status, _, complaints = command(data_dir, "runjob", job)
    assert status == 1
    assert "DATABASE_URL is not set" in complaints
    assert "STUDIO_SECRET_KEY" not in complaints, "the key is kept in the data folder"


@pytest.mark.parametrize("arguments", [("runjob", "1"), ("prepare",), ("registerbase", "/tmp"), ("check",)])
def test_a_command_without_a_studio_says_what_to_start(data_dir: Path, arguments: tuple[str, ...]) -> None:
    status, _, complaints = command(data_dir, *arguments)
    assert status == 1
    assert "Traceback" not in complaints
    for words in ("STUDIO_SECRET_KEY has fewer", "DATABASE_URL is not set", "REDIS_URL is not set", "manage.py up"):
        assert words in complaints


def test_a_killed_studio_is_not_taken_for_a_running_one(data_dir: Path) -> None:
    studio = Studio(data_dir)
    studio.wait_for_link()
    found = running_servers(data_dir)
    assert set(found) == {"DATABASE_URL", "REDIS_URL"}
    studio.process.kill()
    studio.process.wait()
    assert (data_dir / "up.lock").stat().st_size > 0
    assert running_servers(data_dir) == {}


def test_a_killed_launcher_takes_everything_along_and_blocks_nothing(data_dir: Path) -> None:
    first = Studio(data_dir)
    first.wait_for_link()
    tree = first.tree()
    first.process.kill()
    first.process.wait()
    second = Studio(data_dir)
    assert sign_in(second.wait_for_link())[0] == 200
    assert gone(tree)
    second.process.send_signal(signal.SIGINT)
    assert second.finish()[0] == 0


def test_a_dead_child_and_a_dead_server_are_started_again(data_dir: Path) -> None:
    studio = Studio(data_dir)
    link = studio.wait_for_link()
    [web] = [one for one in studio.tree() if "studio.serving" in command_line(one)]
    web.kill()
    assert "SIGKILL" in studio.wait_for_line("web ended")
    # Over the same address: the launcher holds the socket, and a visitor waits in its queue.
    assert sign_in(link)[0] == 200
    [valkey] = [one for one in studio.tree() if "valkey-server" in "".join(command_line(one)[:1])]
    valkey.kill()
    studio.wait_for_line("valkey had ended and was started again")
    studio.process.send_signal(signal.SIGINT)
    assert studio.finish()[0] == 0


def test_two_studios_run_side_by_side_with_the_usual_ports_taken(data_dir: Path) -> None:
    taken = []
    for port in (5432, 6379, 8000):
        listener = socket.socket()
        # Connections that an earlier test closed linger on the port; only a listener makes it taken.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
            listener.listen()
        except OSError:
            listener.close()  # somebody else has it: taken is taken
            continue
        taken.append(listener)
    studios = [Studio(data_dir), Studio(data_dir.with_name("other"))]
    links = [studio.wait_for_link() for studio in studios]
    assert len({link.split("/login")[0] for link in links} | {"http://127.0.0.1:8000"}) == 3
    for link in links:
        assert sign_in(link)[0] == 200
    for studio in studios:
        studio.process.send_signal(signal.SIGINT)
        assert studio.finish()[0] == 0
    for listener in taken:
        listener.close()


def test_it_starts_behind_https_under_another_host_name(data_dir: Path) -> None:
    studio = Studio(data_dir, STUDIO_HTTPS="true", STUDIO_ALLOWED_HOSTS="studio.example", STUDIO_BEHIND_PROXY="true")
    link = urllib.parse.urlsplit(studio.wait_for_link())
    for host in ("studio.example", link.netloc):
        connection = http.client.HTTPConnection(link.netloc, timeout=60)
        connection.request("GET", link.path, headers={"Host": host, "X-Forwarded-Proto": "https"})
        assert connection.getresponse().status == 200, host
        connection.close()
    studio.process.send_signal(signal.SIGINT)
    assert studio.finish()[0] == 0


def test_a_web_process_that_answers_wrongly_ends_the_start_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(400)

        def log_message(self, *_: object) -> None:
            pass

    monkeypatch.setattr(launching, "FIRST_ANSWER_SECONDS", 0.2)
    with http.server.HTTPServer(("127.0.0.1", 0), Refusing) as server, tempfile.TemporaryDirectory() as logs:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        tree = ProcessTree(Path(logs), {}, say=lambda line: None)
        with pytest.raises(launching.LaunchError, match=r"answers with status 400 instead of 200.*web\.log"):
            launching._wait_for_answer(tree, server.socket, launching.StopSignals())
        server.shutdown()


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"STUDIO_PORT": "99999"}, "a port is between 0 and 65535"),
        ({"STUDIO_HOST": "192.0.2.1", "STUDIO_PORT": "8123"}, "Cannot listen on 192.0.2.1:8123"),
        ({"STUDIO_DATA_DIR": "/proc/nowhere"}, "cannot be written"),
        (
            {"DATABASE_URL": "postgres://u:p@127.0.0.1:1/x", "REDIS_URL": "redis://127.0.0.1:1"},
            "The database of DATABASE_URL does not answer",
        ),
    ],
)
def test_what_cannot_start_says_why_without_a_traceback(data_dir: Path, variables: dict[str, str], words: str) -> None:
    code, said = Studio(data_dir, **variables).finish()
    assert code != 0
    assert words in said
    assert "Traceback" not in said


def test_cuda_visible_devices_is_read_as_cuda_reads_it() -> None:
    gpus = [(0, "GPU-aaa", "A"), (1, "GPU-bbb", "B"), (2, "GPU-ccc", "C")]
    assert _allowed(gpus, None) == gpus
    assert _allowed(gpus, "") == []
    assert _allowed(gpus, "2,0") == [gpus[2], gpus[0]]
    assert _allowed(gpus, "GPU-b,7,0") == [gpus[1]]
    assert _allowed(gpus, "-1") == []


def test_there_is_always_a_device_to_train_on() -> None:
    devices = find_devices()
    assert [device.slot for device in devices] == list(range(len(devices)))
    assert devices[0].sentence()

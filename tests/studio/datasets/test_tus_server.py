"""Uploads in pieces against the real web process: killed, cut, stopped, crowded and without space."""

from __future__ import annotations

import base64
import hashlib
import json
import resource
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from studio.accounts.models import ApiToken, Team, User
from studio.datasets.models import DatasetVersion, Upload
from studio.datasets.resumable import SYNC_BYTES
from studio.storage.parts import part_path
from tests.processes import wait_for
from tests.web_server import WebServer, web_server

pytestmark = pytest.mark.django_db(transaction=True)

MIB = 1024**2
TUS = {"Tus-Resumable": "1.0.0"}


def rows_of(num_bytes: int, mark: str = "") -> bytes:
    """A JSON Lines file of about so many bytes, different for each mark."""
    line = json.dumps({"prompt": f"What is it {mark}?", "completion": "x" * 4000}).encode() + b"\n"
    return line * (num_bytes // len(line))


@pytest.fixture(scope="module")
def running(django_db_setup: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebServer]:
    with web_server(tmp_path_factory.mktemp("web")) as server:
        yield server


@pytest.fixture
def server(running: WebServer) -> WebServer:
    """The module's server, as the launcher would start it."""
    if running.is_special or running.process.poll() is not None:
        running.kill()
        running.start()
    return running


def begin(client: httpx.Client, content: bytes, file_name: str = "faq.jsonl", root: str = "/datasets/uploads/") -> str:
    metadata = f"filename {base64.b64encode(file_name.encode()).decode()}"
    answer = client.post(root, headers={**TUS, "Upload-Length": str(len(content)), "Upload-Metadata": metadata})
    assert answer.status_code == 201, answer.text
    return answer.headers["Location"]


def offset_of(client: httpx.Client, url: str) -> int:
    return int(client.head(url, headers=TUS).headers["Upload-Offset"])


def headers_at(offset: int) -> dict[str, str]:
    return {**TUS, "Upload-Offset": str(offset), "Content-Type": "application/offset+octet-stream"}


def send(client: httpx.Client, url: str, content: bytes, offset: int) -> httpx.Response:
    return client.patch(url, content=content[offset:], headers=headers_at(offset))


class SlowBody:
    """A body that is sent up to some byte and then waits until it is let go, or for ever."""

    def __init__(self, content: bytes, stop_at: int) -> None:
        self.content, self.stop_at = content, stop_at
        self.go_on = threading.Event()
        self.has_stopped = threading.Event()

    def __iter__(self) -> Iterator[bytes]:
        for start in range(0, len(self.content), MIB // 4):
            if start >= self.stop_at and not self.go_on.is_set():
                self.has_stopped.set()
                self.go_on.wait(120)
            yield self.content[start : start + MIB // 4]


class Sending:
    """A PATCH on a thread of its own, under way until it is let go."""

    def __init__(self, client: httpx.Client, url: str, content: bytes, offset: int, *, stop_after: int) -> None:
        self.body = SlowBody(content[offset:], stop_after)
        self.answer: httpx.Response | None = None
        self.headers = headers_at(offset) | {"Content-Length": str(len(content) - offset)}
        self._thread = threading.Thread(target=self._run, args=(client, url))
        self._thread.start()
        assert self.body.has_stopped.wait(60)

    def _run(self, client: httpx.Client, url: str) -> None:
        try:
            self.answer = client.patch(url, content=iter(self.body), headers=self.headers)
        except httpx.TransportError:
            self.answer = None

    def end(self) -> httpx.Response | None:
        self.body.go_on.set()
        self._thread.join(60)
        assert not self._thread.is_alive()
        return self.answer


def test_an_upload_survives_three_kills_of_the_server(server: WebServer, bob: User) -> None:
    content = rows_of(60 * MIB)
    client = server.signed_in(bob)
    url = begin(client, content)
    offset = 0
    for share in (30, 60, 90):
        until = len(content) * share // 100
        sending = Sending(client, url, content, offset, stop_after=until - offset)
        # What lies in the sockets still arrives.
        wait_for(lambda until=until: Upload.objects.get().num_received > until - 2 * SYNC_BYTES, what="the bytes")
        arrived = part_path(Upload.objects.get().pk).stat().st_size
        server.kill()
        assert sending.end() is None
        server.start()
        client = server.signed_in(bob)
        before, offset = offset, offset_of(client, url)
        assert before < offset
        assert arrived - offset <= SYNC_BYTES + MIB
    answer = send(client, url, content, offset)
    assert answer.status_code == 204, answer.text
    version = DatasetVersion.objects.get()
    assert version.sha256 == hashlib.sha256(content).hexdigest()
    assert version.path().read_bytes() == content
    assert not part_path(Upload.objects.get().pk).exists()


@pytest.mark.parametrize("point", ["upload.before_keep", "upload.files_kept", "upload.after_commit"])
def test_a_server_killed_while_it_registers_the_file_has_not_lost_it(
    point: str, server: WebServer, bob: User, tmp_path: Path
) -> None:
    content = rows_of(2 * MIB, point)
    client = server.signed_in(bob)
    url = begin(client, content)
    server.kill()
    server.start({"STUDIO_FAILPOINTS": f"{point}=kill", "STUDIO_FAILPOINTS_ONCE": str(tmp_path)})
    with pytest.raises(httpx.TransportError):
        send(client, url, content, 0)
    server.process.wait()
    server.start()
    assert offset_of(client, url) == len(content)
    found = client.get(url)
    version = DatasetVersion.objects.get()
    assert found.headers["Location"] == version.get_absolute_url()
    assert version.path().read_bytes() == content
    assert not part_path(Upload.objects.get().pk).exists()


def test_a_connection_that_is_cut_keeps_every_byte_that_arrived(server: WebServer, bob: User) -> None:
    content = rows_of(12 * MIB)
    client = server.signed_in(bob)
    url = begin(client, content)
    with socket.create_connection(("127.0.0.1", httpx.URL(server.root).port)) as raw:
        lines = {
            "Host": httpx.URL(server.root).netloc.decode(), **headers_at(0), "Content-Length": str(len(content)),
            "X-CSRFToken": client.headers["X-CSRFToken"],
            "Cookie": "; ".join(f"{name}={value}" for name, value in client.cookies.items()),
        }  # fmt: skip
        head = f"PATCH {url} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        raw.sendall(head.encode() + b"\r\n" + content[: 3 * MIB + 17])
    wait_for(lambda: offset_of(client, url) == 3 * MIB + 17, what="the end of the cut request")
    assert send(client, url, content, 3 * MIB + 17).status_code == 204
    assert DatasetVersion.objects.get().path().read_bytes() == content


def test_a_restart_tells_the_sender_to_come_back_and_keeps_its_bytes(server: WebServer, bob: User) -> None:
    content = rows_of(12 * MIB)
    client = server.signed_in(bob)
    url = begin(client, content)
    sending = Sending(client, url, content, 0, stop_after=4 * MIB)
    wait_for(lambda: part_path(Upload.objects.get().pk).stat().st_size >= 3 * MIB, what="the bytes")
    # The sender goes on only after that: nobody waits for it.
    server.stop()
    sending.end()
    server.start()
    offset = offset_of(client, url)
    assert offset >= 3 * MIB
    assert send(client, url, content, offset).status_code == 204
    assert DatasetVersion.objects.get().path().read_bytes() == content


def test_two_that_send_the_same_upload_at_once_do_not_mix(server: WebServer, bob: User) -> None:
    content = rows_of(12 * MIB)
    client, other = server.signed_in(bob), server.signed_in(bob)
    url = begin(client, content)
    first = Sending(client, url, content, 0, stop_after=2 * MIB)
    part = part_path(Upload.objects.get().pk)
    wait_for(lambda: part.exists() and part.stat().st_size > 0, what="the first one's bytes")
    second = send(other, url, content, 0)
    assert (second.status_code, second.headers["Retry-After"]) == (423, "2")
    answer = first.end()
    assert answer is not None
    assert answer.status_code == 204
    assert DatasetVersion.objects.get().path().read_bytes() == content


def test_a_sender_that_is_refused_reads_why(server: WebServer, bob: User, charlie: User) -> None:
    content = rows_of(12 * MIB)
    client = server.signed_in(bob)
    url = begin(client, content)
    for answer, status in (
        (client.patch(url, content=content, headers=headers_at(7)), 409),
        (client.patch(url, content=content + b"x", headers=headers_at(0)), 413),
        (client.patch(url, content=iter([content, b"x"]), headers=headers_at(0)), 413),
        (client.patch(url, content=content, headers=headers_at(0) | {"Content-Type": "text/plain"}), 415),
        (client.patch(url, content=content, headers=headers_at(0) | {"Tus-Resumable": "0.1"}), 412),
        (client.patch(url, content=content, headers=headers_at(0) | {"X-CSRFToken": "x" * 32}), 403),
        (server.signed_in(charlie).patch(url, content=content, headers=headers_at(0)), 404),
    ):
        assert answer.status_code == status, answer.text
    stranger = httpx.Client(base_url=server.root, timeout=60)
    stranger.get("/login/")
    stranger.headers["X-CSRFToken"] = stranger.cookies["csrftoken"]
    answer = stranger.patch(url, content=content, headers=headers_at(0))
    assert (answer.status_code, answer.json()["error"]["message"]) == (401, "Your session has ended.")
    # Of the body without a length what was safe already is kept, and it goes on there.
    offset = offset_of(client, url)
    assert SYNC_BYTES <= offset < SYNC_BYTES + 2 * MIB
    assert send(client, url, content, offset).status_code == 204
    assert DatasetVersion.objects.get().path().read_bytes() == content


def test_a_proxy_that_lets_only_posts_through(server: WebServer, bob: User) -> None:
    content = rows_of(MIB)
    client = server.signed_in(bob)
    url = begin(client, content)
    as_head = client.post(url, headers={**TUS, "X-HTTP-Method-Override": "HEAD"})
    assert as_head.headers["Upload-Offset"] == "0"
    sent = client.post(url, content=content, headers=headers_at(0) | {"X-HTTP-Method-Override": "PATCH"})
    assert sent.status_code == 204, sent.text
    assert DatasetVersion.objects.count() == 1


def test_a_token_of_the_api_sends_in_pieces(server: WebServer, team: Team, bob: User) -> None:
    secret = ApiToken.issue(team=team, user=bob, name="t", scopes=["read", "write"])[1]
    reading = ApiToken.issue(team=team, user=bob, name="r", scopes=["read"])[1]
    content = rows_of(10 * MIB)
    with httpx.Client(base_url=server.root, timeout=60) as client:
        client.headers["Authorization"] = f"Bearer {secret}"
        url = begin(client, content, root="/api/v1/uploads/")
        refused = client.patch(url, content=content, headers=headers_at(0) | {"Authorization": f"Bearer {reading}"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "scope_missing")
        assert client.patch(url, content=content[: 5 * MIB], headers=headers_at(0)).status_code == 204
        answer = send(client, url, content, 5 * MIB)
        assert (answer.status_code, answer.headers["Upload-Offset"]) == (204, str(len(content)))
        assert client.get(url).json()["version"]["sha256"] == hashlib.sha256(content).hexdigest()


def test_several_browsers_send_at_once(server: WebServer, bob: User, charlie: User) -> None:
    contents = {f"file-{number}.jsonl": rows_of(6 * MIB, str(number)) for number in range(6)}
    statuses: list[int] = []

    def one(user: User, file_name: str, content: bytes) -> None:
        client = clients[user]
        url = begin(client, content, file_name)
        statuses.append(send(client, url, content, 0).status_code)

    clients = {user: server.signed_in(user) for user in (bob, charlie)}
    threads = [
        threading.Thread(target=one, args=(user, file_name, content))
        for file_name, content in contents.items()
        for user in clients
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert statuses == [204] * 12
    for version in DatasetVersion.objects.all():
        assert version.path().read_bytes() == contents[version.file_name]
    assert DatasetVersion.objects.filter(dataset__team=bob.memberships.get().team).count() == 6


def limit_files() -> None:
    """No file may grow beyond the limit: what a full disk does, without filling anybody's disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20 * MIB, 20 * MIB))


def test_a_full_disk_is_507_and_the_upload_goes_on_when_there_is_room(server: WebServer, bob: User) -> None:
    content = rows_of(30 * MIB)
    server.kill()
    server.start(preexec_fn=limit_files)
    client = server.signed_in(bob)
    url = begin(client, content)
    answer = send(client, url, content, 0)
    assert answer.status_code == 507, answer.text
    assert "disk is full" in answer.json()["error"]["message"]
    offset = offset_of(client, url)
    assert 16 * MIB <= offset < 20 * MIB
    assert part_path(Upload.objects.get().pk).stat().st_size == offset
    server.kill()
    server.start()
    assert send(client, url, content, offset).status_code == 204
    assert DatasetVersion.objects.get().path().read_bytes() == content


def test_a_sender_that_falls_silent_frees_its_place(server: WebServer, bob: User) -> None:
    server.kill()
    server.start({"STUDIO_UPLOAD_SILENT_SECONDS": "3"})
    content = rows_of(12 * MIB)
    client, other = server.signed_in(bob), server.signed_in(bob)
    url = begin(client, content)
    sending = Sending(client, url, content, 0, stop_after=2 * MIB)
    wait_for(lambda: offset_of(other, url) >= MIB, what="the end of the silent request")
    assert send(other, url, content, offset_of(other, url)).status_code == 204
    sending.end()
    assert DatasetVersion.objects.get().path().read_bytes() == content

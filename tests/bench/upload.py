"""Large uploads in pieces: seconds, rate, and the most memory of the web process meanwhile.

    python -m tests.bench.upload                     # one of 1 GiB, killed in its middle
    python -m tests.bench.upload --gib 5 --at-once 3

The web process, its servers and the sender are real and on this machine; the web process is killed with kill -9 when
half of the first file is there and the upload goes on.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.bench.studio import bench_studio

MIB = 1024**2
ROW = b'{"prompt": "What is it?", "completion": "' + b"x" * 4000 + b'"}\n'
TUS = {"Tus-Resumable": "1.0.0"}


class Watch(threading.Thread):
    """Looks at the resident memory of a process every few milliseconds."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.process, self.first, self.most = psutil.Process(pid), 0, 0

    def run(self) -> None:
        while True:
            try:
                found = self.process.memory_info().rss
            except psutil.NoSuchProcess:
                return
            self.first = self.first or found
            self.most = max(self.most, found)
            time.sleep(0.02)


def blocks(num_bytes: int, offset: int, mark: bytes) -> Iterator[bytes]:
    """The bytes of a file from an offset on; it begins with its mark, so that two files differ."""
    first = mark.ljust(len(ROW) - 1)[: len(ROW) - 1] + b"\n"
    block = ROW * (MIB // len(ROW))
    at = 0
    for content in _content(first, block, num_bytes):
        if at + len(content) > offset:
            yield content[max(0, offset - at) :]
        at += len(content)


def _content(first: bytes, block: bytes, num_bytes: int) -> Iterator[bytes]:
    yield first
    left = num_bytes - len(first)
    while left:
        yield block[:left]
        left -= min(left, len(block))


def send(client: httpx.Client, url: str, num_bytes: int, mark: bytes) -> httpx.Response:
    """Send what is missing in one request."""
    offset = int(client.head(url, headers=TUS).headers["Upload-Offset"])
    return client.patch(
        url, content=blocks(num_bytes, offset, mark),
        headers={**TUS, "Upload-Offset": str(offset), "Content-Type": "application/offset+octet-stream",
                 "Content-Length": str(num_bytes - offset)},
    )  # fmt: skip


def begin(client: httpx.Client, num_bytes: int, name: str) -> str:
    metadata = f"filename {base64.b64encode(name.encode()).decode()}"
    answer = client.post("/datasets/uploads/", headers={**TUS, "Upload-Length": str(num_bytes),
                                                        "Upload-Metadata": metadata})  # fmt: skip
    answer.raise_for_status()
    return answer.headers["Location"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=1.0, help="size of each file")
    parser.add_argument("--at-once", type=int, default=1, help="files that are sent at the same time, after the first")
    options = parser.parse_args()
    with bench_studio() as folder:
        _measure(folder, int(options.gib * 1024**3) // len(ROW) * len(ROW), options.at_once)


def _measure(folder: Path, num_bytes: int, at_once: int) -> None:
    from studio.accounts.models import Membership, Role, Team, User
    from studio.datasets.models import DatasetVersion, Upload
    from tests.processes import wait_for
    from tests.web_server import web_server

    team = Team.objects.create(name="Bench", slug="bench")
    user = User.objects.create_user(username="bench")
    Membership.objects.create(user=user, team=team, role=Role.ADMIN)
    with web_server(folder) as server:
        client = server.signed_in(user)
        client.timeout = httpx.Timeout(600)
        url = begin(client, num_bytes, "killed.jsonl")
        watch = _watched(server)
        thread = threading.Thread(target=_send_quietly, args=(client, url, num_bytes, b'{"killed": 1}'))
        started = time.monotonic()
        thread.start()
        wait_for(lambda: Upload.objects.get().num_received > num_bytes // 2, seconds=600, what="half of the file")
        half = time.monotonic() - started
        server.kill()
        thread.join()
        server.start()
        kept = int(client.head(url, headers=TUS).headers["Upload-Offset"])
        print(f"half of {num_bytes / 1e9:.2f} GB in {half:.1f} s ({kept / half / 1e6:.0f} MB/s); {_memory(watch)}")
        watch = _watched(server)
        started = time.monotonic()
        answer = send(client, url, num_bytes, b'{"killed": 1}')
        answer.raise_for_status()
        seconds = time.monotonic() - started
        print(
            f"after kill -9 it went on at {kept / 1e9:.2f} GB: the rest, with reading the first half again and"
            f" storing the file, in {seconds:.1f} s; {_memory(watch)}"
        )
        _check(DatasetVersion.objects.get(), num_bytes, b'{"killed": 1}')
        watch = _watched(server)
        threads = [
            threading.Thread(target=_one, args=(server, user, num_bytes, f'{{"number": {number}}}'.encode()))
            for number in range(at_once)
        ]
        started = time.monotonic()
        for one in threads:
            one.start()
        for one in threads:
            one.join()
        seconds = time.monotonic() - started
        rate = at_once * num_bytes / seconds / 1e6
        print(f"{at_once} whole at once: {seconds:.1f} s, {rate:.0f} MB/s together; {_memory(watch)}")
        assert DatasetVersion.objects.count() == 1 + at_once


def _watched(server: Any) -> Watch:
    watch = Watch(server.process.pid)
    watch.start()
    time.sleep(0.1)
    return watch


def _memory(watch: Watch) -> str:
    return f"memory of the web process {watch.first / MIB:.0f} MiB before, {watch.most / MIB:.0f} MiB at most"


def _send_quietly(client: httpx.Client, url: str, num_bytes: int, mark: bytes) -> None:
    try:
        send(client, url, num_bytes, mark)
    except httpx.TransportError as error:
        print(f"the sender noticed: {type(error).__name__}")


def _one(server: Any, user: Any, num_bytes: int, mark: bytes) -> None:
    client = server.signed_in(user)
    client.timeout = httpx.Timeout(600)
    send(client, begin(client, num_bytes, f"{mark.decode()}.jsonl"), num_bytes, mark).raise_for_status()


def _check(version: Any, num_bytes: int, mark: bytes) -> None:
    digest = hashlib.sha256()
    for block in blocks(num_bytes, 0, mark):
        digest.update(block)
    assert version.sha256 == digest.hexdigest(), "the stored file is another one"
    assert version.num_bytes == num_bytes


if __name__ == "__main__":
    main()

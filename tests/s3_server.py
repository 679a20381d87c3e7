"""A real S3-compatible server (SeaweedFS) for tests, on the loopback address and with a key of its own."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from studio.embedded import die_with_parent
from tests.processes import reserved_ports

PATIENCE = 120.0
KEY_ID, SECRET, BUCKET = "tests-key", "tests-secret", "studio-tests"


@dataclass(frozen=True)
class S3Server:
    """Where the server answers."""

    endpoint: str
    pid: int

    def settings(self, prefix: str) -> dict[str, str]:
        """The studio's settings for this server, without STUDIO_ before their names."""
        return {
            "S3_ENDPOINT": self.endpoint, "S3_BUCKET": BUCKET, "S3_PREFIX": prefix, "S3_REGION": "us-east-1",
            "S3_KEY_ID": KEY_ID, "S3_SECRET": SECRET,
        }  # fmt: skip


@contextlib.contextmanager
def s3_server() -> Iterator[S3Server]:
    """The server with an empty bucket; gone with its files at the end."""
    folder = Path(tempfile.mkdtemp(prefix="peft-studio-s3-"))
    keys = {"credentials": [{"accessKey": KEY_ID, "secretKey": SECRET}]}
    configuration = folder / "s3.json"
    configuration.write_text(
        json.dumps({"identities": [{"name": "tests", **keys, "actions": ["Admin", "Read", "Write", "List"]}]})
    )
    (folder / "data").mkdir()
    names = ("master", "volume", "filer", "s3")
    with reserved_ports(2 * len(names)) as free:
        ports, grpc = dict(zip(names, free[:4], strict=True)), dict(zip(names, free[4:], strict=True))
        try:
            with _serving(folder, configuration, ports, grpc) as server:
                yield server
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _serving(folder: Path, configuration: Path, ports: dict[str, int], grpc: dict[str, int]) -> Iterator[S3Server]:
    command = [
        str(Path(sys.executable).parent / "weed"), "server", "-filer", "-s3", f"-dir={folder / 'data'}",
        "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-s3.config={configuration}", "-volume.max=30",
        "-master.volumeSizeLimitMB=64", "-master.telemetry=false", "-s3.port.iceberg=0", "-s3.port.lance=0",
        *(f"-{name}.port={port}" for name, port in ports.items()),
        *(f"-{name}.port.grpc={port}" for name, port in grpc.items()),
    ]  # fmt: skip
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            preexec_fn=lambda: die_with_parent(9),
        )  # fmt: skip
    endpoint = f"http://127.0.0.1:{ports['s3']}"
    try:
        _make_bucket(endpoint, process, folder / "log")
        yield S3Server(endpoint, process.pid)
    finally:
        process.kill()
        process.wait()


def _make_bucket(endpoint: str, process: subprocess.Popen[bytes], log: Path) -> None:
    import boto3
    from botocore.config import Config

    deadline = time.monotonic() + PATIENCE
    client = boto3.session.Session().client(
        "s3", endpoint_url=endpoint, region_name="us-east-1", aws_access_key_id=KEY_ID, aws_secret_access_key=SECRET,
        config=Config(s3={"addressing_style": "path"}, connect_timeout=2, retries={"max_attempts": 0}),
    )  # fmt: skip
    while not _is_ready(client):
        said = log.read_text(errors="replace")[-2000:]
        assert process.poll() is None, said
        assert time.monotonic() < deadline, said
        time.sleep(0.2)


def _is_ready(client: Any) -> bool:
    """Make the bucket and an object in it: the volume that takes the first may come later than the bucket."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        with contextlib.suppress(client.exceptions.BucketAlreadyOwnedByYou, client.exceptions.BucketAlreadyExists):
            client.create_bucket(Bucket=BUCKET)
        client.put_object(Bucket=BUCKET, Key="is-ready", Body=b"yes")
    except (BotoCoreError, ClientError):
        return False
    return True

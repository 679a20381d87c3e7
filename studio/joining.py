"""A machine that joins a studio: it asks with a join token, keeps what it is told and runs a worker for each device.

What it is told are the keys to the studio: the URLs of the database and the broker with their passwords, and the
storage's key. So they travel over HTTPS, or over plain HTTP within one machine only, unless a flag says that the
network between is trusted; no redirect is followed, for the token would go along; they are kept in a file that only
its owner reads, and reach the workers through their environment. The token works once and for an hour, stands in
the Authorization header and never in a URL, and the studio writes down who made it and which machine used it. The
studio's secret key stays where it is: it signs people's sessions. A trainer gets none of all this.
"""

from __future__ import annotations

import hashlib
import http.client
import ipaddress
import json
import os
import socket
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
import redis

from studio.devices import boot_id, can_train, find_devices
from studio.launching import ROOT, LaunchError, StopSignals, device_worker_plan, hold_folder, secret_key
from studio.processes import ProcessTree
from studio.version import STUDIO_VERSION

KEPT_NAME = "joined.json"
ANSWER_SECONDS = 30.0
CONNECT_SECONDS = 10

Say = Callable[[str], None]


class JoinError(RuntimeError):
    """This machine cannot join; the message says what was found and what to do."""


@dataclass(frozen=True)
class Joined:
    """What the studio has told this machine."""

    url: str
    version: str
    environment: Mapping[str, str]


def ask_to_join(url: str, token: str, *, trusts_network: bool = False) -> Joined:
    """What a worker of the studio at `url` needs, in exchange for a join token.

    Raises:
        JoinError: the address is not safe, nobody answers there, or the studio refuses.
    """
    scheme, host, port, path = _address(url, trusts_network=trusts_network)
    if scheme == "https":
        connection: http.client.HTTPConnection = http.client.HTTPSConnection(
            host, port, timeout=ANSWER_SECONDS, context=ssl.create_default_context()
        )
    else:
        connection = http.client.HTTPConnection(host, port, timeout=ANSWER_SECONDS)
    body = {"host": socket.gethostname(), "boot_id": boot_id(), "version": STUDIO_VERSION}
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    try:
        connection.request("POST", f"{path}/api/v1/join/", json.dumps(body), headers)
        answer = connection.getresponse()
        status, content = answer.status, answer.read(1 << 20)
    except (OSError, http.client.HTTPException) as error:
        raise JoinError(f"{url} does not answer: {error}. Check the address.") from error
    finally:
        connection.close()
    if 300 <= status < 400:
        raise JoinError(f"{url} answers with a redirect, which a token does not follow. Use the address it leads to.")
    try:
        found = json.loads(content)
    except ValueError:
        raise JoinError(
            f"{url} answers with status {status} and not as PEFT Studio does. Check the address, and that"
            " STUDIO_ALLOWED_HOSTS of the studio names it."
        ) from None
    if status != http.HTTPStatus.OK:
        problem = found.get("error", {})
        raise JoinError(f"{problem.get('message', f'Status {status}.')} {problem.get('help', '')}".strip())
    return Joined(url, found["version"], {str(name): str(value) for name, value in found["environment"].items()})


def check_reach(joined: Joined) -> None:
    """Try the database, the broker and the storage from this machine; raises JoinError that says which is missing."""
    environment = joined.environment
    try:
        psycopg.connect(environment["DATABASE_URL"], connect_timeout=CONNECT_SECONDS).close()
    except psycopg.OperationalError as error:
        raise JoinError(
            f"The studio's database does not answer from this machine: {str(error).strip()}. Set STUDIO_SERVERS_HOST or"
            " DATABASE_URL of the studio to an address that this machine reaches, and let its port through."
        ) from error
    try:
        with redis.Redis.from_url(
            environment["REDIS_URL"], socket_timeout=CONNECT_SECONDS, socket_connect_timeout=CONNECT_SECONDS
        ) as client:
            client.ping()
    except redis.RedisError as error:
        raise JoinError(
            f"The studio's Redis does not answer from this machine: {error}. Set STUDIO_SERVERS_HOST or REDIS_URL of"
            " the studio to an address that this machine reaches, and let its port through."
        ) from error
    if not environment.get("STUDIO_S3_BUCKET"):
        return
    from studio.storage.errors import StorageError
    from studio.storage.s3 import S3Storage

    try:
        names = ("endpoint", "bucket", "prefix", "region", "key_id", "secret")
        S3Storage(**{name: environment.get(f"STUDIO_S3_{name.upper()}", "") for name in names}).size("is-there")
    except StorageError as error:
        raise JoinError(f"The studio's storage cannot be used from this machine. {error}") from error


def check_machine(data_dir: Path) -> None:
    """Whether this machine can work at all, asked before a token is spent on it.

    Raises:
        JoinError: it has no worker half, or its data folder is that of a studio of its own.
    """
    if not can_train():
        raise JoinError("This installation has no worker half: pip install 'peft-studio[web,worker,s3]' adds it.")
    if (data_dir / "servers").exists():
        raise JoinError(f"{data_dir} is the data folder of a studio of its own. Set STUDIO_DATA_DIR to another folder.")


def keep(joined: Joined, data_dir: Path) -> Path:
    """Write what the studio has told into this machine's data folder, for its owner alone; the file's path.

    Raises:
        JoinError: the folder cannot be written.
    """
    path = data_dir / KEPT_NAME
    aside = path.with_suffix(".new")
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        data_dir.chmod(0o700)
        aside.unlink(missing_ok=True)
        with os.fdopen(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump({"url": joined.url, "version": joined.version, "environment": dict(joined.environment)}, file)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError as error:
        raise JoinError(
            f"{path} cannot be written: {error.strerror}. Set STUDIO_DATA_DIR to a folder of yours."
        ) from error
    return path


def kept(data_dir: Path) -> Joined:
    """What was kept when this machine joined; raises JoinError when it has not."""
    try:
        found: dict[str, Any] = json.loads((data_dir / KEPT_NAME).read_text())
        return Joined(found["url"], found["version"], found["environment"])
    except FileNotFoundError:
        raise JoinError(
            f"This machine has not joined a studio yet: {data_dir} has no {KEPT_NAME}. Make a token on the studio's"
            " page Workers and run: python manage.py join URL TOKEN"
        ) from None
    except (OSError, ValueError, KeyError) as error:
        raise JoinError(f"{data_dir / KEPT_NAME} cannot be read. Join again with a new token.") from error


def run_workers(data_dir: Path, say: Say) -> None:
    """Run a worker for each device of this machine, started again when it dies, until Ctrl-C or SIGTERM.

    Raises:
        JoinError: this machine has not joined, or runs its workers already.
    """
    joined = kept(data_dir)
    environment = {
        **os.environ,
        **joined.environment,
        "DJANGO_SETTINGS_MODULE": "studio.settings",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
        "PYTHONUNBUFFERED": "1",
        "STUDIO_DATA_DIR": str(data_dir),
        "STUDIO_SECRET_KEY": secret_key(data_dir),
    }
    # Two data folders of one machine have workers with the same names otherwise.
    suffix = f"-{hashlib.sha256(os.fsencode(data_dir)).hexdigest()[:6]}"
    stops = StopSignals()
    try:
        with hold_folder(data_dir) as lock, stops:
            lock.write(joined.url)
            tree = ProcessTree(data_dir / "logs", environment, say)
            try:
                for device in find_devices():
                    say(device.sentence())
                    tree.start(device_worker_plan(device, suffix=suffix))
                say(f"Working for {joined.url}. Logs: {data_dir / 'logs'}. Ctrl-C stops.")
                while not stops.num_asked:
                    tree.tend(0.5)
            finally:
                say("Stopping...")
                num_asked = stops.num_asked
                # A second Ctrl-C means: now.
                tree.stop(hurry=lambda: stops.num_asked > max(num_asked, 1))
    except LaunchError as error:
        raise JoinError(str(error)) from error
    say("Stopped. Nothing of PEFT Studio runs on this machine any more.")


def _address(url: str, *, trusts_network: bool) -> tuple[str, str, int | None, str]:
    """(scheme, host, port, path) of a studio's URL that a token may be sent to."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise JoinError(f"{url} is no address. It looks like https://studio.example.org") from None
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise JoinError(f"{url} is no address. It looks like https://studio.example.org")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise JoinError("The address of the studio has no user, query or fragment; the token comes after it.")
    if parts.scheme == "http" and not trusts_network and not _is_loopback(parts.hostname):
        raise JoinError(
            f"{url} is not encrypted, and passwords are about to travel over it. Use https, or add --trust-network when"
            " nobody else can read or change what this network carries."
        )
    return parts.scheme, parts.hostname, port, parts.path.rstrip("/")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

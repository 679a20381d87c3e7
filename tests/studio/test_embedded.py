from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import psycopg
import pytest
import redis

from studio import embedded
from studio.embedded import EmbeddedServerError, EmbeddedServers, Listening, embedded_servers
from tests.processes import has_ended, wait_for

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short folder that others may pass through: pytest's own is private, and its path is long."""
    made = Path(tempfile.mkdtemp(prefix="ps-"))
    made.chmod(0o711)
    yield made
    shutil.rmtree(made, ignore_errors=True)


def add_row(url: str) -> int:
    """Add a row; how many there are now."""
    with psycopg.connect(url) as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS kept (n serial)")
        connection.execute("INSERT INTO kept DEFAULT VALUES")
        [count] = connection.execute("SELECT count(*) FROM kept").fetchone() or [0]
    return int(count)


def lives(pid: int) -> bool:
    """Whether there is such a process, and it has not ended."""
    try:
        return not has_ended(psutil.Process(pid))
    except psutil.NoSuchProcess:
        return False


def add_key(url: str) -> int:
    with redis.Redis.from_url(url) as client:
        return int(client.incr("kept"))


def test_both_keep_their_data_over_a_restart_and_leave_no_process(folder: Path) -> None:
    pids: list[int] = []
    for count in (1, 2):
        with embedded_servers(folder) as servers:
            urls = servers.urls()
            assert add_row(urls.database) == add_key(urls.redis) == count
            pids += servers.pids().values()
    assert not [pid for pid in pids if psutil.pid_exists(pid)]


def test_rows_survive_a_killed_postmaster(folder: Path) -> None:
    with embedded_servers(folder) as servers:
        assert add_row(servers.urls().database) == 1
        os.kill(servers.pids()["postgres"], signal.SIGKILL)
        wait_for(lambda: "postgres" not in servers.pids(), what="the death of PostgreSQL")
        assert servers.revive() == ["postgres"]
        assert servers.revive() == []
        assert add_row(servers.urls().database) == 2


def test_servers_of_a_killed_launcher_are_stopped_before_a_new_start(folder: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from studio import embedded\n"
        "embedded.die_with_parent = lambda number: None\n"  # as on a system without such a signal
        "s = embedded.EmbeddedServers(Path(sys.argv[1])); s.start(); print(*s.pids().values(), flush=True)\n"
        "time.sleep(600)"
    )
    launcher = subprocess.Popen(
        [sys.executable, "-c", script, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert launcher.stdout is not None
    survivors = [int(pid) for pid in launcher.stdout.readline().split()]
    assert len(survivors) == 2
    servers = EmbeddedServers(folder)
    assert add_row(servers.urls().database) == 1
    launcher.kill()
    launcher.wait()
    assert all(psutil.pid_exists(pid) for pid in survivors)
    with embedded_servers(folder) as servers:
        assert not set(servers.pids().values()) & set(survivors)
        assert add_row(servers.urls().database) == 2
    assert not any(lives(pid) for pid in survivors)


def test_a_process_that_took_over_a_stale_number_is_left_alone(folder: Path) -> None:
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        servers = EmbeddedServers(folder)
        (servers.folder / "valkey.pid").write_text(f"{bystander.pid}\n")
        servers.stop_survivors()
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells children of their parent's end")
def test_a_killed_launcher_takes_its_servers_along(folder: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from studio.embedded import EmbeddedServers\n"
        "s = EmbeddedServers(Path(sys.argv[1])); s.start(); print(*s.pids().values(), flush=True); time.sleep(600)"
    )
    launcher = subprocess.Popen(
        [sys.executable, "-c", script, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert launcher.stdout is not None
    pids = [int(pid) for pid in launcher.stdout.readline().split()]
    launcher.kill()
    launcher.wait()
    wait_for(lambda: not any(lives(pid) for pid in pids), what="the end of both")


def test_a_long_data_path_puts_the_sockets_elsewhere(folder: Path) -> None:
    deep = folder / ("long-name-" * 12)
    deep.mkdir(mode=0o711)
    with embedded_servers(deep) as servers:
        assert not servers.sockets.is_relative_to(deep)
        assert servers.sockets.stat().st_mode & 0o777 == 0o700
        assert add_row(servers.urls().database) == add_key(servers.urls().redis) == 1
    shutil.rmtree(servers.sockets)


def test_each_server_is_started_alone_when_the_other_is_given(folder: Path) -> None:
    for chosen in ("postgres", "valkey"):
        servers = EmbeddedServers(folder)
        servers.start(postgres=chosen == "postgres", valkey=chosen == "valkey")
        try:
            assert list(servers.pids()) == [chosen]
        finally:
            servers.stop()


def test_secrets_are_readable_by_their_owner_only(folder: Path) -> None:
    servers = EmbeddedServers(folder)
    assert (servers.folder / "passwords.json").stat().st_mode & 0o777 == 0o600
    assert servers.sockets.stat().st_mode & 0o777 == 0o700
    assert EmbeddedServers(folder).urls() == servers.urls()


def test_strangers_without_the_password_are_refused(folder: Path) -> None:
    with embedded_servers(folder) as servers:
        with pytest.raises(psycopg.OperationalError, match="password"):
            psycopg.connect(f"host={servers.sockets} user=studio dbname=studio password=guess", connect_timeout=60)
        client = redis.Redis(unix_socket_path=str(servers.sockets / "valkey.sock"))
        with client, pytest.raises(redis.AuthenticationError):
            client.ping()


def test_a_cluster_of_another_version_is_not_touched(folder: Path) -> None:
    servers = EmbeddedServers(folder)
    (servers.folder / "postgres").mkdir()
    (servers.folder / "postgres" / "PG_VERSION").write_text("11\n")
    with pytest.raises(EmbeddedServerError, match="made by PostgreSQL 11"):
        servers.start()
    assert servers.pids() == {}


def test_a_server_that_cannot_start_says_what_its_log_says(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    servers = EmbeddedServers(folder)
    monkeypatch.setattr(embedded, "_valkey_quote", lambda value: '"broken')
    with pytest.raises(EmbeddedServerError, match="valkey ended at once"):
        servers.start()
    assert servers.pids() == {}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root needs to become somebody else")
def test_root_without_namespaces_becomes_nobody(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "_may_unshare", lambda: False)
    for count in (1, 2):
        with embedded_servers(folder) as servers:
            assert psutil.Process(servers.pids()["postgres"]).uids().real == embedded.NOBODY
            assert add_row(servers.urls().database) == count


@pytest.mark.skipif(os.geteuid() != 0, reason="only root needs to become somebody else")
def test_root_without_namespaces_below_a_private_folder_is_told_what_to_do(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "_may_unshare", lambda: False)
    folder.chmod(0o700)
    with pytest.raises(EmbeddedServerError, match="keeps other users out"):
        EmbeddedServers(folder).start()


def test_with_an_address_both_answer_there_and_refuse_who_has_no_password(folder: Path) -> None:
    ports: list[tuple[int, int]] = []
    for count in (1, 2):
        servers = EmbeddedServers(folder, Listening("127.0.0.1"))
        urls = servers.start()
        try:
            assert "127.0.0.1" in urls.database
            assert "127.0.0.1" in urls.redis
            assert add_row(urls.database) == add_key(urls.redis) == count
            assert servers.listening is not None
            ports.append((servers.listening.postgres_port, servers.listening.redis_port))
            password = urls.database.split(":")[2].partition("@")[0]
            with pytest.raises(psycopg.OperationalError, match="password"):
                psycopg.connect(urls.database.replace(password, "wrong"))
            with pytest.raises(redis.AuthenticationError):
                add_key(f"redis://127.0.0.1:{ports[-1][1]}/0")
            assert servers.revive() == []
        finally:
            servers.stop()
    assert ports[0] == ports[1], "whoever has joined finds them again after a restart"
    with embedded_servers(folder) as sockets_only:
        assert add_row(sockets_only.urls().database) == 3
        with pytest.raises(redis.ConnectionError):
            add_key(f"redis://127.0.0.1:{ports[0][1]}/0")


@pytest.mark.parametrize(
    ("host", "sentence"), [("0.0.0.0", "no other machine can connect"), ("203.0.113.7", "cannot listen on")]
)
def test_an_address_that_is_none_of_this_machine_is_refused(folder: Path, host: str, sentence: str) -> None:
    with pytest.raises(EmbeddedServerError, match=sentence):
        EmbeddedServers(folder, Listening(host))

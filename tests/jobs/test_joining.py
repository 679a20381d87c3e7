"""Join tokens, what they are exchanged for, and what a machine refuses to do with them."""

from __future__ import annotations

import json
import socket
import stat
import threading
from collections.abc import Iterator
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from django.test import Client
from django.utils import timezone

from jobs.join_tokens import find_join_token, issue_join_token, may_add_machines
from jobs.models import JoinToken
from studio import joining
from studio.accounts.models import AuditEvent, Membership, Role, Team, User
from studio.devices import boot_id
from studio.joining import Joined, JoinError, ask_to_join, check_machine, check_reach, keep, kept
from studio.version import STUDIO_VERSION
from tests.processes import reserved_ports

pytestmark = pytest.mark.django_db
HERE = {"host": "gpu-7", "boot_id": boot_id(), "version": STUDIO_VERSION}


@pytest.fixture
def remote(settings: Any) -> Any:
    """A studio whose files are in a shared storage; nothing is asked of it here."""
    settings.S3_BUCKET, settings.S3_ENDPOINT, settings.S3_SECRET = "studio", "https://s3.example.org", "s3-secret"
    return settings


def ask(secret: str, **changes: str) -> Any:
    return Client().post(
        "/api/v1/join/", json.dumps(HERE | changes), content_type="application/json",
        headers={"authorization": f"Bearer {secret}"},
    )  # fmt: skip


def test_a_token_is_exchanged_once_for_what_a_worker_needs_and_no_more(team: Team, alice: User, remote: Any) -> None:
    token, secret = issue_join_token(team, alice)
    answer = ask(secret)
    assert answer.status_code == 200
    told = answer.json()["environment"]
    assert told["DATABASE_URL"] == remote.DATABASE_URL
    assert told["REDIS_URL"] == remote.REDIS_URL
    assert told["STUDIO_S3_SECRET"] == "s3-secret"
    assert float(told["STUDIO_LEASE_SECONDS"]) == remote.LEASE_SECONDS
    assert remote.SECRET_KEY not in answer.content.decode()
    assert ask(secret).status_code == 401
    token.refresh_from_db()
    assert token.used_by.startswith("gpu-7 (")
    assert set(AuditEvent.objects.values_list("action", flat=True)) == {"join_token.issued", "machine.joined"}


def test_only_a_hash_of_a_token_is_stored(team: Team, alice: User) -> None:
    token, secret = issue_join_token(team, alice)
    assert secret not in json.dumps(JoinToken.objects.values().get(), default=str)
    assert secret.startswith(token.hint)
    assert token.expires_at - timezone.now() <= timedelta(hours=1)


@pytest.mark.parametrize("change", ["expired", "revoked", "left", "lowered", "inactive"])
def test_a_token_dies_with_time_revocation_and_its_makers_right(
    team: Team, alice: User, remote: Any, change: str
) -> None:
    token, secret = issue_join_token(team, alice)
    assert find_join_token(secret) == token
    match change:
        case "expired":
            JoinToken.objects.update(expires_at=timezone.now() - timedelta(seconds=1))
        case "revoked":
            JoinToken.objects.update(revoked_at=timezone.now())
        case "left":
            Membership.objects.all().delete()
        case "lowered":
            Membership.objects.update(role=Role.LEAD)
        case "inactive":
            User.objects.update(is_active=False)
    answer = ask(secret)
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "join_token"


def test_a_join_token_opens_nothing_else_and_a_wrong_one_opens_nothing(team: Team, alice: User, remote: Any) -> None:
    _, secret = issue_join_token(team, alice)
    for path in ("/api/v1/me", "/api/v1/workers/"):
        assert Client().get(path, headers={"authorization": f"Bearer {secret}"}).status_code == 401
    assert ask("pjt_wrong").status_code == 401
    assert Client().post(f"/api/v1/join/?token={secret}", "{}", content_type="application/json").status_code == 401


def test_what_cannot_work_is_refused_in_words_and_costs_no_token(team: Team, alice: User, remote: Any) -> None:
    _, secret = issue_join_token(team, alice)

    def refused(**changes: str) -> str:
        answer = ask(secret, **changes)
        assert answer.status_code == 409
        assert "environment" not in answer.json()
        return f"{answer.json()['error']['message']} {answer.json()['error']['help']}"

    assert "Install the same version" in refused(version="0.1.0+0badcafe")
    remote.DATABASE_URL = "postgres://studio:x@%2Ftmp%2Frun/studio"
    assert "DATABASE_URL listens on this machine alone" in refused(boot_id="another machine")
    assert "STUDIO_SERVERS_HOST" in refused(boot_id="another machine")
    remote.DATABASE_URL, remote.REDIS_URL = "postgres://studio:x@db.example.org/studio", "redis://:x@127.0.0.1:6379/0"
    assert "REDIS_URL listens on this machine alone" in refused(boot_id="another machine")
    remote.REDIS_URL = "redis://:x@redis.example.org:6379/0"
    remote.S3_ENDPOINT = "http://localhost:9000"
    assert "STUDIO_S3_ENDPOINT has a loopback address" in refused(boot_id="another machine")
    remote.S3_BUCKET = ""
    assert "STUDIO_S3_BUCKET" in refused()
    remote.S3_BUCKET, remote.S3_ENDPOINT = "studio", ""
    assert ask(secret, boot_id="another machine").status_code == 200, "none of the refusals used the token up"


def test_an_admin_makes_a_token_on_the_page_and_ends_it(alice_client: Client, alice: User) -> None:
    page = alice_client.post("/workers/tokens/").content.decode()
    token = JoinToken.objects.get()
    assert f"python manage.py join http://testserver {token.hint}" in page
    assert "--trust-network" in page
    assert "no-store" in alice_client.post("/workers/tokens/")["Cache-Control"]
    again = alice_client.get("/workers/").content.decode()
    assert f"{token.hint}…" in again
    assert "manage.py join" not in again, "a token is shown once"
    alice_client.post(f"/workers/tokens/{token.pk}/revoke/")
    token.refresh_from_db()
    assert token.revoked_at is not None
    actions = list(AuditEvent.objects.filter(user=alice).order_by("pk").values_list("action", flat=True))
    assert actions == ["join_token.issued", "join_token.issued", "join_token.revoked"]


def test_who_is_no_admin_of_the_first_team_adds_no_machine(
    team: Team, alice: User, other_team: Team, bob_client: Client, charlie: User, charlie_client: Client
) -> None:
    assert may_add_machines(Membership.objects.get(user=alice))
    assert not may_add_machines(Membership.objects.get(user=charlie))
    for client in (bob_client, charlie_client):
        assert client.post("/workers/tokens/").status_code == 403
        assert "Add a machine" not in client.get("/workers/").content.decode()
    assert not JoinToken.objects.exists()


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("http://studio.example.org", "is not encrypted"),
        ("http://10.0.0.5:8000", "--trust-network"),
        ("ftp://studio.example.org", "is no address"),
        ("studio.example.org", "is no address"),
        ("http://localhost:port", "is no address"),
        ("https://user:pw@studio.example.org", "has no user, query or fragment"),
        ("https://studio.example.org/?token=x", "has no user, query or fragment"),
    ],
)
def test_a_token_is_sent_to_no_address_that_is_not_safe(
    url: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "create_connection", lambda *_: pytest.fail("something was sent"))
    with pytest.raises(JoinError, match=sentence):
        ask_to_join(url, "pjt_secret")


class _Answering(BaseHTTPRequestHandler):
    answer: tuple[int, dict[str, str], bytes] = (200, {}, b"")
    heard: list[str] = []

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.heard.append(self.path)
        status, headers, body = self.answer
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing is printed."""


@pytest.fixture
def somebody() -> Iterator[str]:
    """A web server that is not the studio."""
    server = HTTPServer(("127.0.0.1", 0), _Answering)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    _Answering.heard.clear()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        ((302, {"Location": "http://elsewhere.example.org/"}, b""), "redirect, which a token does not follow"),
        ((200, {}, b"<html>hello</html>"), "not as PEFT Studio does"),
        ((400, {}, b"<h1>Bad Request (400)</h1>"), "STUDIO_ALLOWED_HOSTS"),
        ((409, {}, b'{"error": {"message": "No.", "help": "Do this."}}'), "No. Do this."),
    ],
)
def test_what_answers_otherwise_is_said(
    somebody: str, answer: tuple[int, dict[str, str], bytes], sentence: str
) -> None:
    _Answering.answer = answer
    with pytest.raises(JoinError, match=sentence):
        ask_to_join(f"{somebody}/below", "pjt_secret")
    assert _Answering.heard == ["/below/api/v1/join/"]


def test_nobody_there_is_said() -> None:
    with reserved_ports(1) as [port], pytest.raises(JoinError, match="does not answer"):
        ask_to_join(f"http://127.0.0.1:{port}", "pjt_secret")


def test_servers_that_cannot_be_reached_are_named() -> None:
    with reserved_ports(1) as [port]:
        told = {"DATABASE_URL": f"postgres://x:y@127.0.0.1:{port}/z", "REDIS_URL": f"redis://127.0.0.1:{port}"}
        with pytest.raises(JoinError, match="database does not answer from this machine"):
            check_reach(Joined("https://x", "1", told))


def test_what_is_told_is_kept_for_its_owner_alone(tmp_path: Path) -> None:
    joined = Joined("https://studio.example.org", "1", {"DATABASE_URL": "postgres://secret"})
    folder = tmp_path / "machine"
    for _ in range(2):
        path = keep(joined, folder)
    assert (stat.S_IMODE(path.stat().st_mode), stat.S_IMODE(folder.stat().st_mode)) == (0o600, 0o700)
    assert kept(folder) == joined
    with pytest.raises(JoinError, match="has not joined"):
        kept(tmp_path)


def test_a_machine_that_cannot_work_spends_no_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_machine(tmp_path)
    (tmp_path / "servers").mkdir()
    with pytest.raises(JoinError, match="of a studio of its own"):
        check_machine(tmp_path)
    monkeypatch.setattr(joining, "can_train", lambda: False)
    with pytest.raises(JoinError, match="no worker half"):
        check_machine(tmp_path)

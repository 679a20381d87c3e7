"""Mail: to whom, about what, over a real SMTP server, and how it ends."""

from __future__ import annotations

import email
import re
from collections.abc import Iterator
from email.message import Message
from typing import Any

import pytest
from aiosmtpd.controller import Controller
from django.test import Client

from studio.accounts.models import ApiToken, Team, User, record
from studio.webhooks.delivering import deliver_due
from studio.webhooks.models import Delivery, MailSettings
from tests.conftest import signed_in
from tests.factories import make_adapter, make_job_for
from tests.processes import reserved_ports

pytestmark = pytest.mark.django_db


class Box:
    """What the mail server took."""

    def __init__(self) -> None:
        self.mails: list[tuple[list[str], Message]] = []
        self.refuses = False

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:
        if self.refuses:
            return "451 come back later"
        self.mails.append((envelope.rcpt_tos, email.message_from_bytes(envelope.content)))
        return "250 taken"


@pytest.fixture
def box(settings: Any) -> Iterator[Box]:
    box = Box()
    settings.EMAIL_BACKEND = "django.core.mail.backends.smtp.EmailBackend"
    settings.EMAIL_USE_TLS = settings.EMAIL_USE_SSL = False
    settings.PUBLIC_URL = "https://studio.example.org"
    with reserved_ports(1) as [port]:
        settings.EMAIL_HOST, settings.EMAIL_PORT = "127.0.0.1", port
        controller = Controller(box, hostname="127.0.0.1", port=port)
        controller.start()
        yield box
        controller.stop()


@pytest.fixture
def mailed(bob: User) -> User:
    User.objects.filter(pk=bob.pk).update(email="bob@example.org")
    bob.refresh_from_db()
    return bob


def parts(message: Message) -> dict[str, str]:
    return {
        part.get_content_type(): part.get_payload(decode=True).decode()
        for part in message.walk()
        if not part.is_multipart()
    }


def test_the_owner_of_a_job_gets_a_mail_with_a_link(team: Team, mailed: User, box: Box) -> None:
    job = make_job_for(make_adapter(team, mailed, name="support"))
    record("job.succeeded", team=team, target=job, owner_id=mailed.pk)
    deliver_due()
    [(to, message)] = box.mails
    assert to == ["bob@example.org"]
    assert message["Subject"] == "support is done"
    found = parts(message)
    assert set(found) == {"text/plain", "text/html"}
    assert f"https://studio.example.org/jobs/{job.pk}/" in found["text/plain"]
    assert "meow" not in found["text/plain"] + found["text/html"]
    assert message["List-Unsubscribe-Post"] == "List-Unsubscribe=One-Click"


def test_reviewers_and_who_is_named_get_mail_and_not_who_did_it(
    team: Team, alice: User, mailed: User, box: Box
) -> None:
    adapter = make_adapter(team, alice)
    record("review.assigned", team=team, user=alice, target=adapter, reviewer_id=mailed.pk)
    record("review.mentioned", team=team, user=alice, target=adapter, mentioned_id=mailed.pk)
    record("review.mentioned", team=team, user=mailed, target=adapter, mentioned_id=mailed.pk)
    deliver_due()
    assert sorted(str(message["Subject"]) for _, message in box.mails) == [
        "You are named in the review of support", "Your review is asked for: support",
    ]  # fmt: skip


def test_nobody_hears_of_another_team_or_after_leaving(
    team: Team, other_team: Team, charlie: User, mailed: User, box: Box
) -> None:
    record("job.succeeded", team=other_team, owner_id=mailed.pk)
    assert not Delivery.objects.exists()
    record("job.succeeded", team=team, owner_id=mailed.pk)
    mailed.memberships.all().delete()
    deliver_due()
    assert box.mails == []
    assert Delivery.objects.get().state == "dead"


def test_a_mail_server_that_refuses_is_tried_again(team: Team, mailed: User, box: Box) -> None:
    box.refuses = True
    record("job.failed", team=team, owner_id=mailed.pk)
    deliver_due()
    assert "mail server did not take it" in Delivery.objects.get().error
    box.refuses = False
    Delivery.objects.update(next_try_at=Delivery.objects.get().created_at)
    deliver_due()
    assert len(box.mails) == 1


def test_the_link_in_the_mail_ends_mail_of_its_kind_without_signing_in(team: Team, mailed: User, box: Box) -> None:
    record("job.failed", team=team, owner_id=mailed.pk)
    deliver_due()
    path = re.search(r"<https://studio.example.org(.*)>", str(box.mails[0][1]["List-Unsubscribe"]).replace("\n", ""))
    assert path is not None
    client = Client(enforce_csrf_checks=True)
    assert "Stop this mail?" in client.get(path[1]).content.decode()
    assert not MailSettings.objects.exists()
    assert "No more mail" in client.post(path[1], {"List-Unsubscribe": "One-Click"}).content.decode()
    kept = MailSettings.objects.get()
    assert (kept.jobs, kept.reviews, kept.mentions) == (False, True, True)
    record("job.failed", team=team, owner_id=mailed.pk)
    assert deliver_due() == 0
    assert client.post(path[1][:-3] + "x/").status_code == 404


def test_a_person_chooses_on_a_page_which_says_when_there_is_no_mail_server(bob: User) -> None:
    client = signed_in(bob)
    assert "no mail server" in client.get("/webhooks/mail/").content.decode()
    client.post("/webhooks/mail/", {"email": "b@example.org", "reviews": "on"})
    bob.refresh_from_db()
    kept = MailSettings.objects.get()
    assert (bob.email, kept.jobs, kept.reviews, kept.mentions) == ("b@example.org", False, True, False)


def test_the_api_reads_and_changes_ones_own_mail_settings_and_nobody_elses(team: Team, bob: User, alice: User) -> None:
    def api(user: User, *scopes: str) -> Client:
        _, secret = ApiToken.issue(team=team, user=user, name="x", scopes=list(scopes))
        return Client(headers={"authorization": f"Bearer {secret}"})

    def change(client: Client, **body: object) -> Any:
        return client.patch("/api/v1/me/mail/", body, content_type="application/json")

    mine = api(bob, "read", "write")
    assert mine.get("/api/v1/me/mail/").json() == {
        "email": "", "jobs": True, "reviews": True, "mentions": True, "is_configured": False,
    }  # fmt: skip
    assert change(mine, email="bob@example.org", mentions=False).json()["mentions"] is False
    assert change(mine, jobs=False).json() == {
        "email": "bob@example.org", "jobs": False, "reviews": True, "mentions": False, "is_configured": False,
    }  # fmt: skip
    wrong = change(mine, email="nobody at home")
    assert (wrong.status_code, wrong.json()["error"]["field"]) == (422, "email")
    assert change(api(bob, "read"), jobs=True).status_code == 403
    assert api(alice, "read").get("/api/v1/me/mail/").json()["email"] == ""
    bob.refresh_from_db()
    assert bob.email == "bob@example.org"
    assert 'value="bob@example.org"' in signed_in(bob).get("/webhooks/mail/").text

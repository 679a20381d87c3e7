"""Mail about an event to one person: a sentence, a link and the way to stop it. Never what a row holds."""

from __future__ import annotations

import smtplib

from django.apps import apps
from django.conf import settings
from django.core import signing
from django.core.mail import EmailMultiAlternatives, get_connection
from django.template.loader import render_to_string
from django.urls import reverse

from studio.accounts.models import User
from studio.webhooks.hearing import MAILED, wants_mail
from studio.webhooks.models import Delivery
from studio.webhooks.posting import Answer

SALT = "studio.webhooks.unsubscribe"
SUBJECTS = {
    "job.succeeded": "{name} is done",
    "job.failed": "{name} has failed",
    "review.assigned": "Your review is asked for: {name}",
    "review.mentioned": "You are named in the review of {name}",
}


class MailError(RuntimeError):
    """The mail server did not take the mail; it is tried again."""


class NotWanted(Exception):  # noqa: N818  no error: the person has changed their mind or left
    """The mail is not to be sent any more."""


def is_configured() -> bool:
    """Whether the studio has a mail server."""
    return bool(settings.EMAIL_HOST)


def unsubscribe_token(person: User, kind: str) -> str:
    """Signed, so that nobody can end somebody else's mail; does not expire, as a mail does not."""
    return signing.dumps([person.pk, kind], salt=SALT)


def read_token(token: str) -> tuple[int, str] | None:
    """(person's id, kind of mail) of a link in a mail; None when it was not made here."""
    try:
        person_id, kind = signing.loads(token, salt=SALT)
    except (signing.BadSignature, ValueError):
        return None
    return int(person_id), str(kind)


def send(delivery: Delivery) -> Answer:
    """Send one mail.

    Raises:
        MailError: there is no mail server, or it did not take the mail.
        NotWanted: the person does not want it any more, has no address, or has left the team.
    """
    person = delivery.person
    assert person is not None
    kind = MAILED[delivery.action][0]
    if not person.email or not person.is_active or not person.memberships.filter(team=delivery.team).exists():
        raise NotWanted("The person has left the team or has no address.")
    if not wants_mail(person, kind):
        raise NotWanted("The person wants no mail of this kind.")
    if not is_configured():
        raise NotWanted("No mail server is set up (STUDIO_SMTP_HOST).")
    stop = settings.PUBLIC_URL + reverse("webhooks:unsubscribe", args=[unsubscribe_token(person, kind)])
    name = delivery.payload["object_name"]
    context = {
        "headline": SUBJECTS[delivery.action].format(name=name),
        "by": delivery.payload["by"],
        "team": delivery.team.name,
        "link": _link(delivery),
        "stop": stop,
        "settings_link": settings.PUBLIC_URL + reverse("webhooks:mail"),
    }
    mail = EmailMultiAlternatives(
        subject=" ".join(context["headline"].split()),
        body=render_to_string("webhooks/mail.txt", context),
        to=[person.email],
        headers={
            "Message-ID": f"<{delivery.message_id}@{settings.MAIL_FROM.rpartition('@')[2].rstrip('>')}>",
            "List-Unsubscribe": f"<{stop}>",
            "List-Unsubscribe-Post": "List-Unsubscribe=One-Click",
        },
        from_email=settings.MAIL_FROM,
        connection=get_connection(timeout=15),
    )
    mail.attach_alternative(render_to_string("webhooks/mail.html", context), "text/html")
    try:
        mail.send()
    except (smtplib.SMTPException, OSError) as error:
        raise MailError(f"The mail server did not take it: {error}") from error
    return Answer(250, "")


def _link(delivery: Delivery) -> str:
    """The page of the event's object; the studio's first page when it is gone or has none."""
    wanted = delivery.payload["object_type"]
    for model in apps.get_models():
        if model._meta.model_name == wanted and hasattr(model, "get_absolute_url"):
            found = model._base_manager.filter(pk=delivery.payload["object_id"], team=delivery.team).first()
            if found is not None:
                return settings.PUBLIC_URL + str(found.get_absolute_url())
    return settings.PUBLIC_URL + "/"

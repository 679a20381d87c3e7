"""Webhooks: what is owed is written with its event, sent, signed, tried again and given up."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import redis
from django.conf import settings as django_settings
from django.db import transaction
from django.utils import timezone
from standardwebhooks.webhooks import Webhook as Verifier
from standardwebhooks.webhooks import WebhookVerificationError

from jobs.celery import app as celery
from studio.accounts.models import AuditEvent, Team, User, record
from studio.webhooks import managing
from studio.webhooks.delivering import RETRY_SECONDS, deliver_due, prune
from studio.webhooks.models import Delivery, DeliveryState, Webhook
from studio.webhooks.tasks import prune_deliveries
from tests.studio.webhooks.receivers import Receiver, receiving

pytestmark = pytest.mark.django_db


@pytest.fixture
def receiver(settings: Any) -> Iterator[Receiver]:
    settings.WEBHOOK_PRIVATE_NETWORKS = True
    with receiving() as found:
        yield found


@pytest.fixture
def hook(team: Team, alice: User, receiver: Receiver) -> tuple[Webhook, str]:
    return managing.add_webhook(team=team, user=alice, url=receiver.url, events=["job.succeeded", "dataset.*"])


def make_due() -> None:
    Delivery.objects.filter(state=DeliveryState.WAITING).update(next_try_at=timezone.now())


def test_an_event_that_is_wanted_arrives_with_a_signature_that_others_verify(
    team: Team, alice: User, hook: tuple[Webhook, str], receiver: Receiver
) -> None:
    record("dataset.uploaded", team=team, user=alice, num_bytes=7)
    record("member.invited", team=team, user=alice)
    assert deliver_due() == 1
    [(path, headers, body)] = receiver.requests
    assert path == "/hook?x=1"
    told = Verifier(hook[1]).verify(body, headers)
    assert told["type"] == "dataset.uploaded"
    assert told["data"]["details"] == {"num_bytes": 7}
    delivery = Delivery.objects.get()
    assert (delivery.state, delivery.status, delivery.response) == ("delivered", 200, "thanks")
    assert deliver_due() == 0


def test_the_secret_is_not_readable_in_the_database_and_another_one_does_not_verify(
    team: Team, hook: tuple[Webhook, str], receiver: Receiver
) -> None:
    assert hook[1] not in json.dumps(list(Webhook.objects.values("secret", "previous_secret")))
    record("job.succeeded", team=team)
    deliver_due()
    with pytest.raises(WebhookVerificationError):
        Verifier("whsec_" + "A" * 44).verify(receiver.requests[0][2], receiver.requests[0][1])


def test_after_a_rotation_both_secrets_verify_and_the_old_one_ends(
    team: Team, alice: User, hook: tuple[Webhook, str], receiver: Receiver
) -> None:
    webhook, old = hook
    new = managing.rotate_secret(webhook, user=alice)
    record("job.succeeded", team=team)
    deliver_due()
    for secret in (old, new):
        assert Verifier(secret).verify(receiver.requests[0][2], receiver.requests[0][1])
    Webhook.objects.update(previous_until=timezone.now())
    record("job.succeeded", team=team)
    deliver_due()
    assert len(receiver.requests[1][1]["webhook-signature"].split()) == 1


def test_another_team_s_events_are_not_told(
    hook: tuple[Webhook, str], other_team: Team, charlie: User, receiver: Receiver
) -> None:
    record("job.succeeded", team=other_team, user=charlie)
    record("job.succeeded", team=None)
    assert deliver_due() == 0
    assert receiver.requests == []


def test_what_is_rolled_back_is_not_told(team: Team, hook: tuple[Webhook, str]) -> None:
    with transaction.atomic():
        record("job.succeeded", team=team)
        assert Delivery.objects.count() == 1
        transaction.set_rollback(True)
    assert not Delivery.objects.exists()


def test_a_failure_is_tried_again_with_the_same_id_and_later_each_time(
    team: Team, hook: tuple[Webhook, str], receiver: Receiver
) -> None:
    receiver.answers = [500, 503, 200]
    record("job.succeeded", team=team)
    waits = []
    for _ in range(3):
        assert deliver_due() == 1
        delivery = Delivery.objects.get()
        waits.append((delivery.next_try_at - timezone.now()).total_seconds())
        assert deliver_due() == 0
        make_due()
    assert waits[0] <= RETRY_SECONDS[0] * 1.2 < RETRY_SECONDS[1] * 0.8 - 60 < waits[1] <= RETRY_SECONDS[1] * 1.2
    assert len({headers["webhook-id"] for _, headers, _ in receiver.requests}) == 1
    assert len({body for _, _, body in receiver.requests}) == 1
    assert Delivery.objects.get().state == DeliveryState.DELIVERED
    assert Webhook.objects.get().failing_since is None


def test_after_a_day_of_tries_a_message_is_given_up_and_after_days_the_webhook_is_switched_off(
    team: Team, hook: tuple[Webhook, str], receiver: Receiver
) -> None:
    receiver.answers = [500]
    record("job.succeeded", team=team)
    for _ in range(len(RETRY_SECONDS) + 1):
        deliver_due()
        make_due()
    assert Delivery.objects.get().state == DeliveryState.DEAD
    assert len(receiver.requests) == len(RETRY_SECONDS) + 1
    assert Webhook.objects.get().disabled_at is None
    Webhook.objects.update(failing_since=timezone.now() - timedelta(days=4))
    record("job.succeeded", team=team)
    deliver_due()
    assert Webhook.objects.get().disabled_reason == "It has failed for 3 days."
    assert AuditEvent.objects.filter(action="webhook.disabled", team=team).count() == 1


def test_an_address_that_is_gone_is_switched_off_at_once(
    team: Team, hook: tuple[Webhook, str], receiver: Receiver
) -> None:
    receiver.answers = [410]
    record("job.succeeded", team=team)
    deliver_due()
    assert Webhook.objects.get().disabled_at is not None
    assert Delivery.objects.get().state == DeliveryState.DEAD


def test_redirects_are_not_followed_and_long_answers_are_cut(
    team: Team, hook: tuple[Webhook, str], receiver: Receiver
) -> None:
    receiver.answers, receiver.location, receiver.content = [302], receiver.url, b"x" * 100_000
    record("job.succeeded", team=team)
    deliver_due()
    assert len(receiver.requests) == 1
    delivery = Delivery.objects.get()
    assert (delivery.status, len(delivery.response), delivery.state) == (302, 4096, "waiting")


def test_nothing_is_lost_when_redis_is_emptied(team: Team, hook: tuple[Webhook, str], receiver: Receiver) -> None:
    record("job.succeeded", team=team)
    with redis.Redis.from_url(django_settings.REDIS_URL) as client:
        client.flushall()
    assert deliver_due() == 1
    assert len(receiver.requests) == 1


def test_messages_that_have_ended_are_removed_after_their_days_and_what_is_owed_never(
    team: Team, alice: User, hook: tuple[Webhook, str], settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("studio.webhooks.delivering.PRUNED_AT_ONCE", 2)
    webhook, _ = hook
    rows = [
        Delivery.objects.create(team=team, webhook=webhook, action="job.failed", payload={}, state=state)
        for state in (*[DeliveryState.DELIVERED] * 3, DeliveryState.DEAD, DeliveryState.WAITING)
    ]
    settings.DELIVERY_DAYS = 30
    assert prune() == 0, "none is old"
    old = timezone.now() - timedelta(days=31)
    Delivery.objects.exclude(pk=rows[0].pk).update(created_at=old)
    settings.DELIVERY_DAYS = 0
    assert prune() == 0, "kept for ever"
    settings.DELIVERY_DAYS = 30
    prune_deliveries()
    assert list(Delivery.objects.order_by("pk").values_list("pk", flat=True)) == [rows[0].pk, rows[4].pk]
    assert celery.conf.beat_schedule["prune-deliveries"]["task"] == prune_deliveries.name

"""The pages and endpoints of webhooks: for admins of the team alone."""

from __future__ import annotations

import pytest
from django.http import HttpResponse
from django.test import Client
from django.utils import timezone

from studio.accounts.models import ApiToken, AuditEvent, Team, User
from studio.webhooks import managing
from studio.webhooks.models import Delivery, Webhook

pytestmark = pytest.mark.django_db
FORM = {"url": "https://example.org/hook", "events": ["job.failed", "review.*"]}


def test_an_admin_adds_a_webhook_and_sees_its_secret_once(alice_client: Client) -> None:
    answer = alice_client.post("/webhooks/", FORM)
    assert "whsec_" in answer.content.decode()
    page = alice_client.get("/webhooks/").content.decode()
    assert "https://example.org/hook" in page
    assert "whsec_" not in page
    assert AuditEvent.objects.filter(action="webhook.added").count() == 1


def test_an_address_that_is_not_safe_is_refused_with_a_sentence(alice_client: Client) -> None:
    answer = alice_client.post("/webhooks/", FORM | {"url": "http://example.org/"})
    assert answer.status_code == 422
    assert "must begin with https" in answer.content.decode()
    assert not Webhook.objects.exists()


def test_members_without_the_role_and_other_teams_see_nothing(
    team: Team, alice: User, bob_client: Client, charlie_client: Client
) -> None:
    webhook, _ = managing.add_webhook(team=team, user=alice, **FORM)
    delivery = managing.send_test(webhook, user=alice)
    for path in (f"/webhooks/{webhook.pk}/", f"/webhooks/deliveries/{delivery.pk}/"):
        assert bob_client.get(path).status_code == 403
        assert charlie_client.get(path).status_code == 404
    for path in (f"/webhooks/{webhook.pk}/remove/", f"/webhooks/deliveries/{delivery.pk}/again/"):
        assert bob_client.post(path).status_code == 403
        assert charlie_client.post(path).status_code == 404
    assert Webhook.objects.count() == 1


def test_an_admin_tests_rotates_switches_sends_again_and_deletes(team: Team, alice: User, alice_client: Client) -> None:
    webhook, _ = managing.add_webhook(team=team, user=alice, **FORM)
    alice_client.post(f"/webhooks/{webhook.pk}/test/")
    delivery = Delivery.objects.get()
    assert "webhook.test" in alice_client.get(f"/webhooks/{webhook.pk}/").content.decode()
    assert "webhook.test" in alice_client.get(f"/webhooks/deliveries/{delivery.pk}/").content.decode()
    Delivery.objects.update(state="dead", attempts=8)
    alice_client.post(f"/webhooks/deliveries/{delivery.pk}/again/")
    delivery.refresh_from_db()
    assert (delivery.state, delivery.attempts) == ("waiting", 0)
    assert "whsec_" in alice_client.post(f"/webhooks/{webhook.pk}/rotate/").content.decode()
    alice_client.post(f"/webhooks/{webhook.pk}/off/")
    assert Webhook.objects.get().disabled_at is not None
    alice_client.post(f"/webhooks/{webhook.pk}/on/")
    assert Webhook.objects.get().disabled_at is None
    alice_client.post(f"/webhooks/{webhook.pk}/remove/")
    assert not Webhook.objects.exists()


def test_the_api_does_the_same_for_an_admin_s_token_alone(team: Team, alice: User, bob: User) -> None:
    def headers(user: User) -> dict[str, str]:
        secret = ApiToken.issue(team=team, user=user, name="x", scopes=["read", "write"])[1]
        return {"Authorization": f"Bearer {secret}"}

    client, mine = Client(), headers(alice)
    refused = client.post("/api/v1/webhooks/", FORM, content_type="application/json", headers=headers(bob))
    assert refused.status_code == 403
    made = client.post("/api/v1/webhooks/", FORM, content_type="application/json", headers=mine)
    assert made.status_code == 201
    assert made.json()["secret"].startswith("whsec_")
    address = f"/api/v1/webhooks/{made.json()['id']}/"
    assert client.post(f"{address}test/", headers=mine).status_code == 200
    log = client.get(f"{address}deliveries/", headers=mine).json()
    assert [one["action"] for one in log["items"]] == ["webhook.test"]
    assert client.delete(address, headers=mine).status_code == 204


def test_an_admin_changes_address_and_events_and_what_is_wrong_is_said(
    team: Team, alice: User, alice_client: Client, bob_client: Client, charlie_client: Client
) -> None:
    webhook, _ = managing.add_webhook(team=team, user=alice, **FORM)
    Webhook.objects.update(failing_since=timezone.now())
    url = f"/webhooks/{webhook.pk}/"
    assert 'value="https://example.org/hook"' in alice_client.get(url).text
    refused = alice_client.post(url, {"url": "http://example.org/", "events": ["job.failed"]})
    assert refused.status_code == 422
    assert "must begin with https" in refused.text
    assert alice_client.post(url, {"url": "https://example.org/hook", "events": []}).status_code == 422
    changed = {"url": "https://example.org/other", "events": ["suite.*"]}
    assert bob_client.post(url, changed).status_code == 403
    assert charlie_client.post(url, changed).status_code == 404
    assert not AuditEvent.objects.filter(action="webhook.changed").exists()
    assert alice_client.post(url, changed).status_code == 302
    webhook.refresh_from_db()
    assert (webhook.url, webhook.events, webhook.failing_since) == ("https://example.org/other", ["suite.*"], None)
    told = AuditEvent.objects.get(action="webhook.changed")
    assert told.details == {"url_before": "https://example.org/hook", "events_before": ["job.failed", "review.*"]}
    alice_client.post(url, changed)
    assert AuditEvent.objects.filter(action="webhook.changed").count() == 1, "nothing has changed"


def test_the_api_changes_what_is_sent_and_leaves_the_rest(team: Team, alice: User, bob: User, charlie: User) -> None:
    webhook, _ = managing.add_webhook(team=team, user=alice, **FORM)

    def patch(user: User, body: dict[str, object]) -> HttpResponse:
        _, secret = ApiToken.issue(team=user.memberships.get().team, user=user, name="x", scopes=["read", "write"])
        headers = {"Authorization": f"Bearer {secret}"}
        return Client().patch(f"/api/v1/webhooks/{webhook.pk}/", body, content_type="application/json", headers=headers)

    answer = patch(alice, {"events": ["job.*"]})
    assert (answer.status_code, answer.json()["events"], answer.json()["url"]) == (200, ["job.*"], FORM["url"])
    assert patch(alice, {"events": ["job.eaten"]}).json()["error"]["code"] == "unknown_event"
    assert patch(alice, {"url": "ftp://example.org"}).json()["error"]["code"] == "bad_address"
    assert patch(bob, {"events": ["job.failed"]}).status_code == 403
    assert patch(charlie, {"events": ["job.failed"]}).status_code == 404
    webhook.refresh_from_db()
    assert webhook.events == ["job.*"]

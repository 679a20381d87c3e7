"""A list that is polled costs nothing on the wire and nothing on the page while nothing changes."""

from __future__ import annotations

import pytest
from django.test import Client
from django.urls import reverse

from studio.accounts.models import Team, User
from tests.jobs.making import make_job

pytestmark = pytest.mark.django_db

POLL = {"HX-Request": "true", "HX-Target": "section#job-list"}


def test_an_unchanged_list_is_a_304_and_a_changed_one_is_not(alice_client: Client, alice: User, team: Team) -> None:
    make_job(team, alice, name="first")
    url = reverse("jobs:list")
    first = alice_client.get(url, headers=POLL)
    assert first.status_code == 200
    for name, value in (("HX-PTag", first["HX-PTag"]), ("If-None-Match", first["ETag"])):
        again = alice_client.get(url, headers=POLL | {name: value})
        assert (again.status_code, again.content) == (304, b""), name
        assert again["HX-PTag"] == first["HX-PTag"]
    make_job(team, alice, name="second")
    changed = alice_client.get(url, headers=POLL | {"HX-PTag": first["HX-PTag"]})
    assert changed.status_code == 200
    assert "second" in changed.content.decode()


def test_another_person_does_not_get_a_304_for_what_they_may_not_see(
    alice_client: Client, charlie_client: Client, alice: User, team: Team
) -> None:
    make_job(team, alice)
    tag = alice_client.get(reverse("jobs:list"), headers=POLL)["HX-PTag"]
    assert charlie_client.get(reverse("jobs:list"), headers=POLL | {"HX-PTag": tag}).status_code == 200


def test_a_whole_page_is_always_sent(alice_client: Client) -> None:
    page = alice_client.get(reverse("jobs:list"))
    assert page.status_code == 200
    assert "ETag" not in page


def test_the_running_jobs_on_the_home_page_refresh_themselves(alice_client: Client, alice: User, team: Team) -> None:
    make_job(team, alice, name="first")
    page = alice_client.get(reverse("home")).content.decode()
    assert 'id="running"' in page
    poll = {"HX-Request": "true", "HX-Target": "section#running"}
    first = alice_client.get(reverse("home"), headers=poll)
    fragment = first.content.decode()
    assert fragment.lstrip().startswith('<section id="running"')
    assert "first" in fragment
    assert "Recent models" not in fragment
    assert alice_client.get(reverse("home"), headers=poll | {"HX-PTag": first["HX-PTag"]}).status_code == 304

"""A session that ends while somebody works: there is a way back, and what they typed is not lost."""

from __future__ import annotations

import asyncio
from urllib.parse import quote

import pytest
from django.test import AsyncClient, Client
from django.urls import reverse

from studio.accounts import signed_out
from studio.accounts.models import User
from studio.catalogue.models import BaseModel
from studio.datasets.models import DatasetVersion
from tests.conftest import PASSWORD
from tests.factories import make_base_model, make_dataset_version

pytestmark = pytest.mark.django_db
HOST = "http://testserver"
POST_ONLY = "/datasets/1/delete/"


def login_for(path: str) -> str:
    return f"/login/?next={quote(path, safe='/')}"


@pytest.mark.parametrize(
    ("referer", "comes_back_to"),
    [
        (f"{HOST}/datasets/?page=2", "/datasets/?page=2"),
        ("", "/"),
        ("https://evil.example/datasets/", "/"),
        ("http://testserver.evil.example/", "/"),
        ("javascript:alert(1)", "/"),
    ],
)
@pytest.mark.parametrize("path", [POST_ONLY, "/account/name/"])
def test_a_button_leads_over_the_login_page_back_to_its_page(path: str, referer: str, comes_back_to: str) -> None:
    answer = Client().post(path, headers={"Referer": referer} if referer else {})
    assert (answer.status_code, answer["Location"]) == (302, login_for(comes_back_to))


def test_a_page_that_was_asked_for_is_where_one_comes_back_to() -> None:
    answer = Client().get("/datasets/?page=2", headers={"Referer": f"{HOST}/jobs/"})
    assert answer["Location"] == login_for("/datasets/?page=2")


@pytest.mark.parametrize(("verb", "path"), [("get", "/jobs/"), ("post", "/jobs/estimate/")])
def test_a_fragment_leaves_the_page_alone_and_says_what_to_do(verb: str, path: str) -> None:
    headers = {"HX-Request": "true", "HX-Target": "job-list", "Referer": f"{HOST}/jobs/?mine=1"}
    answer = getattr(Client(), verb)(path, headers=headers)
    assert answer.status_code == 403
    assert (answer["HX-Retarget"], answer["HX-Reswap"]) == ("#messages", "innerMorph")
    assert "You were signed out." in answer.text
    assert f'href="{login_for("/jobs/?mine=1")}" target="_blank"' in answer.text
    assert "<html" not in answer.text


def test_a_fragment_with_an_old_token_leaves_the_page_alone(alice: User) -> None:
    client = Client(enforce_csrf_checks=True)
    client.force_login(alice)
    answer = client.post("/jobs/estimate/", headers={"HX-Request": "true"})
    assert (answer.status_code, answer["HX-Retarget"]) == (403, "#messages")
    assert "Reload the page." in answer.text
    assert "<html" not in answer.text


def test_the_cookies_own_token_is_as_good_as_a_pages(alice: User) -> None:
    # What shell.js puts into the forms of a page that was open during another sign-in.
    client = Client(enforce_csrf_checks=True)
    client.force_login(alice)
    client.get("/account/")
    token = client.cookies["csrftoken"].value
    assert client.post("/account/name/", {"csrfmiddlewaretoken": token, "name": "Alice"}).status_code != 403
    assert client.post("/account/name/", {"name": "Alice"}, headers={"X-CSRFToken": token}).status_code != 403


@pytest.fixture
def typed(alice: User, data_dir: object) -> dict[str, str]:
    base: BaseModel = make_base_model()
    version: DatasetVersion = make_dataset_version(alice.teams.get(), alice, num_rows=60)
    return {
        "base_model": str(base.pk), "dataset_version": str(version.pk), "method": "dora", "goal": "quick",
        "name": "typed by <hand>", "training.epochs": "7", "idempotency_key": "k",
    }  # fmt: skip


def test_a_new_job_that_was_filled_in_is_filled_in_after_signing_in(alice: User, typed: dict[str, str]) -> None:
    client = Client()
    sent = client.post(reverse("jobs:new"), typed)
    assert sent["Location"] == login_for("/jobs/new/")
    back = client.post("/login/", {"username": "alice", "password": PASSWORD, "next": "/jobs/new/"})
    assert client.get("/jobs/").status_code == 200
    shown = client.get(back["Location"]).text
    assert 'value="typed by &lt;hand&gt;"' in shown
    assert f'<option value="{typed["base_model"]}" selected>' in shown
    assert f'<option value="{typed["dataset_version"]}" selected>' in shown
    assert 'name="method" value="dora" checked' in shown
    assert "nothing was started" in shown
    assert not alice.teams.get().jobs.exists()  # type: ignore[attr-defined]
    assert "typed by" not in client.get("/jobs/new/").text


def test_a_form_larger_than_any_is_not_kept(typed: dict[str, str]) -> None:
    client = Client()
    client.post(reverse("jobs:new"), typed | {"name": "x" * signed_out.MAX_KEPT_CHARACTERS})
    assert signed_out.SESSION_KEY not in client.session


def test_an_address_without_a_page_says_so_in_words(alice_client: Client) -> None:
    answer = alice_client.get(POST_ONLY)
    assert (answer.status_code, answer["Allow"]) == (405, "POST")
    assert "shows no page of its own" in answer.text
    assert 'href="/"' in answer.text


def test_the_api_says_which_method_it_takes() -> None:
    answer = Client().delete("/api/v1/methods/")
    assert answer.status_code == 405
    assert answer.json()["error"]["code"] == "method_not_allowed"
    assert "GET" in answer.json()["error"]["help"]


@pytest.mark.django_db(transaction=True)
def test_it_says_so_over_asgi_as_well() -> None:
    async def ask() -> str:
        return (await AsyncClient().get("/logout/")).content.decode()

    assert "shows no page of its own" in asyncio.run(ask())

"""The card of a dataset: written by people, shown safely, put into every export."""

from __future__ import annotations

import io
import zipfile
from typing import Any

import yaml
from django.test import Client

from studio.accounts.models import AuditEvent, Membership, Role, Team, User
from studio.cards import MAX_CHARACTERS, card_version
from studio.datasets.models import Dataset, DatasetVersion
from studio.datasets.scanning import scan_next
from tests.studio.datasets.conftest import Upload, good_rows, jsonl
from tests.studio.datasets.test_scans import api
from tests.workers.scans.planting import clean_rows
from workers.scans import scans
from workers.scans.language import own_languages

TEXT = "# Animals\n\nWhat *animals* say.\n\n| who | what |\n| --- | --- |\n| cat | meow |"


def edit_page(version: DatasetVersion) -> str:
    return f"/datasets/{version.dataset_id}/card/"


def save(client: Client, version: DatasetVersion, text: str, *, seen: str = "", **more: str) -> Any:
    before = Dataset.objects.get(pk=version.dataset_id).description
    return client.post(edit_page(version), {"body": text, "seen": seen or card_version(before), **more})


def readme(client: Client, version: DatasetVersion) -> str:
    answer: Any = client.get(f"{version.get_absolute_url()}export/?kind=jsonl")
    with zipfile.ZipFile(io.BytesIO(b"".join(answer.streaming_content))) as archive:
        return archive.read("README.md").decode()


def test_what_is_written_is_shown_and_exported_behind_front_matter(
    upload: Upload, bob: User, bob_client: Client
) -> None:
    version = upload(jsonl(clean_rows(60)), name="Animals", licence="mit")
    for _ in range(len(scans()) + 1):
        scan_next(version.pk)
    assert "Nobody has written" in bob_client.get(f"{version.get_absolute_url()}card/").content.decode()
    answer = save(bob_client, version, f"---\nlicense: other\n---\n{TEXT}")
    assert (answer.status_code, answer["Location"]) == (302, f"{version.get_absolute_url()}card/")
    shown = bob_client.get(f"{version.get_absolute_url()}card/").content.decode()
    assert "<h1>Animals</h1>" in shown
    assert "<em>animals</em>" in shown
    assert "<td>meow</td>" in shown
    assert "pretty_name:" in shown
    exported = readme(bob_client, version)
    _, front, body = exported.split("---\n", 2)
    assert yaml.safe_load(front)["license"] == "mit", "front matter of somebody's own is dropped"
    assert yaml.safe_load(front)["language"] == ["en"]
    assert TEXT in body
    event = AuditEvent.objects.get(action="dataset.card_edited")
    assert (event.user, event.object_id, event.details["num_characters"]) == (bob, str(version.dataset_id), len(TEXT))
    assert "bob" in bob_client.get(edit_page(version)).content.decode()


def test_nothing_of_it_runs(upload: Upload, bob_client: Client) -> None:
    version = upload(jsonl(good_rows()))
    hostile = '<script>alert(1)</script> ![x](/track.png) [y](javascript:alert(2)) <div hx-get="/x">\u202e</div>'
    preview = save(bob_client, version, hostile, preview="1").content.decode()
    assert Dataset.objects.get().description == "", "a preview stores nothing"
    save(bob_client, version, hostile)
    for page in (preview, bob_client.get(f"{version.get_absolute_url()}card/").content.decode()):
        text = page.split('class="prose-card"')[1].split("</div>")[0]
        assert "<script" not in text
        assert "<img" not in text
        assert "javascript:alert" not in text.split("href=")[-1].split(">")[0]
        assert "<div hx-get" not in text
        assert "[U+202E RIGHT-TO-LEFT OVERRIDE]" in text


def test_two_editors_do_not_overwrite_each_other_silently(
    upload: Upload, alice_client: Client, bob_client: Client
) -> None:
    version = upload(jsonl(good_rows()))
    seen = card_version("")
    save(alice_client, version, "Alice's text")
    answer = save(bob_client, version, "Bob's text", seen=seen)
    assert answer.status_code == 409
    page = answer.content.decode()
    assert "changed by somebody else" in page
    assert "Bob&#x27;s text" in page
    assert "Alice&#x27;s text" in page
    assert Dataset.objects.get().description == "Alice's text"
    save(bob_client, version, "Bob's text", seen=card_version("Alice's text"))
    assert Dataset.objects.get().description == "Bob's text"


def test_a_card_that_is_too_long_is_kept_in_the_form(upload: Upload, bob_client: Client) -> None:
    version = upload(jsonl(good_rows()))
    answer = save(bob_client, version, "x" * (MAX_CHARACTERS + 1))
    assert answer.status_code == 422
    assert "x" * MAX_CHARACTERS in answer.content.decode()
    assert Dataset.objects.get().description == ""


def test_another_team_sees_nothing_and_a_viewer_only_reads(
    upload: Upload, team: Team, bob: User, other_team: Team, charlie: User, bob_client: Client, charlie_client: Client
) -> None:
    version = upload(jsonl(good_rows()))
    pages = (f"{version.get_absolute_url()}card/", edit_page(version))
    for page in pages:
        assert bob_client.get(page).status_code == 200
        assert charlie_client.get(page).status_code == 404
        assert Client().get(page).status_code == 302
    assert charlie_client.post(edit_page(version), {"body": "x"}).status_code == 404
    address = f"/api/v1/datasets/{version.dataset_id}/card/"
    assert api(other_team, charlie, "read").get(address).status_code == 404
    Membership.objects.filter(user=bob).update(role=Role.VIEWER)
    assert bob_client.get(pages[0]).status_code == 200
    assert bob_client.get(pages[1]).status_code == 403
    assert bob_client.post(pages[1], {"body": "x"}).status_code == 403
    assert Dataset.objects.get().description == ""


def test_the_api_reads_and_writes_it_with_the_same_care(upload: Upload, team: Team, bob: User) -> None:
    version = upload(jsonl(good_rows()))
    client = api(team, bob, "read", "write")
    address = f"/api/v1/datasets/{version.dataset_id}/card/"
    read = client.get(address).json()

    def put(body: str, seen: str) -> Any:
        return client.put(address, {"body": body, "seen": seen}, content_type="application/json")

    assert read["body"] == ""
    written = put(TEXT, read["version"])
    assert (written.status_code, written.json()["body"]) == (200, TEXT)
    assert client.get(f"/api/v1/datasets/{version.dataset_id}/").json()["description"] == TEXT
    stale = put("other", read["version"])
    assert (stale.status_code, stale.json()["error"]["code"]) == (409, "card_conflict")
    assert AuditEvent.objects.get(action="dataset.card_edited").token_id is not None
    assert api(team, bob, "read").put(address, {}, content_type="application/json").status_code == 403


def test_the_card_page_costs_at_most_eight_queries(
    upload: Upload, bob_client: Client, django_assert_max_num_queries: Any
) -> None:
    version = upload(jsonl(good_rows()))
    save(bob_client, version, TEXT)
    with django_assert_max_num_queries(8):
        bob_client.get(f"{version.get_absolute_url()}card/")
    with django_assert_max_num_queries(8):
        bob_client.get(edit_page(version))


def test_languages_are_those_of_a_tenth_of_the_rows_by_their_codes() -> None:
    assert own_languages({"English": 70, "German": 20, "Hebrew": 10, "French": 5}) == ["en", "de"]
    assert own_languages({"Hebrew": 10, "Nonsense": 10}) == ["he"]
    assert own_languages({}) == []


def test_the_statistics_draw_the_languages_that_the_scan_told(upload: Upload, bob_client: Client) -> None:
    german = {"prompt": "Was ist das für ein Tier, das dort am Ufer steht und trinkt?",
              "completion": "Das ist ein junges Reh, das am Abend aus dem Wald gekommen ist."}  # fmt: skip
    version = upload(jsonl([*clean_rows(20), *[{**german, "n": str(n)} for n in range(6)]]))
    assert "Languages</h2>" not in bob_client.get(f"{version.get_absolute_url()}statistics/").content.decode()
    for _ in range(len(scans()) + 1):
        scan_next(version.pk)
    shown = bob_client.get(f"{version.get_absolute_url()}statistics/").content.decode()
    assert "Languages</h2>" in shown
    assert '<td>English</td><td class="number">20</td>' in shown
    assert '<td>German</td><td class="number">6</td>' in shown
    assert version.scans.get(name="language").counts == {"English": 20, "German": 6}

"""Editing a model card: safe, without silent losses, and whole in the download."""

from __future__ import annotations

import hashlib
import io
import zipfile

import pytest
import yaml
from django.test import Client
from django.urls import reverse
from huggingface_hub import ModelCard

from studio.accounts.models import ApiToken, AuditEvent, Role, Team, User
from studio.cards import MAX_CHARACTERS, card_version
from studio.catalogue.bundles import entries, manifest_sha256, stream_zip, zip_size
from studio.catalogue.model_card import generated_body
from studio.catalogue.models import Adapter, EvaluationRun
from studio.storage import adapter_folder
from tests.conftest import make_member, signed_in
from tests.factories import make_adapter
from workers.errors import DamagedAdapterError

pytestmark = pytest.mark.usefixtures("data_dir")
HOSTILE = "<script>alert(1)</script>\n\n[x](javascript:alert(1)) ![y](https://evil.example/pixel.png)\n"


@pytest.fixture
def adapter(team: Team, alice: User) -> Adapter:
    return make_adapter(team, alice)


def url_of(adapter: Adapter) -> str:
    return reverse("catalogue:edit_card", args=[adapter.pk])


def save(client: Client, adapter: Adapter, body: str, *, seen: str | None = None, **more: str):
    seen = client.get(url_of(adapter)).context["seen"] if seen is None else seen
    return client.post(url_of(adapter), {"body": body, "seen": seen, **more})


def test_an_edited_card_is_shown_with_its_editors_name_in_the_history(
    adapter: Adapter, bob: User, bob_client: Client
) -> None:
    assert save(bob_client, adapter, "# Mine\n\nFor *tickets*.").status_code == 302
    page = bob_client.get(adapter.get_absolute_url()).content.decode()
    assert "<em>tickets</em>" in page
    assert "<em>animals</em>" not in page
    event = AuditEvent.objects.get(action="adapter.card_edited")
    assert (event.user, event.object_id) == (bob, str(adapter.pk))
    assert "tickets" not in str(event.details)
    assert f"<strong>{bob.display_name()}</strong>" in bob_client.get(url_of(adapter)).content.decode()


def test_what_people_write_is_never_run(adapter: Adapter, bob_client: Client) -> None:
    preview = save(bob_client, adapter, HOSTILE, preview="1")
    save(bob_client, adapter, HOSTILE)
    for page in (preview, bob_client.get(adapter.get_absolute_url()), bob_client.get(url_of(adapter))):
        text = page.content.decode()
        assert page.status_code == 200
        assert "<script>alert" not in text
        assert "<img" not in text
        assert 'href="javascript' not in text


def test_a_preview_is_of_the_text_as_it_would_be_stored(adapter: Adapter, bob_client: Client) -> None:
    preview = save(bob_client, adapter, "---\nlicense: mit\n---\n# Draft\0", preview="1").content.decode()
    shown = preview.split('id="card-preview"')[1].split("</section>")[0]
    assert "<h1>Draft</h1>" in shown
    assert "license" not in shown


def test_a_preview_saves_nothing(adapter: Adapter, bob_client: Client) -> None:
    answer = save(bob_client, adapter, "# *Draft*", preview="1")
    assert "<em>Draft</em>" in answer.content.decode()
    adapter.refresh_from_db()
    assert adapter.card == ""
    assert not AuditEvent.objects.filter(action="adapter.card_edited").exists()


def test_two_editors_do_not_overwrite_each_other_silently(
    adapter: Adapter, alice_client: Client, bob_client: Client
) -> None:
    seen = bob_client.get(url_of(adapter)).context["seen"]
    save(alice_client, adapter, "Alice was here.")
    answer = save(bob_client, adapter, "Bob was here.", seen=seen)
    assert answer.status_code == 409
    page = answer.content.decode()
    assert "changed by somebody else" in page
    assert "Alice was here." in page
    assert "Bob was here." in page
    adapter.refresh_from_db()
    assert adapter.card == "Alice was here.\n"
    # Having seen hers, he may.
    assert save(bob_client, adapter, "Bob was here.", seen=answer.context["seen"]).status_code == 302
    adapter.refresh_from_db()
    assert adapter.card == "Bob was here.\n"


def test_the_generated_text_comes_back(adapter: Adapter, bob_client: Client) -> None:
    save(bob_client, adapter, "Mine.")
    save(bob_client, adapter, "Mine.", generated="1")
    adapter.refresh_from_db()
    assert adapter.card == ""
    assert "<em>animals</em>" in bob_client.get(adapter.get_absolute_url()).content.decode()
    # The text that was generated is no edit, either.
    save(bob_client, adapter, generated_body(adapter) or "")
    adapter.refresh_from_db()
    assert adapter.card == ""
    assert AuditEvent.objects.filter(action="adapter.card_edited").count() == 2


def test_a_card_that_is_too_long_is_kept_in_the_form(adapter: Adapter, bob_client: Client) -> None:
    answer = save(bob_client, adapter, "x" * (MAX_CHARACTERS + 1))
    assert answer.status_code == 422
    assert "100,000 can be stored" in answer.content.decode()
    assert "x" * (MAX_CHARACTERS + 1) in answer.content.decode()


def test_viewers_do_not_edit_and_other_teams_see_nothing(adapter: Adapter, team: Team, charlie_client: Client) -> None:
    viewer = signed_in(make_member("vera", team, Role.VIEWER))
    assert viewer.get(url_of(adapter)).status_code == 403
    assert url_of(adapter) not in viewer.get(adapter.get_absolute_url()).content.decode()
    for client, expected in ((viewer, 403), (charlie_client, 404)):
        assert client.post(url_of(adapter), {"body": "x", "seen": ""}).status_code == expected
    assert charlie_client.get(url_of(adapter)).status_code == 404
    adapter.refresh_from_db()
    assert adapter.card == ""


def unzipped(client: Client, adapter: Adapter) -> dict[str, bytes]:
    answer = client.get(reverse("catalogue:download", args=[adapter.pk]))
    body = b"".join(answer)
    assert int(answer["Content-Length"]) == len(body)
    with zipfile.ZipFile(io.BytesIO(body)) as archive:
        assert archive.testzip() is None
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def test_the_download_has_the_edited_card_and_its_checksums_verify(adapter: Adapter, bob_client: Client) -> None:
    save(bob_client, adapter, "---\nlicense: stolen\n---\n# Mine\n")
    files = unzipped(bob_client, adapter)
    sums = dict(reversed(line.split("  ", 1)) for line in files["SHA256SUMS"].decode().splitlines())
    assert sums == {name: hashlib.sha256(data).hexdigest() for name, data in files.items() if name != "SHA256SUMS"}
    card = ModelCard(files["README.md"].decode())
    assert card.text.strip() == "# Mine"
    assert (card.data.license, card.data.library_name) == ("mit", "peft")
    assert card.data.eval_results[0].metric_value == 1.32
    shown = bob_client.get(adapter.get_absolute_url()).content.decode()
    assert all(hashlib.sha256(data).hexdigest() in shown for data in files.values())


def test_the_zip_of_an_edited_card_is_the_same_every_time_and_another_than_before(adapter: Adapter) -> None:
    before = manifest_sha256(adapter)
    Adapter.objects.filter(pk=adapter.pk).update(card="# Mine\n")
    adapter.refresh_from_db()
    first, second = b"".join(stream_zip(adapter)), b"".join(stream_zip(adapter))
    assert first == second
    assert zip_size(adapter) == len(first)
    assert manifest_sha256(adapter) == manifest_sha256(adapter, entries(adapter)) != before


def test_an_edited_card_hides_no_damage(adapter: Adapter, bob_client: Client) -> None:
    save(bob_client, adapter, "# Mine\n")
    (adapter_folder(adapter.folder) / "adapter_model.safetensors").write_bytes(b"not the weights")
    assert bob_client.get(reverse("catalogue:download", args=[adapter.pk])).status_code == 500
    adapter.refresh_from_db()
    with pytest.raises(DamagedAdapterError, match="adapter_model"):
        list(stream_zip(adapter))


def test_an_incomplete_run_is_not_in_the_front_matter(adapter: Adapter, bob_client: Client) -> None:
    EvaluationRun.objects.filter(adapter=adapter).update(num_rows=101)
    save(bob_client, adapter, "# Mine\n")
    front = unzipped(bob_client, adapter)["README.md"].decode().split("---\n")[1]
    assert not {"model-index", "metrics"} & yaml.safe_load(front).keys()


def test_the_api_reads_and_writes_the_card_with_the_same_care(adapter: Adapter, team: Team, bob: User) -> None:
    _, secret = ApiToken.issue(team=team, user=bob, name="x", scopes=["read", "write"])
    client = Client(headers={"Authorization": f"Bearer {secret}"})
    url = f"/api/v1/adapters/{adapter.pk}/card/"
    first = client.get(url).json()
    assert (first["is_edited"], "animals" in first["body"]) == (False, True)
    put = client.put(url, {"body": "Mine", "seen": first["version"]}, content_type="application/json")
    assert put.status_code == 200, put.content
    assert put.json()["version"] == card_version("Mine\n")
    late = client.put(url, {"body": "Late", "seen": first["version"]}, content_type="application/json")
    assert (late.status_code, late.json()["error"]["code"]) == (409, "card_conflict")
    assert client.get(url).json()["body"] == "Mine\n"

"""The tus protocol, asked without a server: statuses, headers, and who may do what."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from django.test import Client
from django.utils import timezone

from studio.accounts.models import ApiToken, Role, Team, User
from studio.datasets import resumable
from studio.datasets.models import DatasetVersion, Upload
from studio.datasets.tus import read_metadata
from studio.storage.parts import part_path
from tests.conftest import make_member, signed_in
from tests.studio.datasets.conftest import good_rows, jsonl

CONTENT = jsonl(good_rows())
TUS = {"Tus-Resumable": "1.0.0"}
Answer = Any


class Sender:
    """A tus client without a network, at the pages' address or the API's."""

    def __init__(self, client: Client, root: str = "/datasets/uploads/") -> None:
        self.client, self.root = client, root

    def begin(self, num_bytes: int | str = len(CONTENT), *, headers: Any = None, **metadata: str) -> Answer:
        pairs = [
            f"{key} {base64.b64encode(value.encode()).decode()}"
            for key, value in {"filename": "faq.jsonl", **metadata}.items()
        ]
        return self.client.post(
            self.root, content_type="application/json",
            headers={**TUS, "Upload-Length": str(num_bytes), "Upload-Metadata": ",".join(pairs), **(headers or {})},
        )  # fmt: skip

    def head(self, url: str, **headers: str) -> Answer:
        return self.client.head(url, headers={**TUS, **headers})

    def offset(self, url: str) -> int:
        return int(self.head(url)["Upload-Offset"])

    def send(self, url: str, content: bytes, offset: int | str, headers: Any = None, content_type: str = "") -> Answer:
        return self.client.patch(
            url, content, content_type=content_type or "application/offset+octet-stream",
            headers={**TUS, "Upload-Offset": str(offset), **(headers or {})},
        )  # fmt: skip

    def cancel(self, url: str) -> Answer:
        return self.client.delete(url, headers=TUS)


def api_client(team: Team, user: User, *scopes: str) -> Client:
    secret = ApiToken.issue(team=team, user=user, name="t", scopes=list(scopes))[1]
    return Client(headers={"authorization": f"Bearer {secret}"})


@pytest.fixture
def alices(alice_client: Client, data_dir: Path) -> Sender:
    return Sender(alice_client)


@pytest.fixture(params=["page", "api"])
def sender(request: pytest.FixtureRequest, team: Team, bob: User, data_dir: Path) -> Sender:
    """Bob's, at each of the two addresses."""
    if request.param == "page":
        return Sender(signed_in(bob))
    return Sender(api_client(team, bob, "read", "write"), "/api/v1/uploads/")


def test_a_file_in_pieces_becomes_a_version_like_one_that_is_posted(sender: Sender, data_dir: Path, bob: User) -> None:
    begun = sender.begin(name="FAQ", licence="mit")
    url = begun["Location"]
    assert (begun.status_code, begun["Upload-Offset"], begun["Tus-Resumable"]) == (201, "0", "1.0.0")
    assert url.startswith(sender.root)
    first = sender.send(url, CONTENT[:100], 0)
    assert (first.status_code, first["Upload-Offset"]) == (204, "100")
    assert first["Upload-Expires"].endswith("GMT")
    looked = sender.head(url)
    assert (looked.status_code, looked["Upload-Offset"], looked["Upload-Length"]) == (200, "100", str(len(CONTENT)))
    assert looked["Cache-Control"] == "no-store"
    last = sender.send(url, CONTENT[100:], 100)
    assert (last.status_code, last["Upload-Offset"]) == (204, str(len(CONTENT)))
    version = DatasetVersion.objects.get()
    assert version.path().read_bytes() == CONTENT
    assert (version.dataset.name, version.dataset.licence, version.created_by) == ("FAQ", "mit", bob)
    assert list((data_dir / "uploads").iterdir()) == []
    assert sender.offset(url) == len(CONTENT)


def test_the_page_of_an_upload_leads_to_its_version(alices: Sender) -> None:
    url = alices.begin()["Location"]
    page = alices.client.get(url)
    assert "0 % of" in page.content.decode()
    alices.send(url, CONTENT, 0)
    version = DatasetVersion.objects.get()
    assert alices.client.get(url)["Location"] == version.get_absolute_url()
    again = alices.begin()["Location"]
    alices.send(again, CONTENT, 0)
    answer = alices.client.get(again, follow=True)
    assert "stored already" in answer.content.decode()
    assert DatasetVersion.objects.count() == 1


def test_the_api_tells_what_became_of_an_upload(team: Team, bob: User, data_dir: Path) -> None:
    sender = Sender(api_client(team, bob, "read", "write"), "/api/v1/uploads/")
    url = sender.begin(name="FAQ")["Location"]
    assert sender.client.get(url).json()["state"] == "receiving"
    sender.send(url, CONTENT, 0)
    found = sender.client.get(url).json()
    assert (found["state"], found["num_received"], found["version"]["number"]) == ("finished", len(CONTENT), 1)
    assert [one["id"] for one in sender.client.get(sender.root).json()["items"]] == [found["id"]]


def test_options_say_what_there_is(sender: Sender, settings: Any) -> None:
    answer = sender.client.options(sender.root)
    assert answer.status_code == 204
    assert answer["Tus-Version"] == "1.0.0"
    assert set(answer["Tus-Extension"].split(",")) == {"creation", "checksum", "expiration", "termination"}
    assert answer["Tus-Checksum-Algorithm"] == "sha1,sha256"
    assert answer["Tus-Max-Size"] == str(settings.MAX_UPLOAD_BYTES)


def test_another_version_of_the_protocol_is_412(sender: Sender) -> None:
    url = sender.begin()["Location"]
    old = {"Tus-Resumable": "0.2.2"}
    for answer in (
        sender.begin(headers=old), sender.head(url, **old), sender.send(url, b"x", 0, old),
        sender.client.delete(url, headers=old),
    ):  # fmt: skip
        assert (answer.status_code, answer["Tus-Version"]) == (412, "1.0.0")
    assert sender.offset(url) == 0


@pytest.mark.parametrize("offset", [1, 99, 101, 10**17, "-1", "x", "", "1e2", "²", "9" * 4000])
def test_another_offset_writes_nothing(sender: Sender, offset: int | str) -> None:
    url = sender.begin()["Location"]
    sender.send(url, CONTENT[:100], 0)
    answer = sender.send(url, CONTENT[100:], offset)
    assert answer.status_code == (409 if isinstance(offset, int) else 400)
    assert sender.offset(url) == 100
    assert not DatasetVersion.objects.exists()


def test_another_content_type_is_415(sender: Sender) -> None:
    url = sender.begin()["Location"]
    assert sender.send(url, CONTENT, 0, content_type="application/octet-stream").status_code == 415
    assert sender.offset(url) == 0


def test_more_bytes_than_announced_are_413_and_none_of_them_is_kept(sender: Sender) -> None:
    url = sender.begin(50)["Location"]
    sender.send(url, CONTENT[:20], 0)
    assert sender.send(url, CONTENT[20:51], 20).status_code == 413
    assert sender.offset(url) == 20


def test_a_length_that_cannot_be_is_refused_before_a_byte_is_sent(
    sender: Sender, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.MAX_UPLOAD_BYTES = 1000
    assert sender.begin(1001).status_code == 413
    assert sender.begin("").status_code == 400
    assert sender.begin("x").status_code == 400
    settings.MAX_UPLOAD_BYTES = 10**17
    answer = sender.begin(10**16)
    assert answer.status_code == 507
    assert "disk is full" in answer.json()["error"]["message"]
    monkeypatch.setattr(resumable, "MAX_UNFINISHED", 1)
    assert sender.begin().status_code == 201
    assert sender.begin().status_code == 429
    assert Upload.objects.count() == 1


def test_a_wrong_checksum_is_460_and_its_bytes_are_thrown_away(sender: Sender) -> None:
    url = sender.begin()["Location"]

    def checksum(content: bytes, algorithm: str) -> dict[str, str]:
        digest = base64.b64encode(hashlib.new(algorithm, content).digest()).decode()
        return {"Upload-Checksum": f"{algorithm} {digest}"}

    assert sender.send(url, CONTENT[:100], 0, checksum(CONTENT[:100], "sha1")).status_code == 204
    answer = sender.send(url, CONTENT[100:200], 100, checksum(CONTENT[100:201], "sha256"))
    assert answer.status_code == 460
    assert sender.offset(url) == 100
    assert sender.send(url, CONTENT[100:], 100, {"Upload-Checksum": "md5 aaaa"}).status_code == 400
    assert sender.send(url, CONTENT[100:], 100, {"Upload-Checksum": "sha1 !"}).status_code == 400
    assert sender.send(url, CONTENT[100:], 100, checksum(CONTENT[100:], "sha256")).status_code == 204
    assert DatasetVersion.objects.get().path().read_bytes() == CONTENT


def test_a_file_that_is_not_the_one_announced_is_refused(sender: Sender, data_dir: Path) -> None:
    url = sender.begin(sha256=hashlib.sha256(CONTENT + b"\n").hexdigest())["Location"]
    answer = sender.send(url, CONTENT, 0)
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "checksum_mismatch")
    assert not DatasetVersion.objects.exists()
    assert [path for path in data_dir.rglob("*") if path.is_file()] == []
    assert sender.head(url).status_code == 410
    right = sender.begin(sha256=hashlib.sha256(CONTENT).hexdigest().upper())["Location"]
    assert sender.send(right, CONTENT, 0).status_code == 204
    assert sender.begin(sha256="zz").status_code == 400


def test_a_file_that_cannot_be_read_is_refused_as_in_the_form(alices: Sender, data_dir: Path) -> None:
    picture = b"\x89PNG\r\n\x1a\n" + b"x" * 50
    url = alices.begin(len(picture))["Location"]
    answer = alices.send(url, picture, 0)
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "wrong_type")
    assert "is a PNG image" in alices.client.get(url).content.decode()
    assert [path for path in data_dir.rglob("*") if path.is_file()] == []
    empty = alices.begin(0)["Location"]
    assert "The file has 0 bytes." in alices.client.get(empty).content.decode()
    assert not DatasetVersion.objects.exists()


def test_a_taken_name_is_refused_at_the_beginning(sender: Sender) -> None:
    url = sender.begin(name="FAQ")["Location"]
    sender.send(url, CONTENT, 0)
    answer = sender.begin(name="FAQ")
    assert (answer.status_code, answer.json()["error"]["field"]) == (422, "name")
    answer = sender.begin(licence="no such")
    assert (answer.status_code, answer.json()["error"]["field"]) == (422, "licence")


def test_a_name_that_was_taken_meanwhile_costs_no_byte(alices: Sender, team: Team, alice: User) -> None:
    url = alices.begin(name="FAQ")["Location"]
    alices.send(url, CONTENT[:100], 0)
    team.datasets.create(name="FAQ", created_by=alice)
    answer = alices.send(url, CONTENT[100:], 100)
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "name_taken")
    assert "The whole file is here" in alices.client.get(url).content.decode()
    again = alices.client.post(url + "target/", {"name": "FAQ"})
    assert again.status_code == 422
    assert "called &quot;FAQ&quot; already" in again.content.decode()
    stored = alices.client.post(url + "target/", {"name": "FAQ 2", "licence": "mit"}, follow=True)
    assert stored.status_code == 200
    version = DatasetVersion.objects.get()
    assert (version.dataset.name, version.dataset.licence) == ("FAQ 2", "mit")
    assert version.path().read_bytes() == CONTENT


def test_the_name_can_be_changed_while_the_bytes_arrive(team: Team, bob: User, data_dir: Path) -> None:
    sender = Sender(api_client(team, bob, "read", "write"), "/api/v1/uploads/")
    url = sender.begin(name="old")["Location"]
    sender.send(url, CONTENT[:100], 0)
    put: Any = {"content_type": "application/json"}
    assert sender.client.put(url + "target/", {"name": "new"}, **put).status_code == 200
    sender.send(url, CONTENT[100:], 100)
    assert DatasetVersion.objects.get().dataset.name == "new"
    assert sender.client.put(url + "target/", {"name": "newer"}, **put).status_code == 409


def test_it_can_become_the_next_version_of_a_dataset(
    alices: Sender, other_team: Team, charlie: User, team: Team
) -> None:
    alices.send(alices.begin()["Location"], CONTENT, 0)
    first = DatasetVersion.objects.get()
    more = jsonl(good_rows(20))
    url = alices.begin(len(more), dataset=str(first.dataset_id))["Location"]
    alices.send(url, more, 0)
    assert first.dataset.versions.count() == 2
    theirs = other_team.datasets.create(name="theirs", created_by=charlie)
    assert alices.begin(dataset=str(theirs.pk)).status_code == 404
    assert alices.begin(dataset="x").status_code == 404


def test_a_cancelled_upload_is_gone(sender: Sender, data_dir: Path) -> None:
    url = sender.begin()["Location"]
    sender.send(url, CONTENT[:100], 0)
    assert sender.cancel(url).status_code == 204
    assert sender.head(url).status_code == 404
    assert sender.send(url, CONTENT[100:], 100).status_code == 404
    assert sender.cancel(url).status_code == 404
    assert list((data_dir / "uploads").iterdir()) == []


def test_an_upload_cancelled_while_its_bytes_arrive_registers_nothing(alices: Sender, data_dir: Path) -> None:
    upload = Upload.objects.get(pk=alices.begin()["Location"].split("/")[-2])
    with resumable.Receiver(upload, 0) as receiver:
        receiver.write(CONTENT)
        resumable.cancel_upload(upload)
        upload.pk = receiver.upload.pk = receiver._part.id
        with pytest.raises(resumable.UploadGoneError):
            receiver.save()
    assert list((data_dir / "uploads").iterdir()) == []


def test_what_nobody_went_on_with_is_thrown_away_after_a_day(sender: Sender, data_dir: Path) -> None:
    old, young = sender.begin()["Location"], sender.begin()["Location"]
    for url in (old, young):
        sender.send(url, CONTENT[:100], 0)
    Upload.objects.filter(pk=old.split("/")[-2]).update(touched_at=timezone.now() - timedelta(hours=25))
    assert sender.head(old).status_code == 410
    assert sender.send(old, CONTENT[100:], 100).status_code == 410
    assert resumable.throw_away_old() == 1
    assert sender.head(old).status_code == 404
    assert [path.stem for path in (data_dir / "uploads").iterdir()] == [young.split("/")[-2]]


def test_bytes_that_another_machine_threw_away_are_removed_here(
    alices: Sender, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = alices.begin()["Location"]
    alices.send(url, CONTENT[:100], 0)
    upload = Upload.objects.get()
    Upload.objects.all().delete()
    alices.begin()
    assert part_path(upload.pk).exists()
    monkeypatch.setattr(resumable, "KEPT_FOR", timedelta(seconds=-1))
    alices.begin()
    assert not part_path(upload.pk).exists()


def test_a_second_writer_is_told_to_wait(alices: Sender) -> None:
    url = alices.begin()["Location"]
    upload = Upload.objects.get()
    with resumable.Receiver(upload, 0):
        answer = alices.send(url, CONTENT, 0)
        assert (answer.status_code, answer["Retry-After"]) == (423, "2")
    assert alices.send(url, CONTENT, 0).status_code == 204


def test_the_disk_is_believed_when_it_has_less_than_the_row_says(alices: Sender) -> None:
    url = alices.begin()["Location"]
    alices.send(url, CONTENT[:100], 0)
    with part_path(Upload.objects.get().pk).open("r+b") as file:
        file.truncate(40)
    assert alices.send(url, CONTENT[100:], 100).status_code == 409
    assert alices.offset(url) == 40
    assert alices.send(url, CONTENT[40:], 40).status_code == 204
    assert DatasetVersion.objects.get().path().read_bytes() == CONTENT


@pytest.mark.parametrize("text", ["filename !!", "a //8=", "filename YQ==,filename YQ==", "name AA=="])
def test_metadata_that_cannot_be_read_is_400(sender: Sender, text: str) -> None:
    answer = sender.begin(headers={"Upload-Metadata": text})
    assert answer.status_code == 400
    assert not Upload.objects.exists()


def test_metadata_may_be_without_values() -> None:
    assert read_metadata("a , b YQ==,") == {"a": "", "b": "a"}
    assert read_metadata("") == {}


def test_only_the_team_sees_an_upload_and_a_viewer_sends_nothing(
    sender: Sender, team: Team, other_team: Team, charlie: User
) -> None:
    url = sender.begin()["Location"]
    sender.send(url, CONTENT[:100], 0)
    viewer = make_member("victor", team, Role.VIEWER)
    is_page = sender.root.startswith("/datasets/")
    charlies = Sender(
        signed_in(charlie) if is_page else api_client(other_team, charlie, "read", "write"), sender.root
    )  # fmt: skip
    for answer in (charlies.head(url), charlies.send(url, CONTENT[100:], 100), charlies.cancel(url),
                   charlies.client.get(url)):  # fmt: skip
        assert answer.status_code == 404
    victors = Sender(signed_in(viewer) if is_page else api_client(team, viewer, "read", "write"), sender.root)
    for answer in (victors.begin(), victors.head(url), victors.send(url, CONTENT[100:], 100), victors.cancel(url)):
        assert answer.status_code == 403
    assert sender.offset(url) == 100
    assert Upload.objects.count() == 1


def test_the_forms_of_an_upload_are_the_teams_alone(alices: Sender, charlie_client: Client, team: Team) -> None:
    url = alices.begin()["Location"]
    viewer = signed_in(make_member("victor", team, Role.VIEWER))
    for name in ("target/", "cancel/"):
        assert charlie_client.post(url + name, {"name": "x"}).status_code == 404
        assert viewer.post(url + name, {"name": "x"}).status_code == 403
    assert alices.client.post(url + "cancel/")["Location"] == "/datasets/upload/"
    assert not Upload.objects.exists()


def test_a_session_that_ended_is_said_so(alices: Sender) -> None:
    url = alices.begin()["Location"]
    alices.client.logout()
    for answer in (alices.begin(), alices.head(url), alices.send(url, CONTENT, 0), alices.cancel(url)):
        assert answer.status_code == 401
    assert "Sign in again" in alices.begin().json()["error"]["help"]


def test_scripts_of_other_sites_send_nothing(alice: User, data_dir: Path) -> None:
    client = Client(enforce_csrf_checks=True)
    client.force_login(alice)
    assert Sender(client).begin().status_code == 403
    url = Sender(signed_in(alice)).begin()["Location"]
    assert Sender(client).send(url, CONTENT, 0).status_code == 403
    assert Sender(client).cancel(url).status_code == 403


def test_the_upload_page_lists_what_is_not_finished(
    alices: Sender, charlie_client: Client, django_assert_max_num_queries: Callable[..., Any]
) -> None:
    for number in range(3):
        url = alices.begin(filename=f"part {number}.jsonl")["Location"]
        alices.send(url, CONTENT[:100], 0)
    with django_assert_max_num_queries(8):
        page = alices.client.get("/datasets/upload/").content.decode()
    assert "part 2.jsonl" in page
    assert f"{100 * 100 // len(CONTENT)} % of" in page
    assert "part 2.jsonl" not in charlie_client.get("/datasets/upload/").content.decode()

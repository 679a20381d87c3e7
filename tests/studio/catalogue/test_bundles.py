"""The download: one folder, whole or not at all, and the same bytes every time."""

from __future__ import annotations

import asyncio
import hashlib
import io
import zipfile

import pytest
from django.test import AsyncClient, Client
from django.urls import reverse

from studio.accounts.models import AuditEvent, Team, User
from studio.catalogue.bundles import CHUNK_BYTES, folder_name, stream_zip, zip_size
from studio.catalogue.models import Adapter
from studio.storage import adapter_folder
from tests.factories import make_adapter
from workers.errors import DamagedAdapterError

pytestmark = pytest.mark.usefixtures("data_dir")


@pytest.fixture
def adapter(team: Team, alice: User) -> Adapter:
    return make_adapter(
        team, alice, name="Support, rank 16", files={"eval/scores.json": b"{}", "big.bin": b"x" * 3_000_000}
    )


def test_the_zip_holds_one_folder_with_every_file_as_recorded(adapter: Adapter, alice_client: Client) -> None:
    response = alice_client.get(reverse("catalogue:download", args=[adapter.pk]))
    body = b"".join(response)
    assert response["Content-Disposition"] == 'attachment; filename="support-rank-16.zip"'
    assert response["X-Content-Type-Options"] == "nosniff"
    assert int(response["Content-Length"]) == len(body)
    with zipfile.ZipFile(io.BytesIO(body)) as archive:
        assert archive.testzip() is None
        found = {name: hashlib.sha256(archive.read(name)).hexdigest() for name in archive.namelist()}
    assert found == {f"support-rank-16/{file['name']}": file["sha256"] for file in adapter.files}
    assert list(found) == sorted(found)


def test_the_zip_is_the_same_every_time_and_its_size_is_known_before(adapter: Adapter) -> None:
    first, second = b"".join(stream_zip(adapter)), b"".join(stream_zip(adapter))
    assert first == second
    assert zip_size(adapter) == len(first)


def test_the_zip_leaves_in_chunks(adapter: Adapter) -> None:
    assert max(len(chunk) for chunk in stream_zip(adapter)) < 2 * CHUNK_BYTES


def test_a_download_is_recorded_with_who_and_what(adapter: Adapter, bob: User, bob_client: Client) -> None:
    b"".join(bob_client.get(reverse("catalogue:download", args=[adapter.pk])))
    event = AuditEvent.objects.get(action="adapter.downloaded")
    assert (event.user, event.object_id, event.team) == (bob, str(adapter.pk), adapter.team)


def test_an_unchanged_adapter_is_not_sent_again(adapter: Adapter, alice_client: Client) -> None:
    url = reverse("catalogue:download", args=[adapter.pk])
    etag = alice_client.get(url)["ETag"]
    again = alice_client.get(url, headers={"if-none-match": etag})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize("damage", ["changed", "shorter", "missing"])
def test_a_damaged_file_is_named_and_nothing_is_sent(damage: str, adapter: Adapter, alice_client: Client) -> None:
    path = adapter_folder(adapter.folder) / "adapter_model.safetensors"
    if damage == "missing":
        path.unlink()
    else:
        content = path.read_bytes()
        path.write_bytes(content[:-1] if damage == "shorter" else content[:-1] + b"!")
    response = alice_client.get(reverse("catalogue:download", args=[adapter.pk]))
    assert response.status_code == 500
    assert "adapter_model.safetensors" in response.content.decode()
    assert not AuditEvent.objects.filter(action="adapter.downloaded").exists()


def test_a_file_that_changes_while_it_is_sent_leaves_no_whole_archive(adapter: Adapter) -> None:
    sent: list[bytes] = []
    (adapter_folder(adapter.folder) / "big.bin").write_bytes(b"y" * 3_000_000)
    with pytest.raises(DamagedAdapterError, match=r"big\.bin"):
        sent.extend(stream_zip(adapter))
    assert not zipfile.is_zipfile(io.BytesIO(b"".join(sent)))


@pytest.mark.parametrize(("name", "folder"), [("../../etc/passwd", "etcpasswd"), ("模型", None), ("A b", "a-b")])
def test_the_folder_name_is_safe_on_every_system(name: str, folder: str | None, team: Team, alice: User) -> None:
    adapter = make_adapter(team, alice, name=name)
    assert folder_name(adapter) == (folder or f"adapter-{adapter.pk}")


@pytest.mark.django_db(transaction=True)
def test_it_streams_without_gathering_the_file_when_served_by_asgi(adapter: Adapter, alice: User) -> None:
    async def chunks() -> list[bytes]:
        client = AsyncClient()
        await client.aforce_login(alice)
        response = await client.get(reverse("catalogue:download", args=[adapter.pk]))
        assert response.is_async
        return [chunk async for chunk in response]

    received = asyncio.run(chunks())
    assert len(received) > 3
    assert b"".join(received) == b"".join(stream_zip(adapter))

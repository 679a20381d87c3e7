"""Files that machines share, against a real S3-compatible server; and the same promises of the local folder."""

from __future__ import annotations

import hashlib
import os
import threading
import tracemalloc
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from studio import storage
from studio.accounts.models import Team, User
from studio.datasets.splitting import ask_split, freeze
from studio.storage import DamagedObjectError, NotStoredError, StorageError, fetching, s3
from studio.storage.backends import Backend, LocalFolder, backend
from studio.storage.s3 import S3Storage
from tests.factories import make_dataset_version
from tests.s3_server import S3Server, s3_server
from tests.workers.scans.planting import clean_rows
from workers.splits.asked import SplitRequest
from workers.splits.frozen import FrozenSplit


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as found:
        yield found


@pytest.fixture
def shared(server: S3Server, settings: Any, data_dir: Path) -> S3Server:
    """A studio whose files are in the server, below a prefix of the test's own."""
    for name, value in server.settings(f"tests/{uuid.uuid4()}").items():
        setattr(settings, name, value)
    return server


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Backend:
    if request.param == "local":
        return LocalFolder(tmp_path / "storage")
    request.getfixturevalue("shared")
    return backend()


def another_machine(settings: Any, tmp_path: Path) -> Path:
    """From here on the studio is that of another machine, with a data folder that is empty."""
    settings.DATA_DIR = tmp_path / f"machine-{uuid.uuid4().hex[:6]}"
    settings.DATA_DIR.mkdir()
    return Path(settings.DATA_DIR)


def test_an_object_is_put_read_listed_replaced_and_deleted(store: Backend, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"first")
    for key in ("a/one", "a/two", "b/three"):
        store.put(key, source)
    source.write_bytes(b"the second")
    store.put("a/one", source)
    with store.open("a/one") as file:
        assert file.read() == b"the second"
    with store.open("a/one", 4) as file:
        assert (file.read(3), file.read()) == (b"sec", b"ond")
    assert (store.size("a/one"), store.size("a/none")) == (10, None)
    assert list(store.keys("a/")) == ["a/one", "a/two"]
    store.delete(["a/one", "a/none"])
    assert list(store.keys("a/")) == ["a/two"]
    with pytest.raises(NotStoredError):
        store.open("a/one")


def test_a_key_never_leaves_the_local_folder(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        LocalFolder(tmp_path / "storage").open("../secret")


def test_a_large_file_goes_up_in_parts_and_comes_back_the_same(
    shared: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "PART_BYTES", 5 * 1024**2)
    store = S3Storage(**{name.removeprefix("S3_").lower(): one for name, one in shared.settings("parts").items()})
    content = os.urandom(12 * 1024**2 + 17)
    source = tmp_path / "large"
    source.write_bytes(content)
    store.put("large", source)
    with store.open("large") as file:
        assert file.read() == content


def test_an_upload_on_one_machine_is_a_file_of_another(shared: S3Server, settings: Any, tmp_path: Path) -> None:
    stored = storage.store_blob([b"some ", b"rows"], max_bytes=100)
    folder = another_machine(settings, tmp_path)
    assert not storage.blob_path(stored.sha256).exists()
    assert storage.fetch_blob(stored.sha256).read_bytes() == b"some rows"
    assert [path.name for path in folder.rglob("*") if path.is_file()] == [stored.sha256]
    storage.remove_blob(stored.sha256)
    with pytest.raises(NotStoredError):
        storage.fetch_blob(stored.sha256)


def test_a_split_made_on_one_machine_is_read_on_another(
    shared: S3Server, settings: Any, tmp_path: Path, team: Team, bob: User
) -> None:
    version = make_dataset_version(team, bob, rows=clean_rows(40), name="Scenes")
    version.format = "prompt_completion"
    version.save()
    another_machine(settings, tmp_path)
    split = ask_split(version, SplitRequest.from_dict({"test": 0.2}), name="", user=bob)
    freeze(split.pk)
    split.refresh_from_db()
    another_machine(settings, tmp_path)
    found = FrozenSplit.read(split.path(), sha256=split.sha256, dataset_sha256=version.sha256)
    assert (len(found.train), len(found.validation), len(found.test)) == (28, 4, 8)


def test_bytes_that_were_changed_in_the_storage_are_refused_and_not_kept(
    shared: S3Server, settings: Any, tmp_path: Path
) -> None:
    stored = storage.store_blob([b"some rows"], max_bytes=100)
    other = tmp_path / "other"
    other.write_bytes(b"SOME rows")
    backend().put(f"blobs/{stored.sha256[:2]}/{stored.sha256}", other)
    folder = another_machine(settings, tmp_path)
    with pytest.raises(DamagedObjectError, match="checksum differs"):
        storage.fetch_blob(stored.sha256)
    assert [path for path in folder.rglob("*") if path.is_file()] == []


def make_folder(root: Path) -> Path:
    folder = root / "product"
    (folder / "sub").mkdir(parents=True)
    (folder / "weights").write_bytes(b"w" * 1000)
    (folder / "sub" / "config.json").write_text("{}")
    return folder


def test_a_folder_is_there_whole_or_not_at_all(
    shared: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_folder(tmp_path)
    store = backend()
    put = store.put

    def broken(key: str, path: Path) -> None:
        if key.endswith("weights"):
            raise StorageError("the network is gone")
        put(key, path)

    monkeypatch.setattr(type(store), "put", lambda _self, key, path: broken(key, path))
    with pytest.raises(StorageError):
        fetching.store_folder(source, "products/1")
    assert list(store.keys("products/")) == ["products/1/sub/config.json"]
    with pytest.raises(NotStoredError):
        fetching.fetch_folder("products/1", tmp_path / "fetched")
    assert fetching.stored_folders("products/") == []
    monkeypatch.undo()
    fetching.store_folder(source, "products/1")
    assert fetching.stored_folders("products/") == ["products/1"]
    found = fetching.fetch_folder("products/1", tmp_path / "fetched")
    assert fetching.describe_folder(found) == fetching.describe_folder(source)
    fetching.remove_folders(["products/1"])
    assert list(store.keys("products/")) == []


def test_a_folder_with_one_damaged_file_is_not_kept(shared: S3Server, tmp_path: Path) -> None:
    source = make_folder(tmp_path)
    fetching.store_folder(source, "products/1")
    (source / "weights").write_bytes(b"W" * 1000)
    backend().put("products/1/weights", source / "weights")
    with pytest.raises(DamagedObjectError):
        fetching.fetch_folder("products/1", tmp_path / "fetched")
    assert not (tmp_path / "fetched").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".part")]


def test_two_workers_of_a_machine_fetch_a_folder_once(
    shared: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetching.store_folder(make_folder(tmp_path), "products/1")
    fetched: list[str] = []
    fetch_file = fetching.fetch_file

    def counted(key: str, target: Path, sha256: str) -> None:
        fetched.append(key)
        fetch_file(key, target, sha256)

    monkeypatch.setattr(fetching, "fetch_file", counted)
    both = [threading.Thread(target=fetching.fetch_folder, args=("products/1", tmp_path / "f")) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join(60)
    assert sorted(fetched) == ["products/1/sub/config.json", "products/1/weights"]
    assert (tmp_path / "f" / "weights").read_bytes() == b"w" * 1000


def test_a_connection_that_breaks_is_made_again_where_it_broke(
    shared: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = os.urandom(3 * 1024**2)
    source = tmp_path / "source"
    source.write_bytes(content)
    store = backend()
    store.put("large", source)
    offsets: list[int] = []
    real = type(store).open

    class Breaking:
        def __init__(self, body: Any) -> None:
            self.body, self.num_reads = body, 0

        def read(self, size: int) -> bytes:
            self.num_reads += 1
            if self.num_reads == 2:
                raise StorageError("connection reset")
            return bytes(self.body.read(size))

        def close(self) -> None:
            self.body.close()

    def open_breaking(self: Any, key: str, offset: int = 0) -> Any:
        offsets.append(offset)
        return Breaking(real(self, key, offset))

    monkeypatch.setattr(type(store), "open", open_breaking)
    fetching.fetch_file("large", tmp_path / "copy", hashlib.sha256(content).hexdigest())
    assert (tmp_path / "copy").read_bytes() == content
    assert offsets == [0, 1024**2, 2 * 1024**2]


def test_an_adapter_made_on_one_machine_is_read_on_another_without_being_held_in_memory(
    shared: S3Server, settings: Any, tmp_path: Path
) -> None:
    source = tmp_path / "attempt" / "adapter"
    source.mkdir(parents=True)
    (source / "README.md").write_text("# card")
    content = os.urandom(1024**2) * 24
    (source / "weights").write_bytes(content)
    storage.keep_adapter(source, "7/job-1")
    another_machine(settings, tmp_path)
    assert storage.adapter_file_size("7/job-1", "weights") == len(content)
    assert storage.adapter_file_size("7/job-1", "none") is None
    with pytest.raises(FileNotFoundError):
        storage.open_adapter_file("7/job-1", "none")
    digest = hashlib.sha256()
    tracemalloc.start()
    with storage.open_adapter_file("7/job-1", "weights") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert digest.digest() == hashlib.sha256(content).digest()
    assert peak < 8 * 1024**2
    storage.discard_adapter("7/job-1")
    assert storage.adapter_file_size("7/job-1", "weights") is None


def test_a_wrong_key_and_a_storage_that_is_away_are_said_in_words(
    shared: S3Server, settings: Any, tmp_path: Path
) -> None:
    settings.S3_SECRET = "wrong"
    with pytest.raises(StorageError, match="The storage refuses"):
        storage.store_blob([b"x"], max_bytes=10)
    settings.S3_ENDPOINT = "http://127.0.0.1:9"
    with pytest.raises(StorageError, match="does not answer"):
        storage.store_blob([b"x"], max_bytes=10)
    assert [path for path in Path(settings.DATA_DIR).rglob("*") if path.is_file()] == []

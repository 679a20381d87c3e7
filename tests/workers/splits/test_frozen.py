"""The file of a split: the same bytes for the same split, and a refusal of any other file."""

from __future__ import annotations

from pathlib import Path

import pytest

from workers.digests import file_sha256
from workers.errors import DatasetError
from workers.splits.frozen import FrozenSplit

SPLIT = FrozenSplit("ab" * 32, train=[1, 2, 5], validation=[3], test=[4, 9], format="messages", settings={"seed": 17})


def test_it_comes_back_as_it_was_written(tmp_path: Path) -> None:
    SPLIT.write(tmp_path / "a")
    SPLIT.write(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert FrozenSplit.read(tmp_path / "a", sha256=file_sha256(tmp_path / "b"), dataset_sha256="ab" * 32) == SPLIT


@pytest.mark.parametrize(
    ("old", "new"), [(b"[3]", b"[2]"), (b"[4,9]", b"[9,4]"), (b"[3]", b"[0]"), (b"[3]", b'["3"]'), (b'"test"', b'"x"'),
                     (b'"split_version":1', b'"split_version":2'), (b"\n", b""), (b"[3]", b"3")],
)  # fmt: skip
def test_a_file_that_is_no_split_is_refused(tmp_path: Path, old: bytes, new: bytes) -> None:
    path = tmp_path / "split.jsonl"
    SPLIT.write(path)
    path.write_bytes(path.read_bytes().replace(old, new))
    with pytest.raises(DatasetError) as caught:
        FrozenSplit.read(path)
    assert caught.value.field == "dataset.split"


def test_another_file_or_another_dataset_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "split.jsonl"
    SPLIT.write(path)
    with pytest.raises(DatasetError, match="is not the one that the recipe names"):
        FrozenSplit.read(path, sha256="0" * 64)
    with pytest.raises(DatasetError, match="of another dataset"):
        FrozenSplit.read(path, dataset_sha256="0" * 64)
    with pytest.raises(DatasetError, match="cannot be read as a split"):
        FrozenSplit.read(tmp_path / "nowhere")

"""An exported folder loads without a script, has every usable row as it was read, and says why others are left out."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest

from tests.workers.formats.samples import FORMATS, SAMPLES
from workers import exporting
from workers.examples import AnyExample
from workers.exporting import DATA_FILE, SET_ASIDE_FILE, Kind
from workers.formats import get_format
from workers.reading import read_rows, recognise

CARD = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/train-*\n---\n# Rows\n"
KINDS: tuple[Kind, ...] = ("jsonl", "parquet")


def file_of(folder: Path, name: str) -> tuple[Path, dict[str, str]]:
    """A file with a row of each dialect of a format, one of them twice so that there are some, and a broken line."""
    rows = [row for (format_name, _), row in SAMPLES.items() if format_name == name]
    columns = get_format(name).recognise(rows)[1]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"broken": \n')
    return path, columns


def usable(path: Path, name: str, columns: dict[str, str]) -> list[AnyExample]:
    return [replace(example, line=0) for example, _ in read_rows(path, name, columns) if example is not None]


def unpacked(path: Path, name: str, columns: dict[str, str], kind: Kind, folder: Path) -> Path:
    out = io.BytesIO()
    exporting.write_archive(path, out, name, columns, kind=kind, card=CARD.encode())
    with zipfile.ZipFile(out) as archive:
        archive.extractall(folder)
    return folder


def without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_nulls(one) for key, one in value.items() if one is not None}
    return [without_nulls(one) for one in value] if isinstance(value, list) else value


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FORMATS)
def test_a_loader_reads_every_usable_row(
    name: str, kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path, columns = file_of(tmp_path, name)
    expected = usable(path, name, columns)
    assert expected
    folder = unpacked(path, name, columns, kind, tmp_path / "folder")
    loaded = datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    assert [without_nulls(row) for row in loaded] == [exporting.row_value(example) for example in expected]
    left_out = [json.loads(line) for line in (folder / SET_ASIDE_FILE).read_text().splitlines()]
    num_rows = len(path.read_text().splitlines())
    assert len(expected) + len(left_out) == num_rows
    assert left_out[-1]["line"] == num_rows
    assert all(one["problems"][0]["message"] for one in left_out)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FORMATS)
def test_read_again_here_the_rows_are_the_same(name: str, kind: Kind, tmp_path: Path) -> None:
    path, columns = file_of(tmp_path, name)
    folder = unpacked(path, name, columns, kind, tmp_path / "folder")
    data = folder / f"{DATA_FILE}.{kind}"
    found = recognise(data)
    assert found is not None
    assert usable(data, found.format, found.columns) == usable(path, name, columns)


def test_the_command_writes_the_archive_and_refuses_in_a_sentence(tmp_path: Path) -> None:
    path, columns = file_of(tmp_path, "messages")
    (tmp_path / "card.md").write_text(CARD)

    def run(file: Path) -> subprocess.CompletedProcess[bytes]:
        command = [sys.executable, "-m", "workers.exporting", str(file), "--format", "messages", "--as", "parquet"]
        more = ["--columns", json.dumps(columns), "--card", str(tmp_path / "card.md")]
        return subprocess.run([*command, *more], capture_output=True, check=False, timeout=120)

    good = run(path)
    assert good.returncode == 0, good.stderr.decode()
    with zipfile.ZipFile(io.BytesIO(good.stdout)) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == ["README.md", f"{DATA_FILE}.parquet", SET_ASIDE_FILE]
        assert archive.read("README.md").decode() == CARD
    (tmp_path / "picture.jsonl").write_bytes(b"\x89PNG\r\n\x1a\n" + b"x" * 100)
    bad = run(tmp_path / "picture.jsonl")
    assert bad.returncode == 1
    assert b"PNG image" in bad.stderr
    assert b"Traceback" not in bad.stderr


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", sorted(exporting.FAST_FORMATS))
@pytest.mark.parametrize("has_others", [False, True])
def test_a_large_file_gives_what_a_small_one_does(
    has_others: bool, name: str, kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, columns = file_of(tmp_path, name)
    others = path.read_text()
    role, text, asks, says = ("from", "value", "human", "gpt") if name == "sharegpt" else (
        "role", "content", "user", "assistant",
    )  # fmt: skip
    field = "conversations" if name == "sharegpt" else "messages"
    ordinary = [
        json.dumps({"id": n, field: [{role: asks, text: f"What is {n}?"}, {role: says, text: "Où là."}]}, **spelling)
        for n in range(50)
        for spelling in ({}, {"separators": (",", ":")}, {"ensure_ascii": False})
    ]
    path.write_text("\n".join([*ordinary, *(others.splitlines() if has_others else []), *ordinary]) + "\n")
    archives = []
    for size in (0, 2**40):
        monkeypatch.setattr(exporting, "FAST_FROM_BYTES", size)
        out = io.BytesIO()
        exporting.write_archive(path, out, name, columns, kind=kind, card=CARD.encode())
        archives.append(out.getvalue())
    assert archives[0] == archives[1]
    with zipfile.ZipFile(io.BytesIO(archives[0])) as archive:
        assert bool(archive.read(SET_ASIDE_FILE)) is has_others

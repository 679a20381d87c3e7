"""A dataset version leaves the studio as a folder that the Hub and its loader read."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from django.test import Client
from django.urls import reverse

from studio.accounts.models import ApiToken, AuditEvent, Team, User
from studio.datasets import exporting
from studio.datasets.exporting import ExportFailedError
from studio.datasets.models import DatasetVersion
from tests.studio.datasets.conftest import Upload, good_rows, jsonl


def unpacked(content: bytes, folder: Path) -> Path:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        archive.extractall(folder)
    return folder


def path_of(version: DatasetVersion, kind: str) -> str:
    return reverse("datasets:export", args=[version.dataset_id, version.number]) + f"?kind={kind}"


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_the_page_gives_a_folder_that_the_loader_reads(
    kind: str, upload: Upload, bob_client: Client, tmp_path: Path
) -> None:
    version = upload(jsonl([*good_rows(12), {"prompt": "no answer"}]), "faq.jsonl", name='FAQ: "all"', licence="mit")
    page = bob_client.get(version.get_absolute_url()).content.decode()
    assert f"{path_of(version, kind)}" in page
    answer: Any = bob_client.get(path_of(version, kind))
    assert answer.status_code == 200
    assert answer["Content-Type"] == "application/zip"
    folder = unpacked(b"".join(answer.streaming_content), tmp_path / "folder")
    loaded = datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded.num_rows == version.num_usable == 12
    assert loaded[1]["messages"][1]["content"] == "It is 2."
    front = yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])
    assert (front["pretty_name"], front["license"], front["size_categories"]) == ('FAQ: "all"', "mit", ["n<1K"])
    assert "1 of 13 rows" in (folder / "README.md").read_text()
    event = AuditEvent.objects.get(action="dataset.exported")
    assert (event.object_id, event.details["kind"]) == (str(version.pk), kind)


def test_the_api_gives_the_same(upload: Upload, team: Team, bob: User, bob_client: Client) -> None:
    version = upload(jsonl(good_rows()))
    secret = ApiToken.issue(team=team, user=bob, name="t", scopes=["read"])[1]
    client = Client(headers={"authorization": f"Bearer {secret}"})
    path = f"/api/v1/datasets/{version.dataset_id}/versions/{version.number}/export/"
    answers: list[Any] = [client.get(f"{path}?kind=jsonl"), bob_client.get(path_of(version, "jsonl"))]
    first, second = (b"".join(answer.streaming_content) for answer in answers)
    assert first == second
    assert client.get(f"{path}?kind=xlsx").status_code == 422


def test_what_is_not_ready_is_not_exported(upload: Upload, team: Team, bob: User, bob_client: Client) -> None:
    version = upload(jsonl(good_rows()), inspect=False)
    answer = bob_client.get(path_of(version, "parquet"), follow=True)
    assert "there are no rows to export yet" in answer.content.decode()
    secret = ApiToken.issue(team=team, user=bob, name="t", scopes=["read"])[1]
    client = Client(headers={"authorization": f"Bearer {secret}"})
    path = f"/api/v1/datasets/{version.dataset_id}/versions/{version.number}/export/"
    assert (client.get(path).status_code, client.get(path).json()["error"]["code"]) == (409, "not_ready")


def test_another_team_gets_nothing(upload: Upload, charlie_client: Client) -> None:
    assert charlie_client.get(path_of(upload(jsonl(good_rows())), "parquet")).status_code == 404


def test_an_export_that_breaks_is_no_whole_archive(upload: Upload) -> None:
    version = upload(jsonl(good_rows()))
    version.format = "no such format"
    version.columns = {}
    with pytest.raises(ExportFailedError, match="ended with status 1"):
        b"".join(exporting.archive(version, "jsonl"))


def test_a_reader_that_goes_away_ends_the_process(upload: Upload) -> None:
    version = upload(jsonl(good_rows(20_000)), inspect=False)
    version.format = "prompt_completion"
    chunks = exporting.archive(version, "jsonl")
    assert next(chunks)
    chunks.close()  # type: ignore[attr-defined]

"""A dataset version as a folder for the Hugging Face Hub, zipped while it is sent by a process that reads the rows."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import orjson
from django.conf import settings
from django.http import HttpRequest, StreamingHttpResponse
from django.utils.http import content_disposition_header

from studio.accounts.models import ApiToken, User, record
from studio.datasets.models import DatasetVersion
from studio.datasets.scanning import languages_of
from studio.streaming import CHUNK_BYTES, stream
from workers.exporting import DATA_FILE, SET_ASIDE_FILE, Kind
from workers.licences import UNKNOWN
from workers.scans.language import own_languages

KINDS: dict[Kind, str] = {"parquet": "Parquet", "jsonl": "JSON Lines"}
# As the Hub names them: up to this many rows.
_SIZES = (
    (1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"),
    (10_000_000, "1M<n<10M"), (100_000_000, "10M<n<100M"), (1_000_000_000, "100M<n<1B"),
)  # fmt: skip
_COLUMNS = {
    "chat": "`messages`: turns with `role` and `content`, the last of them the answer to learn.",
    "preference": "`prompt`, and of two answers to it the `chosen` and the `rejected` one, as lists of turns.",
    "unpaired": "`prompt` and `completion` as lists of turns, and `label`: whether that answer is wanted.",
    "text": "`text`: a passage.",
}


class ExportFailedError(Exception):
    """The process that reads the rows ended before it had written them all; the archive sent is cut off."""


def response(
    request: HttpRequest, version: DatasetVersion, kind: Kind, *, user: User, token: ApiToken | None = None
) -> StreamingHttpResponse:
    """The archive of a version that is ready, written while it is sent; with an audit event."""
    record("dataset.exported", team=version.dataset.team, user=user, token=token, target=version, kind=kind)
    answer = stream(request, archive(version, kind), content_type="application/zip")
    name = f"{version.dataset.name}-v{version.number}.zip"
    answer["Content-Disposition"] = content_disposition_header(True, name) or "attachment"
    return answer


def front_matter(version: DatasetVersion, kind: Kind) -> str:
    """What the Hub reads of a card: name, licence, languages, size and where the rows are."""
    dataset = version.dataset
    languages = own_languages(languages_of(version))
    size = next((name for most, name in _SIZES if version.num_usable < most), "n>1T")
    licence = dataset.licence or UNKNOWN
    front = [
        "---",
        # JSON is YAML, and a name may hold anything.
        f"pretty_name: {orjson.dumps(dataset.name).decode()}",
        f"license: {licence}",
        *(["language:", *(f"- {code}" for code in languages)] if languages else []),
        "task_categories:",
        "- text-generation",
        "size_categories:",
        f"- {size}",
        "configs:",
        "- config_name: default",
        "  data_files:",
        "  - split: train",
        f"    path: {DATA_FILE}.{kind}",
        "---",
    ]
    return "\n".join(front)


def card(version: DatasetVersion, kind: Kind) -> str:
    """README.md of the folder: front matter, what people wrote of the dataset, and in words what the rows are."""
    dataset = version.dataset
    set_aside = (
        f"\n{version.num_quarantined:,} of {version.num_rows:,} rows cannot be used; `{SET_ASIDE_FILE}` has "
        "their lines and what is wrong with each.\n"
        if version.num_quarantined
        else ""
    )
    body = (
        f"# {dataset.name}\n\n{dataset.description}\n\nVersion {version.number}: {version.num_usable:,} rows.\n"
        f"{set_aside}\nColumns: {_COLUMNS[version.example_type()]} `tools`, where it is there, is the JSON list of the "
        f"functions that may be called.\n\nMade from `{version.file_name}`, sha256 `{version.sha256}`.\n"
    )
    return f"{front_matter(version, kind)}\n\n{body}"


def archive(version: DatasetVersion, kind: Kind) -> Iterator[bytes]:
    """The zip, in chunks. Closing the iterator ends the process.

    Raises:
        ExportFailedError: the rows could not be read to the end.
    """
    with contextlib.ExitStack() as stack:
        readme = stack.enter_context(tempfile.NamedTemporaryFile("w", suffix=".md", encoding="utf-8"))
        readme.write(card(version, kind))
        readme.flush()
        command = [
            sys.executable, "-m", "workers.exporting", str(version.path()), "--format", version.format,
            "--columns", orjson.dumps(version.columns).decode(), "--as", kind, "--card", readme.name,
        ]  # fmt: skip
        yield from child_output(command, what=f"Exporting {version}")


def child_output(command: list[str], *, what: str) -> Iterator[bytes]:
    """What a process writes, in chunks. Closing the iterator ends the process.

    Raises:
        ExportFailedError: it ended before it had written everything; `what` it did is in the message.
    """
    with contextlib.ExitStack() as stack:
        child = stack.enter_context(
            subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                cwd=settings.ROOT, env={**os.environ, "ARROW_DEFAULT_MEMORY_POOL": "system"},
            )
        )  # fmt: skip
        # Last in, first out: it is ended before it is waited for.
        stack.callback(child.kill)
        assert child.stdout is not None
        while chunk := child.stdout.read1(CHUNK_BYTES):  # type: ignore[attr-defined]  # what is there, not as much as fits
            yield chunk
        if child.wait() != 0:
            raise ExportFailedError(f"{what} ended with status {child.returncode}.")

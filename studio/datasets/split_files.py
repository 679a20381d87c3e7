"""A split's files to download: the frozen one, and the rows of each part."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import orjson
from django.http import HttpRequest, StreamingHttpResponse
from django.utils.http import content_disposition_header

from studio.accounts.models import ApiToken, User, record
from studio.datasets.exporting import child_output
from studio.datasets.models import DatasetSplit
from studio.streaming import file_chunks, stream
from workers.splits.asked import Part
from workers.splits.exporting import Kind

TYPES: dict[Kind, str] = {"jsonl": "application/jsonl", "csv": "text/csv; charset=utf-8"}


def part_response(
    request: HttpRequest, split: DatasetSplit, part: Part, kind: Kind, *, user: User, token: ApiToken | None = None
) -> StreamingHttpResponse:
    """The rows of a part of a split that is done, read while they are sent; with an audit event."""
    return _sent(request, split, f"{part}.{kind}", _part(split, part, kind), TYPES[kind], user, token)


def file_response(
    request: HttpRequest, split: DatasetSplit, *, user: User, token: ApiToken | None = None
) -> StreamingHttpResponse:
    """The frozen file of a split that is done, as recipes name it; with an audit event."""
    chunks = file_chunks(split.path().open("rb"))
    return _sent(request, split, "split.jsonl", chunks, TYPES["jsonl"], user, token)


def _sent(
    request: HttpRequest, split: DatasetSplit, ending: str, chunks: Iterator[bytes], content_type: str, user: User,
    token: ApiToken | None,
) -> StreamingHttpResponse:  # fmt: skip
    version = split.version
    record(
        "dataset.split_downloaded", team=version.dataset.team, user=user, token=token, target=split, file=ending
    )  # fmt: skip
    answer = stream(request, chunks, content_type=content_type)
    name = f"{version.dataset.name}-v{version.number}-{split.name}-{ending}"
    answer["Content-Disposition"] = content_disposition_header(True, name) or "attachment"
    return answer


def _part(split: DatasetSplit, part: Part, kind: Kind) -> Iterator[bytes]:
    version = split.version
    yield from child_output(
        [sys.executable, "-m", "workers.splits.exporting", str(version.path()), "--format", version.format,
         "--columns", orjson.dumps(version.columns).decode(), "--split", str(split.path()), "--part", part,
         "--as", kind],
        what=f"Exporting {part} of {split}",
    )  # fmt: skip

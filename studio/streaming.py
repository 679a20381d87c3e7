"""Responses that are sent while they are read, so that a large file needs one chunk of memory."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import BinaryIO, TypeVar

from asgiref.sync import sync_to_async
from django.core.handlers.asgi import ASGIRequest
from django.http import HttpRequest, StreamingHttpResponse

CHUNK_BYTES = 256 * 1024

Chunk = TypeVar("Chunk", bytes, str)


def stream(
    request: HttpRequest, chunks: Iterator[Chunk], *, content_type: str, num_bytes: int | None = None
) -> StreamingHttpResponse:
    """A response that sends chunks as they are read, under ASGI and WSGI alike.

    Args:
        request: says which of the two serves it; Django gathers a plain iterator in memory before it answers over ASGI.
        chunks: closed when all were sent, or when the reader goes away.
        content_type: as in the header.
        num_bytes: length of all chunks together, when it is known before.
    """
    body = _off_the_event_loop(chunks) if isinstance(request, ASGIRequest) else chunks
    response = StreamingHttpResponse(body, content_type=content_type)
    if num_bytes is not None:
        response["Content-Length"] = str(num_bytes)
    return response


def file_chunks(file: BinaryIO) -> Iterator[bytes]:
    """An open file's bytes; the file is closed after the last, or when the iterator is."""
    with file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


async def _off_the_event_loop(chunks: Iterator[Chunk]) -> AsyncIterator[Chunk]:
    # Thread-sensitive: rows of the database go on in the thread whose connection began them.
    read = sync_to_async(lambda: next(chunks, None), thread_sensitive=True)
    try:
        while (chunk := await read()) is not None:
            yield chunk
    finally:
        if (close := getattr(chunks, "close", None)) is not None:
            await sync_to_async(close, thread_sensitive=True)()

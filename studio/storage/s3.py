"""An S3-compatible storage: AWS, MinIO, Ceph, SeaweedFS, Garage and the like, by boto3 (the extra `s3`)."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from studio.storage.errors import NotStoredError, StorageError

# Larger files go up in parts of this size, several at once: 10,000 parts are allowed, which is 640 GB.
PART_BYTES = 64 * 1024**2
NUM_AT_ONCE = 4
DELETED_AT_ONCE = 1000
MISSING = {"404", "NoSuchKey", "NotFound"}


class S3Storage:
    """Objects of one bucket below a prefix. Safe to use from several threads.

    An upload that is cut off leaves nothing under its key; the parts of a large one that was killed stay invisible
    in the bucket until its rule for incomplete multipart uploads removes them.
    """

    def __init__(self, *, endpoint: str, bucket: str, prefix: str, region: str, key_id: str, secret: str) -> None:
        try:
            import boto3
            from boto3.s3.transfer import TransferConfig
            from botocore.config import Config
        except ImportError as error:
            raise StorageError(
                "STUDIO_S3_BUCKET is set and boto3 is missing: pip install 'peft-studio[s3]'."
            ) from error
        self.bucket = bucket
        self.prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self._client = boto3.session.Session().client(
            "s3",
            endpoint_url=endpoint or None,
            region_name=region or None,
            # Without a key of our own, whatever the machine has: a profile, a role of its instance.
            aws_access_key_id=key_id or None,
            aws_secret_access_key=secret or None,
            config=Config(
                connect_timeout=5,
                read_timeout=60,
                retries={"mode": "standard", "max_attempts": 5},
                max_pool_connections=4 * NUM_AT_ONCE,
                # A custom endpoint rarely has a name per bucket; AWS itself does both.
                s3={"addressing_style": "path" if endpoint else "auto"},
                # Not every server knows the newer checksums; ours is sha256 over the whole file, checked by whoever
                # fetches it.
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            ),
        )
        self._transfer = TransferConfig(
            multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES, max_concurrency=NUM_AT_ONCE
        )

    def put(self, key: str, path: Path) -> None:
        with _explained(key):
            self._client.upload_file(str(path), self.bucket, self.prefix + key, Config=self._transfer)
        stored, wanted = self.size(key), path.stat().st_size
        if stored != wanted:
            raise StorageError(f"The storage has {stored} bytes of {key} instead of {wanted}.")

    def open(self, key: str, offset: int = 0) -> BinaryIO:
        wanted: dict[str, Any] = {"Range": f"bytes={offset}-"} if offset else {}
        with _explained(key):
            answer = self._client.get_object(Bucket=self.bucket, Key=self.prefix + key, **wanted)
        return cast("BinaryIO", io.BufferedReader(_Body(answer["Body"], key), buffer_size=1 << 16))

    def size(self, key: str) -> int | None:
        try:
            with _explained(key):
                return int(self._client.head_object(Bucket=self.bucket, Key=self.prefix + key)["ContentLength"])
        except NotStoredError:
            return None

    def keys(self, prefix: str) -> Iterator[str]:
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self.prefix + prefix)
        with _explained(prefix):
            for page in pages:
                yield from (str(one["Key"]).removeprefix(self.prefix) for one in page.get("Contents", []))

    def delete(self, keys: Iterable[str]) -> None:
        for some in _in_batches(keys, DELETED_AT_ONCE):
            objects = [{"Key": self.prefix + key} for key in some]
            with _explained(some[0]):
                self._client.delete_objects(Bucket=self.bucket, Delete={"Objects": objects, "Quiet": True})


class _Body(io.RawIOBase):
    """The body of an answer as a raw file, whose failures are StorageErrors."""

    def __init__(self, body: Any, key: str) -> None:
        self._body, self._key = body, key

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with _explained(self._key):
            chunk = self._body.read(len(buffer))
        buffer[: len(chunk)] = chunk
        return len(chunk)

    def close(self) -> None:
        if not self.closed:
            self._body.close()
        super().close()


def _in_batches(keys: Iterable[str], size: int) -> Iterator[list[str]]:
    batch: list[str] = []
    for key in keys:
        batch.append(key)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


@contextlib.contextmanager
def _explained(key: str) -> Iterator[None]:
    """What boto3 raises, as a StorageError in words."""
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except ClientError as error:
        code = str(error.response.get("Error", {}).get("Code", ""))
        if code in MISSING:
            raise NotStoredError(f"There is no {key} in the storage.") from error
        raise StorageError(f"The storage refuses {key}: {code or error}.") from error
    except (BotoCoreError, Boto3Error) as error:
        raise StorageError(f"The storage does not answer for {key}: {error}.") from error

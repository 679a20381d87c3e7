"""A base model's files on the machine that needs them: where they were registered, or fetched from the storage."""

from __future__ import annotations

import logging
from pathlib import Path

from django.conf import settings

from studio import storage
from studio.catalogue.models import BaseModel
from studio.storage import NotStoredError, StorageError, fetching
from workers.digests import file_sha256

logger = logging.getLogger(__name__)

# Up to this size a file that lies at the registered path is compared by its digest, a larger one by its size: on
# another machine the same path may hold other files.
DIGEST_UP_TO_BYTES = 32 * 1024**2


def storage_key(base: BaseModel) -> str:
    """A base model's key in the storage: by content, so that no registration can change what a job was queued for."""
    return f"base_models/{base.revision}"


def local_folder(base: BaseModel) -> Path:
    """A base model's folder on this machine.

    With files in the data folder alone that is where it was registered. With a storage that machines share it is
    fetched once where it does not lie there, which takes as long as the network takes.

    Raises:
        NotStoredError: it is neither here nor in the storage yet.
        StorageError: the storage does not answer, or gives other bytes than were stored.
    """
    registered = Path(base.folder)
    if not storage.is_remote() or holds_files(registered, base.files):
        return registered
    key = storage_key(base)
    try:
        return fetching.fetch_folder(key, settings.DATA_DIR / key)
    except NotStoredError as error:
        raise NotStoredError(
            f"The base model {base.name} is not in the storage yet; the machine on which it was registered brings it"
            " there within minutes"
        ) from error


def holds_files(folder: Path, files: fetching.Files) -> bool:
    """Whether a folder has these files."""
    for file in files:
        path = folder / str(file["name"])
        if not path.is_file() or path.stat().st_size != file["num_bytes"]:
            return False
        if int(file["num_bytes"]) <= DIGEST_UP_TO_BYTES and file_sha256(path) != file["sha256"]:
            return False
    return bool(files)


def share_base_models() -> int:
    """Bring every base model that lies on this machine into the storage; how many were brought now."""
    count = 0
    if not storage.is_remote():
        return count
    for base in BaseModel.objects.order_by("pk"):
        try:
            if not fetching.is_stored(storage_key(base)) and holds_files(Path(base.folder), base.files):
                fetching.store_folder(Path(base.folder), storage_key(base), base.files)
                count += 1
        except (StorageError, FileNotFoundError) as error:
            logger.warning("%s is not in the storage yet: %s", base.name, error)
    return count

"""A job's files between this machine and the storage: what a trainer needs comes, what it leaves goes.

The trainer itself knows folders of its own machine and nothing else. Without a storage that machines share the
folders are the storage, and nothing here has anything to do.
"""

from __future__ import annotations

import json
import logging
import queue
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

from jobs.models import Job
from studio import storage
from studio.catalogue.base_files import local_folder
from studio.storage import DamagedObjectError, StorageError, fetching
from studio.storage.backends import backend
from workers.checkpoint_names import DAMAGED, MANIFEST, NUM_KEPT, place_of
from workers.digests import file_sha256
from workers.events import CheckpointEvent

logger = logging.getLogger(__name__)


def base_model_folder(job: Job) -> Path:
    """The folder of a job's base model on this machine; see `local_folder`."""
    return local_folder(job.base_model)


def dataset_file(job: Job) -> Path:
    """The file of a job's dataset on this machine; see `fetch_blob`."""
    assert job.dataset_version is not None, "an evaluation on standard tasks has no dataset"
    return storage.fetch_blob(job.dataset_version.sha256)


def split_file(job: Job) -> Path | None:
    """The file of the frozen split that a job's recipe names on this machine; None where it names none."""
    split = job.recipe["dataset"].get("split")
    return storage.fetch_blob(split["sha256"]) if split else None


def fetch_checkpoint(job: Job) -> Path | None:
    """The newest checkpoint in the storage, brought to this machine when it is newer than what is here.

    One whose bytes are not those that were stored is passed over for the one before, as the trainer does. Gives the
    checkpoint that was fetched.

    Raises:
        StorageError: the storage does not answer: without its checkpoints a job would begin anew.
    """
    if not storage.is_remote():
        return None
    root = storage.job_folder(job.pk) / "checkpoints"
    folders = list(root.iterdir()) if root.is_dir() else []
    here = [path.name for path in folders if (path / MANIFEST).is_file() and not (path / DAMAGED).exists()]
    newest_here = max(map(_place, here), default=(-1, -1))
    for name in sorted(_stored_checkpoints(job.pk), key=_place, reverse=True):
        if _place(name) <= newest_here:
            return None
        try:
            if (root / name / DAMAGED).exists():
                shutil.rmtree(root / name)  # what was stored of it was whole, or is found out below
            return fetching.fetch_folder(_key(job.pk, name), root / name)
        except (DamagedObjectError, storage.NotStoredError) as error:
            logger.warning("Job %s: checkpoint %s in the storage is passed over: %s", job.pk, name, error)
    return None


class CheckpointStore(threading.Thread):
    """Stores checkpoints in the background as they appear, and at the end the attempt's log.

    The attempt is part of a checkpoint's name, so a worker presumed dead overwrites nothing of its successor.
    """

    def __init__(self, job_id: UUID, attempt: int) -> None:
        super().__init__(name=f"checkpoints-{job_id}", daemon=True)
        self.job_id, self.attempt = job_id, attempt
        self._folders: queue.SimpleQueue[Path | None] = queue.SimpleQueue()

    def __enter__(self) -> CheckpointStore:
        if storage.is_remote():
            self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._folders.put(None)

    def hear(self, event: object) -> None:
        """Take note of a checkpoint that the trainer has completed."""
        if isinstance(event, CheckpointEvent):
            self._folders.put(Path(event.folder))

    def telling(self, tell: Callable[[object], None]) -> Callable[[object], None]:
        """A listener that takes note of checkpoints and passes every event on."""

        def both(event: object) -> None:
            self.hear(event)
            tell(event)

        return both

    def finish(self, log_file: Path) -> None:
        """Wait until everything that was heard of is stored, and store the log: others may go on from here now."""
        self._folders.put(None)
        if not self.is_alive():
            return
        self.join()
        try:
            if log_file.is_file():
                backend().put(f"jobs/{self.job_id}/attempts/{self.attempt}/{log_file.name}", log_file)
        except StorageError as error:
            logger.warning("Job %s: the log of attempt %s is not stored: %s", self.job_id, self.attempt, error)

    def run(self) -> None:
        folder = self._folders.get()
        while folder is not None:
            is_last = False
            # While a large one was on its way, newer ones may have appeared: only the last is worth its time.
            while not self._folders.empty() and not is_last:
                after = self._folders.get()
                is_last = after is None
                folder = after or folder
            self._store(folder)
            if is_last:
                return
            folder = self._folders.get()

    def _store(self, folder: Path) -> None:
        key = _key(self.job_id, folder.name)
        try:
            fetching.store_folder(folder, key, _files_of(folder))
            self._remove_old()
        except FileNotFoundError:
            # The trainer has removed it meanwhile for newer ones; what is half there goes with the next removal.
            logger.info("Job %s: checkpoint %s was gone before it was stored", self.job_id, folder.name)
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("Job %s: checkpoint %s is not stored: %s", self.job_id, folder.name, error)

    def _remove_old(self) -> None:
        kept = sorted(_stored_checkpoints(self.job_id), key=_place)[-NUM_KEPT:]
        prefix = _key(self.job_id, "")
        names = {key.removeprefix(prefix).partition("/")[0] for key in backend().keys(prefix)}
        oldest = _place(kept[0])
        fetching.remove_folders(
            _key(self.job_id, name) for name in sorted(names) if place_of(name) and _place(name) < oldest
        )


def _files_of(folder: Path) -> fetching.Files:
    """A checkpoint's files as its own list has them: one that is being removed is refused instead of stored in part.

    Raises FileNotFoundError for one that is gone, and ValueError, KeyError or TypeError for a list that is none.
    """
    manifest = folder / MANIFEST
    listed = json.loads(manifest.read_text("utf-8"))["files"]
    found: fetching.Files = [
        {"name": str(one["path"]), "sha256": str(one["sha256"]), "num_bytes": int(one["size"])} for one in listed
    ]
    found.append({"name": MANIFEST, "sha256": file_sha256(manifest), "num_bytes": manifest.stat().st_size})
    return found


def _key(job_id: UUID, name: str) -> str:
    return f"jobs/{job_id}/checkpoints/{name}"


def _stored_checkpoints(job_id: UUID) -> list[str]:
    names = [key.rpartition("/")[2] for key in fetching.stored_folders(_key(job_id, ""))]
    return [name for name in names if place_of(name)]


def _place(name: str) -> tuple[int, int]:
    """`place_of` a name; before all others for what is no checkpoint's."""
    return place_of(name) or (-1, -1)

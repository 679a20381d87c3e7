"""What goes wrong with files, in words for people."""

from __future__ import annotations


class StorageError(OSError):
    """A file cannot be stored or fetched; the message is for people."""

    code = "storage"


class DiskFullError(StorageError):
    """No space is left on the data folder's disk."""

    code = "disk_full"


class TooLargeError(StorageError):
    """More bytes arrived than are accepted."""

    code = "too_large"


class NotStoredError(StorageError):
    """There is no such object in the storage that the machines share."""


class DamagedObjectError(StorageError):
    """What came from the storage is not what its checksum says; nothing of it was kept."""

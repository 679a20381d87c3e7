"""Receives a form's file into the data folder, in chunks: memory stays flat and a full disk is explained."""

from __future__ import annotations

from typing import Any

from django.conf import settings
from django.core.files.uploadedfile import TemporaryUploadedFile
from django.core.files.uploadhandler import FileUploadHandler, StopUpload

from studio.storage import TooLargeError, explain_disk_error


class SpoolingUploadHandler(FileUploadHandler):
    """Writes a file beside the blobs while it arrives. `error` says why it stopped early."""

    chunk_size = 1024**2

    def __init__(self, request: Any = None) -> None:
        super().__init__(request)
        self.error: OSError | None = None
        self.file: TemporaryUploadedFile | None = None

    def new_file(self, *args: Any, **kwargs: Any) -> None:
        super().new_file(*args, **kwargs)
        folder = settings.DATA_DIR / "blobs" / "incoming"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.file = _SpooledFile(self.file_name, self.content_type, 0, self.charset, self.content_type_extra,
                                     folder=str(folder))  # fmt: skip
        except OSError as error:
            self._stop(explain_disk_error(error))

    def receive_data_chunk(self, raw_data: bytes, start: int) -> None:
        assert self.file is not None
        if start + len(raw_data) > settings.MAX_UPLOAD_BYTES:
            limit = settings.MAX_UPLOAD_BYTES / 1e9
            self._stop(TooLargeError(f"The file is larger than the {limit:.1f} GB that are accepted."))
        try:
            self.file.write(raw_data)
        except OSError as error:
            self._stop(explain_disk_error(error))

    def file_complete(self, file_size: int) -> TemporaryUploadedFile | None:
        assert self.file is not None
        self.file.seek(0)
        self.file.size = file_size
        return self.file

    def upload_interrupted(self) -> None:
        if self.file is not None:
            self.file.close()

    def _stop(self, error: OSError) -> None:
        self.error = error
        # The rest is read and thrown away, so that the browser gets the answer and not a broken connection.
        raise StopUpload(connection_reset=False)


class _SpooledFile(TemporaryUploadedFile):
    """A temporary file in a folder of our own: the system's /tmp is often small, or memory."""

    def __init__(self, name: Any, content_type: Any, size: int, charset: Any, extra: Any, *, folder: str) -> None:
        import tempfile

        file = tempfile.NamedTemporaryFile(prefix="form-", dir=folder)  # noqa: SIM115  closed with the request
        super(TemporaryUploadedFile, self).__init__(file, name, content_type, size, charset, extra)

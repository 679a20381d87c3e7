from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from studio.storage import (
    DiskFullError,
    TooLargeError,
    adapter_folder,
    blob_path,
    explain_disk_error,
    file_digests,
    keep_adapter,
    store_blob,
)

ROOT = Path(__file__).resolve().parent.parent.parent


def files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_a_blob_is_addressed_by_its_content(data_dir: Path) -> None:
    stored = store_blob([b"ab", b"", b"c"], max_bytes=3)
    assert stored.sha256 == hashlib.sha256(b"abc").hexdigest()
    assert stored.num_bytes == 3
    assert blob_path(stored.sha256).read_bytes() == b"abc"


def test_the_same_content_is_kept_once(data_dir: Path) -> None:
    first, second = store_blob([b"abc"], max_bytes=9), store_blob([b"a", b"bc"], max_bytes=9)
    assert first == second
    assert len(files_below(data_dir)) == 1


def test_a_file_that_is_too_large_leaves_nothing_behind(data_dir: Path) -> None:
    with pytest.raises(TooLargeError, match="larger than"):
        store_blob([b"x" * 6, b"x" * 5], max_bytes=10)
    assert files_below(data_dir) == []


def test_an_upload_that_breaks_off_leaves_no_blob(data_dir: Path) -> None:
    def broken() -> Iterator[bytes]:
        yield b"half"
        raise ConnectionResetError("the browser went away")

    with pytest.raises(ConnectionResetError):
        store_blob(broken(), max_bytes=100)
    assert files_below(data_dir) == []


def test_a_full_disk_is_said_in_words() -> None:
    explained = explain_disk_error(OSError(errno.ENOSPC, "No space left on device"))
    assert isinstance(explained, DiskFullError)
    assert "Nothing was stored" in str(explained)
    other = OSError(errno.EACCES, "Permission denied")
    assert explain_disk_error(other) is other


def test_a_disk_that_really_fills_up_leaves_nothing_behind(tmp_path: Path) -> None:
    # A file system of one megabyte in a mount namespace of its own.
    script = textwrap.dedent("""
        import os, sys
        from pathlib import Path
        import django
        django.setup()
        from django.conf import settings
        from studio.storage import DiskFullError, store_blob
        settings.DATA_DIR = Path(sys.argv[1])
        store_blob([b"small"], max_bytes=1 << 30)
        try:
            store_blob((b"x" * 65536 for _ in range(64)), max_bytes=1 << 30)
        except DiskFullError as error:
            print(error.strerror)
        print(sorted(p.stat().st_size for p in settings.DATA_DIR.rglob("*") if p.is_file()))
    """)
    mounted = 'mount -t tmpfs -o size=1m tmpfs "$1" && exec "$2" -c "$3" "$1"'
    isolate = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--mount"]
    if subprocess.run([*isolate, "sh", "-c", 'mount -t tmpfs tmpfs "$1"', "-", str(tmp_path)],
                      capture_output=True, check=False).returncode != 0:  # fmt: skip
        pytest.skip("this kernel lets us mount nothing of our own")
    done = subprocess.run(
        [*isolate, "sh", "-c", mounted, "-", str(tmp_path), sys.executable, script],
        env=os.environ | {"DJANGO_SETTINGS_MODULE": "studio.settings", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    message, sizes = done.stdout.strip().splitlines()[-2:]
    assert "The studio's disk is full" in message
    assert sizes == "[5]"


def test_a_name_that_is_no_digest_reaches_no_file(data_dir: Path) -> None:
    for name in ("../../etc/passwd", "A" * 64, "a" * 63):
        with pytest.raises(AssertionError):
            blob_path(name)
    with pytest.raises(AssertionError):
        adapter_folder("../blobs")


def test_keeping_an_adapter_again_replaces_what_a_crash_left(data_dir: Path, tmp_path: Path) -> None:
    for content in ("first", "second"):
        source = tmp_path / "attempt" / "adapter"
        source.mkdir(parents=True, exist_ok=True)
        (source / "weights").write_text(content)
        kept = keep_adapter(source, "7/job")
        assert not source.exists()
    assert (kept / "weights").read_text() == "second"
    [entry] = file_digests(kept)
    assert entry == {"name": "weights", "sha256": hashlib.sha256(b"second").hexdigest(), "num_bytes": 6}

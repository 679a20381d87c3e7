"""A disk that is really full: a small file system of the worker's own, with a real worker and a real training on it."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from django.conf import settings

from jobs.models import Job, JobState
from studio.storage import has_room
from tests.processes import WORKER, kill_tree, test_environment, wait_for, with_steps_of

pytestmark = pytest.mark.django_db(transaction=True)

MOUNT = ("unshare", "--mount", "--map-root-user", "sh", "-c")
# Its own data folder, filled with what lies in the test's: blobs alone, since a base model's folder is absolute.
SCRIPT = 'mount -t tmpfs -o size=6m none "$0" && cp -r "$1" "$0/" && shift && exec "$@"'

may_mount = pytest.mark.skipif(
    shutil.which("unshare") is None
    or subprocess.run([*MOUNT, "mount -t tmpfs none /mnt"], capture_output=True, check=False).returncode != 0,
    reason="this kernel lets no user mount a file system of its own",
)


@contextlib.contextmanager
def worker_on_a_small_disk(folder: Path, log_file: Path) -> Iterator[Path]:
    """A worker whose data folder is 6 MB in all; gives that folder as this process sees it."""
    folder.mkdir()
    command = [sys.executable, *WORKER, "-Q", "gpu", "-n", f"small-{os.getpid()}@test", "-l", "info"]
    with log_file.open("ab") as log:
        process = subprocess.Popen(
            [*MOUNT, SCRIPT, str(folder), str(settings.DATA_DIR / "blobs"), *command],
            env=test_environment() | with_steps_of(0.05) | {"STUDIO_DATA_DIR": str(folder)}, cwd=settings.ROOT,
            stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        yield Path(f"/proc/{process.pid}/root") / folder.relative_to("/")
    finally:
        kill_tree(process.pid)
        process.wait()


def fill(folder: Path) -> Path:
    """A file that takes whatever room there is."""
    ballast = folder / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while file.write(b"\0" * 4096) == 4096:
            pass
    return ballast


@may_mount
def test_a_job_waits_for_room_keeps_its_checkpoint_and_goes_on_by_itself(
    queue: Callable[..., Job], tmp_path: Path
) -> None:
    job = queue(max_steps=100, epochs=20)
    with worker_on_a_small_disk(tmp_path / "data", tmp_path / "worker.log") as data:
        wait_for(lambda: job.points.filter(step__gte=7).exists(), seconds=300, what="step 7")
        ballast = fill(data)

        def waits() -> bool:
            job.refresh_from_db()
            return job.state == JobState.RETRY_WAIT

        wait_for(waits, seconds=300, what="the full disk")
        assert (job.failure_code, job.failures_counted) == ("disk_full", 0)
        assert "Free some space" in job.failure_next_step
        checkpoints = data / "jobs" / str(job.pk) / "checkpoints"
        kept = sorted(path.name for path in checkpoints.iterdir())
        assert kept, "the checkpoints made before are there"
        assert not [name for name in kept if name.startswith(".")], "what was begun is not"
        last = max(int(name.split("-")[0]) for name in kept)
        ballast.unlink()
        wait_for(lambda: Job.objects.get(pk=job.pk).is_final(), seconds=400, what="the end of the job")
        job.refresh_from_db()
    assert (job.state, job.failures_counted) == (JobState.SUCCEEDED, 0)
    ended = job.attempts.get(outcome="succeeded")
    assert ended.from_step == last
    assert set(job.attempts.exclude(pk=ended.pk).values_list("failure_code", flat=True)) == {"disk_full"}


def test_room_is_what_can_really_be_had(tmp_path: Path) -> None:
    assert has_room(tmp_path, 2**20)
    assert not has_room(tmp_path, 2**60)
    assert not has_room(tmp_path / "nowhere", 1)
    assert list(tmp_path.iterdir()) == []

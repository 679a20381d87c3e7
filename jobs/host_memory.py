"""Whether a trainer was killed because the machine, or its container, ran out of memory.

The kernel's out-of-memory killer leaves nothing but a SIGKILL. Two things tell it from any other: the control group's
count of such kills has grown, or the trainer was about to fill what there is.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import psutil

NEAR_SHARE = 0.9
"""Share of the limit from which a killed trainer is taken to have been killed for it. Its peak is read once a second,
so that what it took at last is not seen."""

MOUNT = Path("/sys/fs/cgroup")


def own_groups(listing: str, mount: Path = MOUNT) -> list[Path]:
    """This process's memory control group and the mounted root above it, as /proc/self/cgroup lists them.

    Version 2 has one hierarchy ("0::/path"), version 1 one named memory. Inside a container the path may not exist.
    """
    found = []
    for line in listing.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            found += [mount / path.lstrip("/"), mount]
        elif "memory" in controllers.split(","):
            found += [mount / "memory" / path.lstrip("/"), mount / "memory"]
    return [group for group in dict.fromkeys(found) if group.is_dir()]


def _groups_here() -> list[Path]:
    try:
        return own_groups(Path("/proc/self/cgroup").read_text("ascii"))
    except OSError:
        return []


class HostMemoryWatch:
    """Watches one trainer's memory from its start to its end."""

    def __init__(self, groups: Sequence[Path] | None = None) -> None:
        self._groups = _groups_here() if groups is None else list(groups)
        self._kills_before = self._kills()
        self.peak_bytes = 0
        self.limit_bytes = self._limit()

    def look(self, process_id: int) -> None:
        """Note the most memory that a process has held so far; nothing when it is gone."""
        try:
            for line in Path(f"/proc/{process_id}/status").read_text("ascii", "replace").splitlines():
                if line.startswith("VmHWM:"):
                    self.peak_bytes = max(self.peak_bytes, int(line.split()[1]) * 1024)
        except (OSError, ValueError, IndexError):
            return  # it has ended; the last look counts

    def was_short(self) -> tuple[int, int] | None:
        """(peak, limit) in bytes when a SIGKILL was for want of memory, else None."""
        if self._kills() > self._kills_before or self.peak_bytes >= NEAR_SHARE * self.limit_bytes:
            return self.peak_bytes, self.limit_bytes
        return None

    def _kills(self) -> int:
        """Kills for want of memory so far in the control groups."""
        number = 0
        for group in self._groups:
            for name in ("memory.events", "memory.oom_control"):
                number += sum(int(line.split()[1]) for line in _lines(group / name) if line.startswith("oom_kill "))
        return number

    def _limit(self) -> int:
        limits = [psutil.virtual_memory().total]
        for group in self._groups:
            for name in ("memory.max", "memory.limit_in_bytes"):
                limits += [int(line) for line in _lines(group / name)[:1] if line.isdigit()]
        return min(limits)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text("ascii").splitlines()
    except OSError:
        return []

"""What a command beside a running `manage.py up` needs: its servers' URLs and its key, found in the data folder."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path

LOCK_NAME = "up.lock"
KEY_NAME = "secret_key"


def running_servers(data_dir: Path) -> dict[str, str]:
    """DATABASE_URL and REDIS_URL of the embedded servers that a running `up` has started over this folder.

    Empty where none runs, and for a server that `up` itself was told of: its URL is not ours to keep.
    """
    path = data_dir / LOCK_NAME
    try:
        found = json.loads(path.read_bytes())
        # The lock is only touched where there is something to find: a studio that starts needs it for itself.
        return dict(found["servers"]) if found.get("servers") and _is_held(path) else {}
    except (OSError, ValueError):
        return {}


def kept_secret_key(data_dir: Path) -> str:
    """The key that `up` has made for this folder; empty where there is none, or none that we may read."""
    try:
        return (data_dir / KEY_NAME).read_text().strip()
    except OSError:
        return ""


def _is_held(path: Path) -> bool:
    """Whether a process holds the lock; a killed one leaves the file behind, and no lock."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False

"""Quantised bases on disk: computed once, and from then on loaded instead of the larger originals.

A folder `<revision>/<precision>-<digest of what decides the bits>/` holds what transformers itself saves and loads
again for bitsandbytes' weights, byte for byte, on a CPU too (transformers 5.23 with bitsandbytes 0.50.2;
tests/workers/test_quantised_cache.py), with a MANIFEST.json of digests. It is written aside, forced to disk and
renamed; nothing in it is believed before its digests were checked.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from workers.digests import files_sha256

MANIFEST = "MANIFEST.json"
SHARD_BYTES = "2GB"
"""Largest file of weights: several are hashed at once."""
LEFT_FREE = 1.1
"""Times its own size that a cache entry must find free: a job's checkpoints are worth more than a faster start."""


class QuantisedCache:
    """Quantised weights of base models under one folder, by revision and by all that decides their bits."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder_of(self, revision: str, settings: dict[str, Any]) -> Path:
        """Where an entry lies. `settings` is plain data: precision, quantisation, compute type, kind of device."""
        versions = {name: metadata.version(name) for name in ("bitsandbytes", "torch", "transformers")}
        key = json.dumps({"layout": 1, "settings": settings, "versions": versions}, sort_keys=True)
        return self.root / revision / f"{settings['precision']}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"

    def find(self, folder: Path, *, say: Callable[[str], None]) -> bool:
        """Whether a whole entry lies in `folder`; a damaged one is removed, with a sentence."""
        if not folder.is_dir():
            return False
        try:
            listed = json.loads((folder / MANIFEST).read_text("utf-8"))["files"]
            wanted = {str(name): str(sha256) for name, sha256 in listed.items()}
            names = {path.name for path in folder.iterdir() if path.name != MANIFEST}
            is_whole = names == set(wanted) and files_sha256([folder / name for name in wanted]) == list(
                wanted.values()
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            is_whole = False
        if not is_whole:
            self.drop(folder, say=say)
        return is_whole

    def drop(self, folder: Path, *, say: Callable[[str], None]) -> None:
        """Removes an entry that cannot be used."""
        say("The stored quantised weights are damaged; they are made again from the base model.")
        # The manifest goes first: a half-removed entry must never look whole.
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)

    def store(self, model: Any, folder: Path, *, base_folder: Path, say: Callable[[str], None]) -> None:
        """Keeps a freshly quantised model, unless that fails: without it, the next run only starts more slowly."""
        aside = folder.with_name(f".tmp-{folder.name}-{os.getpid()}")
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            needed = model.get_memory_footprint()
            free = shutil.disk_usage(folder.parent).free
            if free < LEFT_FREE * needed:
                say(
                    f"The quantised weights are not kept for the next job: they need {needed / 1e9:.1f} GB and "
                    f"{free / 1e9:.1f} GB are free."
                )
                return
            model.save_pretrained(str(aside), max_shard_size=SHARD_BYTES)
            _take_generation_settings(base_folder, aside)
            _write_manifest(aside)
            if not folder.exists():
                aside.replace(folder)
        except (OSError, SafetensorError) as error:
            say(f"The quantised weights are not kept for the next job: {_reason(error)}.")
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def remove(root: Path, revision: str) -> None:
    """Removes every entry of a base model."""
    shutil.rmtree(root / revision, ignore_errors=True)


def _take_generation_settings(base_folder: Path, folder: Path) -> None:
    """The base's own file or none, as without the cache; transformers writes one with its own defaults in it."""
    name = "generation_config.json"
    (folder / name).unlink(missing_ok=True)
    if (base_folder / name).is_file():
        shutil.copyfile(base_folder / name, folder / name)


def _write_manifest(folder: Path) -> None:
    paths = sorted(folder.iterdir())
    for path in paths:
        _sync(path)
    files = {path.name: digest for path, digest in zip(paths, files_sha256(paths), strict=True)}
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=2), "utf-8")
    _sync(folder / MANIFEST)
    _sync(folder)


def _sync(path: Path) -> None:
    """Forces a file's bytes, or a folder's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return "no space is left on the disk" if "os error 28" in str(error) else str(error)

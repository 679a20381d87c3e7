"""Checkpoints that a run can be resumed from: complete or not there, verified before they are used.

A checkpoint is a folder `checkpoints/<step>-<attempt>/` with safetensors and JSON files and a MANIFEST.json that
lists each with its size and sha256. It is written aside, forced to disk and renamed. Nothing in it is unpickled.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from workers.checkpoint_names import DAMAGED, MANIFEST, NUM_KEPT, place_of
from workers.digests import file_sha256
from workers.errors import CheckpointError, ExplainedError, StorageError
from workers.failpoints import failpoint
from workers.stopping import Watch

SET_ASIDE = ".bad-"
"""Begin of the name of what the disk failed on while it was written."""
BROKEN = frozenset({errno.EIO, errno.EROFS, errno.ESTALE, errno.ENXIO, errno.ENODEV, errno.ETIMEDOUT, errno.EREMOTEIO})
"""What the system reports when a disk, or the way to it, is broken."""
BEST = "best.safetensors"
VISITS = "visits.safetensors"
"""What suspicions about rows rest on; not part of what is learned, so older checkpoints do without."""
ANSWERS = "answers.json"
"""The newest answers to the fixed prompts; older checkpoints do without, too."""
OPTIONAL = (BEST, VISITS, ANSWERS)
REQUIRED = ("adapter.safetensors", "optimizer.safetensors", "random.safetensors", "random.json", "position.json")


class DiskFullError(ExplainedError):
    """There is no room for a checkpoint or an adapter."""

    code = "disk_full"


class ForeignCheckpointError(CheckpointError):
    """A checkpoint of another recipe: whole, but not for this run."""


@dataclass(frozen=True)
class Position:
    """Where a run stands. `step` counts finished optimizer steps; the rest is summed over all of them.

    `row` is the place in the seeded stream of rows at which the next step begins; `train_seconds` is time spent in
    steps, over all attempts; `watch` is what validations have shown. `micro_batch_tokens` is the budget that
    micro-batches were split by, so that a later attempt adds up the same ones; None where rows alone were counted.
    """

    step: int
    row: int
    num_tokens: int
    num_loss_tokens: int
    micro_batch_size: int
    train_seconds: float
    first_loss: float | None
    last_loss: float | None
    watch: Watch = field(default_factory=Watch)
    micro_batch_tokens: int | None = None

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Position:
        """The position that `dataclasses.asdict` made plain; raises TypeError for other fields."""
        return cls(**(value | {"watch": Watch(**value.get("watch", {}))}))


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint on disk."""

    folder: Path
    position: Position


def trainable_parameters(model: Any) -> dict[str, torch.nn.Parameter]:
    """The adapter's parameters by name: all that training changes."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save(
    root: Path,
    *,
    attempt: int,
    position: Position,
    recipe_sha256: str,
    versions: dict[str, str],
    model: Any,
    optimizer: torch.optim.Optimizer,
    best_weights: dict[str, torch.Tensor] | None = None,
    visits: dict[str, np.ndarray] | None = None,
    answers: Mapping[int, Sequence[str | None]] | None = None,
) -> Checkpoint:
    """Writes a checkpoint under `root` and removes all but the newest two that are whole.

    `best_weights`, those of the best step so far, go into the checkpoint: it must not depend on files that change
    while an older one may still be needed.

    Raises:
        DiskFullError: no room; what was begun is removed and the older checkpoints are untouched.
        StorageError: the disk failed; what was begun is marked as bad, never synced or read again.
    """
    folder = root / f"{position.step}-{attempt}"
    aside = root / f".tmp-{folder.name}"
    try:
        if not root.exists():
            root.mkdir(parents=True)
            _sync(root.parent)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        failpoint("checkpoint.begin")
        _write_files(aside, position, model, optimizer)
        if best_weights is not None:
            save_file(best_weights, aside / BEST)
        if visits is not None:
            save_file({name: torch.from_numpy(one.copy()) for name, one in visits.items()}, aside / VISITS)
        if answers:
            (aside / ANSWERS).write_text(json.dumps(list(answers.items())), "utf-8")
        failpoint("checkpoint.files_written")
        _write_manifest(aside, position, recipe_sha256, versions)
        if folder.exists():  # this attempt came here before: resumed from an older one after damage
            shutil.rmtree(folder)
        failpoint("checkpoint.before_rename")
        aside.replace(folder)
        failpoint("checkpoint.after_rename")
        _sync(root)
    except (OSError, SafetensorError) as error:
        explained = explain_write_error(error, "the checkpoint")
        if isinstance(explained, StorageError):
            _set_aside_as_bad(root, aside if aside.exists() else folder)
        else:
            shutil.rmtree(aside, ignore_errors=True)
        raise explained from error
    failpoint("checkpoint.before_remove")
    _remove_old(root, keep=folder)
    return Checkpoint(folder, position)


def find(
    root: Path, *, recipe_sha256: str, tell: Callable[[str], None], keys_of: Callable[[], dict[str, torch.Size]]
) -> Checkpoint | None:
    """The newest checkpoint of any attempt that verifies and belongs to this recipe; None when there is none.

    `tell` is given a sentence for each one that is passed over. A damaged one is marked, so that it is neither read
    again nor kept in the place of a good one. `keys_of` names the parameters that the model needs.
    """
    candidates = sorted(
        (
            (*place, path)
            for path in (root.iterdir() if root.is_dir() else ())
            if (place := place_of(path.name)) is not None
        ),
        reverse=True,
    )
    damaged: list[str] = []
    for step, _, path in candidates:
        try:
            checkpoint = _verify(path, recipe_sha256, keys_of())
        except CheckpointError as error:
            what = "is passed over" if isinstance(error, ForeignCheckpointError) else "is damaged"
            damaged.append(f"checkpoint {step} {what} ({error.message})")
            if not isinstance(error, ForeignCheckpointError):
                _mark_bad(path)
            continue
        for sentence in damaged:
            tell(f"{sentence}, goes on from {checkpoint.position.step}.")
        return checkpoint
    for sentence in damaged:
        tell(f"{sentence}, starts again from step 0.")
    return None


def newest_step(root: Path) -> int | None:
    """The step of the newest checkpoint that is not known to be bad; None without any. Nothing is verified."""
    places = (place_of(path.name) for path in root.glob("*") if (path / MANIFEST).is_file())
    return max((place[0] for place in places if place is not None), default=None)


def restore(checkpoint: Checkpoint, *, model: Any, optimizer: torch.optim.Optimizer) -> None:
    """Puts weights, optimizer state and every source of random numbers back to where the checkpoint was made."""
    parameters = trainable_parameters(model)
    with torch.no_grad(), safe_open(checkpoint.folder / "adapter.safetensors", framework="pt") as weights:
        for name, parameter in parameters.items():
            parameter.copy_(weights.get_tensor(name))
    with safe_open(checkpoint.folder / "optimizer.safetensors", framework="pt") as tensors:
        state: dict[int, dict[str, Any]] = {}
        for key in tensors.keys():  # noqa: SIM118 - not a dict
            index, name = key.split(".", 1)
            state.setdefault(int(index), {})[name] = tensors.get_tensor(key)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    with safe_open(checkpoint.folder / "random.safetensors", framework="pt") as tensors:
        torch.set_rng_state(tensors.get_tensor("torch"))
        if torch.cuda.is_available() and "cuda" in tensors.keys():  # noqa: SIM118 - not a dict
            torch.cuda.set_rng_state(tensors.get_tensor("cuda"))
        numpy_keys = tensors.get_tensor("numpy").numpy().astype(np.uint32)
    other = json.loads((checkpoint.folder / "random.json").read_text("utf-8"))
    version, keys, gauss = other["python"]
    random.setstate((version, tuple(keys), gauss))
    place, has_gauss, cached = other["numpy"]
    np.random.set_state(("MT19937", numpy_keys, place, has_gauss, cached))


def best_weights(checkpoint: Checkpoint) -> dict[str, torch.Tensor] | None:
    """The weights of the best step, on the CPU; None when the checkpoint keeps none."""
    path = checkpoint.folder / BEST
    return load_file(path) if path.is_file() else None


def visits(checkpoint: Checkpoint) -> dict[str, np.ndarray] | None:
    """The losses of rows at their visits (`workers.suspicion.Visits`); None when the checkpoint keeps none."""
    path = checkpoint.folder / VISITS
    return {name: one.numpy() for name, one in load_file(path).items()} if path.is_file() else None


def answers(checkpoint: Checkpoint) -> dict[int, tuple[str | None, ...]]:
    """The newest answers to the fixed prompts by step; none when the checkpoint keeps none."""
    path = checkpoint.folder / ANSWERS
    listed = json.loads(path.read_text("utf-8")) if path.is_file() else []
    return {step: tuple(texts) for step, texts in listed}


def disk_error(error: OSError, what: str) -> ExplainedError:
    """An error of the file system in words; its code is disk_full when there is no room, storage when it broke."""
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return DiskFullError(
            f"There is no room on the disk for {what}.",
            next_step="Free some space and continue: the checkpoints made before are complete.",
        )
    whole = f"{what[0].upper()}{what[1:]}"
    if error.errno in BROKEN:
        return StorageError(
            f"{whole} could not be written: the disk reports “{error.strerror}”.",
            next_step="An admin should look at the disk. The checkpoints made before are kept.",
        )
    return CheckpointError(f"{whole} could not be written: {error.strerror or error}.")


def explain_write_error(error: OSError | SafetensorError, what: str) -> Exception:
    """`disk_error` of what was raised while writing. safetensors wraps the system's error and keeps only its words."""
    if isinstance(error, OSError):
        return disk_error(error, what)
    found = re.search(r"os error (\d+)", str(error))
    return disk_error(OSError(int(found.group(1)), os.strerror(int(found.group(1)))), what) if found else error


def _write_files(folder: Path, position: Position, model: Any, optimizer: torch.optim.Optimizer) -> None:
    weights = {name: one.detach().cpu().contiguous() for name, one in trainable_parameters(model).items()}
    save_file(weights, folder / "adapter.safetensors")
    tensors = {
        f"{index}.{name}": value.detach().cpu().contiguous()
        for index, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
    }
    save_file(tensors, folder / "optimizer.safetensors")
    _, numpy_keys, place, has_gauss, cached = np.random.get_state()
    numbers = {"torch": torch.get_rng_state(), "numpy": torch.from_numpy(np.asarray(numpy_keys).astype(np.int64))}
    if torch.cuda.is_available():
        numbers["cuda"] = torch.cuda.get_rng_state()
    save_file(numbers, folder / "random.safetensors")
    version, keys, gauss = random.getstate()
    others = {"python": [version, list(keys), gauss], "numpy": [int(place), int(has_gauss), float(cached)]}
    (folder / "random.json").write_text(json.dumps(others), "utf-8")
    (folder / "position.json").write_text(json.dumps(asdict(position)), "utf-8")


def _write_manifest(folder: Path, position: Position, recipe_sha256: str, versions: dict[str, str]) -> None:
    files = []
    for path in sorted(folder.iterdir()):
        _sync(path)
        files.append({"path": path.name, "size": path.stat().st_size, "sha256": file_sha256(path)})
    failpoint("checkpoint.before_manifest")
    manifest: dict[str, Any] = {
        "manifest_version": 2,
        "step": position.step,
        "recipe_sha256": recipe_sha256,
        "versions": versions,
        "files": files,
    }
    (folder / MANIFEST).write_text(_signed(manifest), "utf-8")
    _sync(folder / MANIFEST)
    _sync(folder)


def _signed(manifest: dict[str, Any]) -> str:
    """The text of a manifest, with a checksum of everything else in it."""
    body = {name: value for name, value in manifest.items() if name != "manifest_sha256"}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps({**body, "manifest_sha256": digest}, indent=2)


def _verify(folder: Path, recipe_sha256: str, keys: dict[str, torch.Size]) -> Checkpoint:
    """The checkpoint in a folder; raises CheckpointError that says what is wrong with it."""
    if (folder / DAMAGED).exists():
        raise CheckpointError("it was found to be damaged before")
    try:
        text = (folder / MANIFEST).read_text("utf-8")
        manifest = json.loads(text)
        if manifest["manifest_version"] != 1 and text != _signed(manifest):
            raise CheckpointError(f"its {MANIFEST} does not match its own checksum")
        listed = {str(one["path"]): (int(one["size"]), str(one["sha256"])) for one in manifest["files"]}
        of_recipe, step = manifest["recipe_sha256"], manifest["step"]
    except FileNotFoundError as error:
        raise CheckpointError(f"it has no {MANIFEST}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"its {MANIFEST} cannot be read") from error
    if of_recipe != recipe_sha256:
        raise ForeignCheckpointError("it belongs to another recipe")
    further = [name for name in OPTIONAL if name in listed or (folder / name).exists()]
    for name in (*REQUIRED, *further):
        if name not in listed:
            raise CheckpointError(f"{name} is not in its {MANIFEST}")
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{name} is missing")
        if path.stat().st_size != listed[name][0]:
            raise CheckpointError(f"{name} has {path.stat().st_size} bytes instead of {listed[name][0]}")
        if file_sha256(path) != listed[name][1]:
            raise CheckpointError(f"{name} does not match its checksum")
    try:
        position = Position.from_dict(json.loads((folder / "position.json").read_text("utf-8")))
        found = [
            _shapes(folder / name) for name in (("adapter.safetensors", BEST) if BEST in further else REQUIRED[:1])
        ]
    except (OSError, ValueError, TypeError, AttributeError, SafetensorError) as error:
        raise CheckpointError("its files cannot be read") from error
    if not folder.name.startswith(f"{step}-") or position.step != step:
        raise CheckpointError(f"it holds step {position.step} and not the step of its name")
    if any(shapes != keys for shapes in found):
        raise CheckpointError("its weights do not fit this adapter")
    return Checkpoint(folder, position)


def _shapes(path: Path) -> dict[str, torch.Size]:
    with safe_open(path, framework="pt") as weights:
        return {name: torch.Size(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118


def _remove_old(root: Path, *, keep: Path) -> None:
    """Keeps the one just written and the newest whole one before it, and clears what is left of others.

    Of a later step, or of another attempt at this step, there is only what this run could not go on from: had it been
    whole, it would have begun there. Such a checkpoint must not take the place of an earlier one that is. What belongs
    to a later attempt is left alone: it has taken over, and this one does not know it yet.
    """
    kept = place_of(keep.name)
    assert kept is not None, f"{keep.name} is no checkpoint's name"
    step, attempt = kept
    earlier = []
    for path in list(root.iterdir()):
        name = path.name.removeprefix(".tmp-")
        place = place_of(name)
        if path == keep or place is None or place[1] > attempt:
            continue
        is_whole = (path / MANIFEST).is_file() and not (path / DAMAGED).exists()
        if path.name == name and is_whole and place[0] < step:
            earlier.append((place, path))
        else:
            _remove(path)
    for _, path in sorted(earlier, reverse=True)[NUM_KEPT - 1 :]:
        _remove(path)
    for path in sorted(root.glob(f"{SET_ASIDE}*"), key=lambda path: path.stat().st_mtime)[:-1]:
        shutil.rmtree(path, ignore_errors=True)  # one is enough to look into


def _remove(folder: Path) -> None:
    # The manifest goes first: a half-removed checkpoint must never look complete.
    with contextlib.suppress(OSError):
        (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _mark_bad(folder: Path) -> None:
    """Leaves a mark in a damaged checkpoint; where the disk takes none, it is found to be damaged again next time."""
    with contextlib.suppress(OSError):
        (folder / DAMAGED).touch()


def _set_aside_as_bad(root: Path, folder: Path) -> None:
    """Moves what the disk failed on out of the way, without its manifest.

    After a failed sync the kernel may call the lost pages clean: a second sync of the same file would succeed and
    prove nothing (Rebello et al. 2020, "Can Applications Recover from fsync Failures?"). Nothing there is used again.
    """
    with contextlib.suppress(OSError):
        (folder / MANIFEST).unlink(missing_ok=True)
        folder.replace(root / f"{SET_ASIDE}{folder.name.removeprefix('.tmp-')}")


def _sync(path: Path) -> None:
    """Forces a file's bytes, or a folder's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

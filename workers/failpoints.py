"""Places where a test can make this process fail. For tests only: without STUDIO_FAILPOINTS nothing ever happens.

    STUDIO_FAILPOINTS="claim.after_commit=kill;checkpoint.before_rename=raise:ENOSPC;heartbeat.before=pause:2.5"
    STUDIO_FAILPOINTS_ONCE=/folder      # each fires once over all processes: it leaves a marker file there first

Actions: `kill` (SIGKILL of this process, which nothing can soften), `raise:` with the name of an errno, of a
built-in exception or of a dotted one, and `pause:` with seconds. Random kills rarely hit a window of a
millisecond; a named window is hit every time.
"""

from __future__ import annotations

import builtins
import errno
import logging
import os
import signal
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

POINTS: dict[str, str] = {
    "submit.before_commit": "A new job, its event and its announcement are written, not committed.",
    "submit.after_commit": "A new job is committed; nobody was told.",
    "outbox.before_send": "A message is due and locked; the broker has not been asked.",
    "outbox.after_send": "The broker has a message; its row does not say so yet.",
    "wake.received": "A worker took a wake-up from the broker; its slot has not heard of it.",
    "claim.before_commit": "A job is taken, with its attempt and lease, not committed.",
    "claim.after_commit": "A job is claimed; nothing of the attempt exists on disk.",
    "trainer.before_start": "The job's folder is ready; no trainer runs.",
    "trainer.after_start": "A trainer has just been started; nothing has been read from it.",
    "heartbeat.before": "A lease is about to be renewed.",
    "heartbeat.before_commit": "A lease is renewed, not committed.",
    "progress.before_commit": "Points and messages are written, not committed.",
    "finish.before": "The trainer has ended; the job's row does not know how.",
    "register.before_keep": "The product is in its attempt's folder.",
    "register.files_kept": "The product is in its place; no row knows it.",
    "register.before_commit": "The adapter and the job's success are written, not committed.",
    "register.after_commit": "The job has succeeded; its worker has not gone on.",
    "hand_back.before_commit": "A draining worker has put its job back, not committed.",
    "hand_back.after_commit": "A draining worker has handed its job back.",
    "retry.before_commit": "An attempt is ended and its job waits to retry, not committed.",
    "retry.after_commit": "A job waits to retry.",
    "fail.before_commit": "A job has failed for good, not committed.",
    "stop.before_commit": "A person's wish to stop is written, not committed.",
    "stop.after_commit": "A person's wish to stop is committed.",
    "cancelled.before_commit": "A stopped job is final, not committed.",
    "reap.before_commit": "A job is taken back from a lost worker, not committed.",
    "reap.after_commit": "A job is taken back from a lost worker; others may still have to be.",
    "upload.before_keep": "An upload's row is written, not committed; its bytes lie aside.",
    "upload.files_kept": "An upload's bytes are in their place; its row is not committed.",
    "upload.after_commit": "An upload is registered; its inspection is not queued.",
    "training.step": "A training step begins.",
    "training.last_step": "The last step is done and its checkpoint written; nothing is scored.",
    "training.before_package": "The adapter is scored; its folder does not exist.",
    "training.packaged": "The adapter's folder is complete; the supervisor has not been told.",
    "training.before_exit": "The supervisor was told of the product; the trainer still runs.",
    "checkpoint.begin": "A checkpoint's folder is made aside, empty.",
    "checkpoint.files_written": "A checkpoint's files are written aside, not forced to disk.",
    "checkpoint.before_manifest": "A checkpoint's files are on disk; it has no manifest.",
    "checkpoint.before_rename": "A checkpoint is complete, under its name aside.",
    "checkpoint.after_rename": "A checkpoint has its name; the folder's entry may not be on disk.",
    "checkpoint.before_remove": "A checkpoint is complete; older ones are about to be removed.",
}
"""Every failpoint by name, and what is true when it is reached."""


def kill() -> None:
    """End this process at once, as `kill -9` does."""
    os.kill(os.getpid(), signal.SIGKILL)


def _raiser(what: str) -> Callable[[], None]:
    number = getattr(errno, what, None)
    if number is not None:
        error: BaseException | type[BaseException] = OSError(number, os.strerror(number))
    elif "." in what:
        module, _, name = what.rpartition(".")
        error = getattr(import_module(module), name)
    else:
        error = getattr(builtins, what)

    def throw() -> None:
        raise error

    return throw


def _action(text: str) -> Callable[[], None]:
    verb, _, argument = text.partition(":")
    if verb == "kill" and not argument:
        return kill
    if verb == "raise":
        return _raiser(argument)
    if verb == "pause":
        seconds = float(argument)
        return lambda: time.sleep(seconds)
    raise ValueError(f'There is no failpoint action "{text}": use kill, raise:NAME or pause:SECONDS.')


_actions: dict[str, Callable[[], None]] = {}
_once: Path | None = None


def switch_on(text: str, once: str | Path | None = None) -> None:
    """Arm failpoints from "name=action;name=action"; the empty text disarms all.

    Args:
        text: as STUDIO_FAILPOINTS.
        once: a folder in which each leaves a marker file when it fires, and does not fire when that is there.

    Raises:
        ValueError: there is no such failpoint or action.
    """
    global _once
    wanted = dict(part.split("=", 1) for part in text.split(";") if part.strip())
    if unknown := wanted.keys() - POINTS.keys():
        raise ValueError(f"There is no failpoint {', '.join(sorted(unknown))}. They are: {', '.join(POINTS)}.")
    actions = {name: _action(action) for name, action in wanted.items()}
    _actions.clear()
    _actions.update(actions)
    _once = Path(once) if once else None


def failpoint(name: str) -> None:
    """Fail here if a test asked for it. Costs one look at an empty dict otherwise."""
    if _actions:
        _fire(name)


def _fire(name: str) -> None:
    assert name in POINTS, f"{name} is not in the list of failpoints"
    action = _actions.get(name)
    if action is None:
        return
    if _once is not None:
        try:
            # Before the action, which may leave no time for anything after it.
            os.close(os.open(_once / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            return
    action()


switch_on(os.environ.get("STUDIO_FAILPOINTS", ""), os.environ.get("STUDIO_FAILPOINTS_ONCE"))
if _actions:
    logging.getLogger(__name__).warning("STUDIO_FAILPOINTS is set, for tests only: this process fails on purpose.")

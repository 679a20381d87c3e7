"""The task files (YAML) of the evaluation harness in a folder, read without running anything that they name.

The layout is that of lm-eval 0.4's `--include_path`: any number of files, each a task or a group, with `include` of
others. Data files that they name are sought from the folder itself.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from workers.errors import ExplainedError

INSTALL = "pip install -c docker/constraints.txt '.[worker,harness]'"
MAX_FILES = 3000
"""Task files of a folder: the harness's own collection has more, of which nobody means all."""
MAX_COUNTED_BYTES = 64 * 2**20
"""A larger data file is not read through only to say how many rows it has."""
_IGNORED = {"__pycache__", ".ipynb_checkpoints"}
# Builders of the datasets library that unpickle what they read.
_UNPICKLING = {"pandas", "webdataset"}


class HarnessError(ExplainedError):
    """The evaluation harness is not installed, or cannot run what was asked."""

    code = "harness"


@dataclass(frozen=True)
class TaskInfo:
    """A task, or a group of tasks, as its file describes it."""

    name: str
    description: str
    files: tuple[Path, ...]
    """The file that defines it and all that this includes."""
    tasks: tuple[str, ...] = ()
    """Of a group: what it consists of."""
    num_rows: int | None = None
    """Rows that are scored; None where that cannot be told from the file."""
    code: str = ""
    """The first thing in it that runs code of the folder; empty without any."""

    @property
    def is_group(self) -> bool:
        return bool(self.tasks)


class _Function(str):
    """A function that a file names: never imported here."""

    __slots__ = ()


class _Loader(yaml.SafeLoader):
    """Plain YAML, and the harness's tag for functions."""


def _construct_function(loader: yaml.SafeLoader, node: yaml.Node) -> _Function:
    return _Function(loader.construct_scalar(node) if isinstance(node, yaml.ScalarNode) else "")


_Loader.add_constructor("!function", _construct_function)


def is_installed() -> bool:
    """Whether the harness can be imported by this Python; nothing of it is imported to find out."""
    return importlib.util.find_spec("lm_eval") is not None


def read_tasks(folder: Path) -> dict[str, TaskInfo]:
    """The tasks and groups that the files of a folder define, by name. A file that is no task file is passed over.

    Raises:
        HarnessError: there is no such folder, or it has too many files.
    """
    if not folder.is_dir():
        raise HarnessError(f"There is no folder of tasks at {folder}.", next_step="Make it, or name another one.")
    paths = sorted(path for path in folder.rglob("*.yaml") if not _IGNORED.intersection(path.parts))
    if len(paths) > MAX_FILES:
        raise HarnessError(
            f"The folder {folder} has {len(paths):,} task files; {MAX_FILES:,} are read at most.",
            next_step="Copy those that are wanted into a folder of their own.",
        )
    found: dict[str, TaskInfo] = {}
    for path in paths:
        try:
            info = _info(folder, path)
        except (HarnessError, OSError):
            continue  # an include that is none, a half-written file: it defines nothing that could be chosen
        if info is not None:
            found.setdefault(info.name, info)
    return found


def choose_tasks(folder: Path, names: Sequence[str], *, may_run_code: bool) -> list[TaskInfo]:
    """The tasks and groups of these names, checked before anything of them runs.

    Raises:
        HarnessError: a name that no file defines, or a task that runs code where that is not allowed.
    """
    known = read_tasks(folder)
    for name in names:
        if name not in known:
            listed = ", ".join(list(known)[:40]) or "none, the folder has no task files"
            raise HarnessError(
                f"No file in {folder} defines the task {name}.", next_step=f"Choose among: {listed}.", field="tasks"
            )
    for info in _with_members([known[name] for name in names], known):
        if info.code and not may_run_code:
            raise HarnessError(
                f"The task {info.name} runs code: {info.code}.",
                next_step="Choose another one, or ask whoever runs the studio to allow code of tasks "
                "(STUDIO_TASKS_MAY_RUN_CODE) after reading it.",
                field="tasks",
            )
    return [known[name] for name in names]


def definitions_sha256(folder: Path, names: Sequence[str]) -> str:
    """Digest of the files that define these tasks, with all that they include and, of groups, consist of."""
    known = read_tasks(folder)
    infos = _with_members([known[name] for name in names if name in known], known)
    files = sorted({path for info in infos for path in info.files})
    listed = [[path.relative_to(folder.resolve()).as_posix(), hashlib.sha256(path.read_bytes()).hexdigest()]
              for path in files]  # fmt: skip
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def _with_members(infos: Sequence[TaskInfo], known: dict[str, TaskInfo]) -> list[TaskInfo]:
    """These and, of groups, what they consist of, each once."""
    found: dict[str, TaskInfo] = {}
    waiting = list(infos)
    while waiting:
        info = waiting.pop(0)
        if info.name not in found:
            found[info.name] = info
            waiting += [known[name] for name in info.tasks if name in known]
    return list(found.values())


def _info(folder: Path, path: Path) -> TaskInfo | None:
    files: list[Path] = []
    config = _read(folder.resolve(), path.resolve(), files)
    name = config.get("group", config.get("task"))
    if not isinstance(name, str):
        return None
    members: tuple[str, ...] = ()
    if "group" in config:
        listed = config.get("task")
        members = tuple(_member(one) for one in (listed if isinstance(listed, list) else [listed]) if _member(one))
    return TaskInfo(
        name=name,
        description=_description(config, path),
        files=tuple(files),
        tasks=members,
        num_rows=None if members else _num_rows(folder, config),
        code=next(_code(config), ""),
    )


def _read(folder: Path, path: Path, files: list[Path]) -> dict[str, Any]:
    """A file with what it includes, its own keys winning as in the harness; `files` takes every path that was read."""
    if path in files:
        raise HarnessError(f"{path.name} includes itself.")
    if not path.is_relative_to(folder):
        raise HarnessError(f"{path.name} lies outside the folder of tasks.", next_step="Copy it into the folder.")
    files.append(path)
    stat = path.stat()
    config = dict(_parsed(path, stat.st_mtime_ns, stat.st_size))
    merged: dict[str, Any] = {}
    included = config.pop("include", [])
    for one in included if isinstance(included, list) else [included]:
        merged |= _read(folder, (path.parent / str(one)).resolve(), files)
    return merged | config


@lru_cache(maxsize=2 * MAX_FILES)
def _parsed(path: Path, mtime_ns: int, size: int) -> dict[str, Any]:
    """A file's own keys, read anew when it changes."""
    del mtime_ns, size  # parts of the cache's key
    try:
        config = yaml.load(path.read_bytes(), Loader=_Loader)  # noqa: S506 - safe YAML and one tag that makes a string
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise HarnessError(f"{path.name} is no task file: {error}.") from error
    if not isinstance(config, dict):
        raise HarnessError(f"{path.name} is no task file.")
    return config


def _member(value: Any) -> str:
    """The name of what a group lists: a name, or a task with changes."""
    name = value.get("task", value.get("group")) if isinstance(value, dict) else value
    return name if isinstance(name, str) else ""


def _description(config: dict[str, Any], path: Path) -> str:
    """What the file says that it is: its metadata, its alias, or the comment that it begins with."""
    metadata = config.get("metadata")
    said = metadata.get("description") if isinstance(metadata, dict) else None
    said = said or config.get("task_alias") or config.get("group_alias")
    if said is None:
        first = path.read_text("utf-8", errors="replace").lstrip().splitlines()[:1]
        said = first[0].removeprefix("#").strip() if first and first[0].startswith("#") else ""
    return str(said)[:200]


def _code(config: Any, where: str = "") -> Iterator[str]:
    """Everything in a task that runs code of somebody's own."""
    if isinstance(config, _Function):
        yield f"{where} calls the function {config}"
    elif isinstance(config, dict):
        if not where and "class" in config:
            yield "it is a class of its own"
        if not where and config.get("unsafe_code"):
            yield "it runs what the model writes"
        if not where and config.get("dataset_path") in _UNPICKLING:
            yield f"its dataset_path {config['dataset_path']} unpickles files"
        for key, value in config.items():
            yield from _code(value, where or str(key))
    elif isinstance(config, list):
        for one in config:
            yield from _code(one, where)


def _num_rows(folder: Path, config: dict[str, Any]) -> int | None:
    keywords = config.get("dataset_kwargs")
    named = keywords.get("data_files") if isinstance(keywords, dict) else None
    if isinstance(named, dict):
        named = named.get(config.get("test_split") or config.get("validation_split") or "")
    paths = named if isinstance(named, list) else [named]
    counted = [_count(folder / one) if isinstance(one, str) else None for one in paths]
    return sum(one for one in counted if one is not None) if counted and None not in counted else None


def _count(path: Path) -> int | None:
    try:
        stat = path.stat()
        return _counted(path, stat.st_mtime_ns, stat.st_size) if stat.st_size <= MAX_COUNTED_BYTES else None
    except (OSError, ValueError, RecursionError, csv.Error):
        return None


@lru_cache(maxsize=2 * MAX_FILES)
def _counted(path: Path, mtime_ns: int, size: int) -> int | None:
    del mtime_ns, size
    if path.suffix == ".csv":
        with path.open(encoding="utf-8", newline="") as file:
            return max(0, sum(1 for _ in csv.reader(file)) - 1)
    if path.suffix not in {".json", ".jsonl"}:
        return None
    text = path.read_text("utf-8")
    if text.lstrip()[:1] == "[":
        return len(json.loads(text))
    return sum(bool(line.strip()) for line in text.splitlines())

"""One split of a dataset of the Hugging Face Hub as JSON Lines: `python -m workers.hub_dataset ID --out FILE ...`.

The revision is resolved to its commit first, the files of that commit alone are downloaded below the output's folder,
and rows are written one by one. Nothing of the repository is ever run: a dataset that is a script is refused. Writes
one JSON object per line to standard output: "resolved", "progress", and "done" or "refused".
"""

from __future__ import annotations

import argparse
import base64
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import orjson

from workers.errors import DatasetError, ExplainedError
from workers.limited import PROGRESS_SECONDS, emit, limit_memory

# Generous, for Arrow maps far more than it uses; a file that unfolds without end still ends here.
MEMORY_BYTES = 16 * 1024**3
# What a dataset's rows are kept in, and the card that says which files are which split.
PATTERNS = [f"**{ending}" for ending in (
    ".parquet", ".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".csv", ".csv.gz", ".tsv", ".txt", ".arrow",
)]  # fmt: skip
_PRIVATE = "HF_TOKEN must be set where the studio's workers run to fetch what is not for everybody."


def export_rows(
    hub_id: str, *, revision: str, config: str, split: str, out: Path, max_bytes: int, endpoint: str | None = None
) -> dict[str, Any]:
    """Write a split's rows to a file.

    Args:
        hub_id: "owner/name".
        revision: a branch, tag or commit; empty: the main branch.
        config: one of the dataset's configurations; empty: its only or default one.
        split: "train", for example.
        out: the file; what is downloaded lies beside it meanwhile.
        max_bytes: of what is downloaded and of the file.
        endpoint: the Hub's address; None: huggingface.co, or HF_ENDPOINT.

    Returns:
        {"revision": the commit, "num_rows"}.

    Raises:
        DatasetError: with the code hub_unreachable, hub_not_found, hub_gated, hub_script, hub_split or too_large.
    """
    commit, num_bytes, names = _resolve(hub_id, revision, endpoint)
    _refuse_scripts(hub_id, names)
    if num_bytes > max_bytes:
        raise _refusal("too_large", f"{hub_id} has {num_bytes / 1e9:.1f} GB; up to {max_bytes / 1e9:.1f} GB are taken.")
    emit("resolved", revision=commit)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix="hub-") as folder:
        _download(hub_id, commit, Path(folder), endpoint)
        num_rows = _write(_rows(hub_id, Path(folder), config, split), out, max_bytes)
    return {"revision": commit, "num_rows": num_rows}


def _refusal(code: str, message: str, next_step: str = "") -> DatasetError:
    error = DatasetError(message, next_step=next_step)
    error.code = code
    return error


def _resolve(hub_id: str, revision: str, endpoint: str | None) -> tuple[str, int, list[str]]:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    api = HfApi(endpoint=endpoint)
    try:
        found = api.dataset_info(hub_id, revision=revision or None, files_metadata=True, timeout=30)
    except GatedRepoError as error:
        gated = f"{hub_id} is gated: the Hub gives it only to who has accepted its terms."
        raise _refusal("hub_gated", gated, f"Accept them on the Hub. {_PRIVATE}") from error
    except RevisionNotFoundError as error:
        raise _refusal("hub_not_found", f'{hub_id} has no revision "{revision}".', "Check the spelling.") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        missing = f'There is no dataset "{hub_id}" on the Hub, or it is private.'
        raise _refusal("hub_not_found", missing, f"Check the spelling. {_PRIVATE}") from error
    except HfHubHTTPError as error:
        raise _refusal("hub_unreachable", f"The Hub answered with an error: {str(error).splitlines()[0][:200]}",
                       "Try again later.") from error  # fmt: skip
    except Exception as error:
        raise _unreachable(error) from error
    files = found.siblings or []
    return str(found.sha), sum(file.size or 0 for file in files), [file.rfilename for file in files]


def _unreachable(error: Exception) -> DatasetError:
    """For a network that is away, which the libraries below have many names for; any other error is raised again."""
    if type(error).__module__.partition(".")[0] not in {"httpx", "httpx2", "httpcore", "httpcore2", "huggingface_hub"}:
        raise error
    return _refusal("hub_unreachable", f"The Hub does not answer ({type(error).__name__}).",
                    "Check that the studio's workers reach the internet, or upload the file.")  # fmt: skip


def _refuse_scripts(hub_id: str, names: list[str]) -> None:
    script = f"{hub_id.rpartition('/')[2]}.py"
    if script in names:
        raise _refusal("hub_script", f"{hub_id} is made by a program of its own ({script}), which is never run here.",
                       "Look for the same data as Parquet, or export the rows and upload them.")  # fmt: skip


def _download(hub_id: str, commit: str, folder: Path, endpoint: str | None) -> None:
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(
            hub_id, repo_type="dataset", revision=commit, local_dir=folder, endpoint=endpoint, max_workers=2,
            allow_patterns=["README.md", *PATTERNS],
        )  # fmt: skip
    except Exception as error:
        raise _unreachable(error) from error


def _rows(hub_id: str, folder: Path, config: str, split: str) -> Iterable[dict[str, Any]]:
    import datasets

    datasets.disable_progress_bars()
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    try:
        rows: Iterable[dict[str, Any]] = datasets.load_dataset(
            str(folder), name=config or None, split=split, streaming=True, cache_dir=str(folder / ".cache")
        )
    except ValueError as error:
        # An unknown split or configuration; the sentence names those that there are.
        raise _refusal("hub_split", f"{hub_id}: {str(error).splitlines()[0][:300]}", "Choose one of those.") from error
    except Exception as error:  # whatever it is, the files are not what the library reads
        raise _refusal("hub_unreadable", f"The files of {hub_id} cannot be read as rows: {str(error)[:200]}",
                       "Export the rows and upload them.") from error  # fmt: skip
    return rows


def _write(rows: Iterable[dict[str, Any]], out: Path, max_bytes: int) -> int:
    num_rows, num_bytes, told_at = 0, 0, 0.0
    with out.open("wb") as file:
        for row in rows:
            line = orjson.dumps(_plain(row), option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE)
            num_rows, num_bytes = num_rows + 1, num_bytes + len(line)
            if num_bytes > max_bytes:
                raise _refusal("too_large", f"The rows are more than the {max_bytes / 1e9:.1f} GB that are accepted.")
            file.write(line)
            if time.monotonic() - told_at > PROGRESS_SECONDS:
                emit("progress", num_rows=num_rows, num_bytes=num_bytes)
                told_at = time.monotonic()
    return num_rows


def _plain(value: Any) -> Any:
    """A row as JSON can have it: bytes as base64, what else it lacks as text."""
    match value:
        case dict():
            return {str(key): _plain(one) for key, one in value.items()}
        case list() | tuple():
            return [_plain(one) for one in value]
        case bytes():
            return base64.b64encode(value).decode()
        case str() | int() | float() | bool() | None:
            return value
    return str(value)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("hub_id")
    for name in ("revision", "config"):
        parser.add_argument(f"--{name}", default="")
    parser.add_argument("--split", default="train")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--max-bytes", type=int, required=True)
    parser.add_argument("--endpoint", default=None)
    options = parser.parse_args(arguments)
    limit_memory(MEMORY_BYTES)
    try:
        emit("done", **export_rows(**vars(options)))
    except ExplainedError as error:
        emit("refused", code=error.code, message=error.message, next_step=error.next_step)
    except ModuleNotFoundError as error:
        emit("refused", code="hub_unavailable", message=f"The worker for short tasks lacks the library {error.name}.",
             next_step="Whoever runs the studio installs peft-studio[worker] there.")  # fmt: skip
    except OSError as error:
        emit("refused", code="storage", message=f"The disk failed: {os.strerror(error.errno or 0)}.", next_step="")
    return 0


if __name__ == "__main__":
    sys.exit(main())

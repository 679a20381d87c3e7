"""An adapter merged into its base model: one folder that runs without peft, as fast as the base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from workers import adapters, base_models
from workers.base_folders import read_base_folder
from workers.checkpoints import disk_error
from workers.errors import ExplainedError
from workers.methods import method_of_type
from workers.peft_folders import CONFIG_FILE
from workers.recipe import Precision
from workers.rendering import read_chat_template

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "tokenizer.model", "chat_template.jinja",
)  # fmt: skip
"""Copied as they are: transformers builds some families' tokenizers anew when it saves them."""


class MergeError(ExplainedError):
    """An adapter cannot be merged, or not like this."""

    code = "cannot_merge"


def merge(
    base_folder: Path,
    adapter_folder: Path,
    out: Path,
    *,
    precision: Precision = "float32",
    device: torch.device | str = "cpu",
) -> Path:
    """A model folder in `out`, complete or not there, that answers as the adapter does on an unquantised base.

    The base is loaded anew at `precision`, whatever it was trained at. An adapter that was trained on 4-bit weights
    (QLoRA) meets the original ones, so that its answers differ a little from those that were scored. float32 merges
    without rounding; bfloat16 takes half the room.

    Raises:
        MergeError: the adapter's method has nothing to merge, the precision is quantised, the adapter belongs to
            other weights, or `out` exists.
        BaseModelError: the base cannot be loaded, or the adapter does not fit it.
    """
    if precision not in ("float32", "bfloat16"):
        raise MergeError(
            f"Merged into {precision} weights, most of the adapter would be rounded away.",
            next_step="Merge in float32 or bfloat16, and quantise the merged model.",
            field="precision",
        )
    _refuse_unmergeable(adapter_folder)
    if out.exists():
        raise MergeError(f"{out.name} exists already.", next_step="Choose a folder that does not exist.", field="out")
    base = read_base_folder(base_folder)
    _refuse_other_base(adapter_folder, base.revision)
    loaded = base_models.load(base_folder, precision, device, checked=True)
    adapted = adapters.load(loaded.model, adapter_folder)
    try:
        merged = adapted.merge_and_unload(safe_merge=True)
    except ValueError as error:  # its own word for factors that are not finite
        raise MergeError(
            "The adapter holds values that are not finite numbers.", next_step="Train it again, more slowly."
        ) from error
    aside = out.with_name(f".tmp-{out.name}")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        merged.save_pretrained(aside)
        for name in TOKENIZER_FILES:
            if (base_folder / name).is_file():
                shutil.copyfile(base_folder / name, aside / name)
        if read_chat_template(base_folder) is None and (adapter_folder / "chat_template.jinja").is_file():
            shutil.copyfile(adapter_folder / "chat_template.jinja", aside / "chat_template.jinja")
        aside.replace(out)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise disk_error(error, "the merged model") from error
    return out


def _refuse_unmergeable(adapter_folder: Path) -> None:
    try:
        peft_type = str(json.loads((adapter_folder / CONFIG_FILE).read_text("utf-8"))["peft_type"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MergeError(
            f"{adapter_folder.name} has no readable {CONFIG_FILE}, so it is no adapter.",
            next_step="Give the folder of a finished adapter.",
        ) from error
    method = method_of_type(peft_type)
    if method is None:
        raise MergeError(
            f"No method here saves adapters of type {peft_type}.", next_step="Merge it with the program that made it."
        )
    if not method.can_merge:
        raise MergeError(
            f"{method.label} does not change the base's weights, so there is nothing to merge into them.",
            next_step="Serve the base with the adapter beside it, or train LoRA, which merges.",
        )


def _refuse_other_base(adapter_folder: Path, revision: str) -> None:
    """Adapters of this studio say which weights they were trained on; others are taken on trust."""
    try:
        history = json.loads((adapter_folder / "studio.json").read_text("utf-8"))
        trained_on = str(history["provenance"]["base_revision"])
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MergeError("The adapter's studio.json cannot be read.", next_step="Take the adapter anew.") from error
    if trained_on != revision:
        raise MergeError(
            f"The adapter was trained on other weights: the digest of its base's files begins with {trained_on[:12]}, "
            f"this base's with {revision[:12]}.",
            next_step="Choose the base model that the adapter's card names.",
        )

"""The finished product on disk: a folder that plain transformers and peft load, with its scores and its history.

Weights are stored as they were trained, in float32: rounded to bfloat16 they would give other logits than those that
were scored. Programs that serve in 16 bits round them on loading.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from workers.base_folders import hub_name
from workers.device_errors import is_gpu_failure, is_out_of_memory
from workers.digests import CHECKSUM_FILE, file_sha256
from workers.errors import BaseModelError
from workers.methods import get_method, method_of_type
from workers.model_card import write_card
from workers.peft_folders import CONFIG_FILE, reload_with_peft
from workers.recipe import Recipe
from workers.rendering import read_chat_template
from workers.results import Result

MAX_PROBE_TOKENS = 256
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
"""Largest difference of logits, as a share of the largest logit, that the order of additions explains."""


def save(model: Any, folder: Path, *, recipe: Recipe, hub_id: str, commit: str = "") -> None:
    """Writes what the recipe's method has trained into `folder`, which is made when missing.

    The base is named by `hub_id`, or by the recipe's name for it, never by a path. A method that peft does not know
    lays the module beside it that teaches it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    method = get_method(recipe.method)
    method.save(model, folder, base=hub_id or recipe.base_model.name, commit=commit)
    if method.companion_file is not None:
        shutil.copyfile(method.companion_file, folder / f"{method.companion_module}.py")


def finish(
    model: Any,
    folder: Path,
    *,
    recipe: Recipe,
    result: Result,
    base_model_folder: Path,
    template: str,
    hub_id: str = "",
    licence: str = "",
    probe_ids: Sequence[Sequence[int]] = (),
) -> Result:
    """Makes `folder` the finished product: saves what was trained, proves it, writes card, scores and checksums.

    The proof loads the saved folder as other programs do, with plain peft onto the bare base or, for a whole model,
    with plain transformers, and compares logits with those before. Afterwards `model` can no longer be used.

    Args:
        template: the chat template that the rows were rendered with; kept in the folder when the base has none.
        probe_ids: token ids of a few prompts; without any, nothing is proved and `verified` stays None.

    Gives the result with `provenance.verified`, `max_logit_difference` and `num_adapter_bytes` filled in.
    """
    _, commit = hub_name(base_model_folder)
    save(model, folder, recipe=recipe, hub_id=hub_id, commit=commit)
    weights = folder.glob("*.safetensors")
    provenance: dict[str, Any] = {"num_adapter_bytes": sum(path.stat().st_size for path in weights)}
    if probe_ids:
        verified, difference = prove(model, folder, probe_ids, reload=get_method(recipe.method).reload)
        provenance |= {"verified": verified, "max_logit_difference": difference}
    result = result.model_copy(update={"provenance": result.provenance.model_copy(update=provenance)})
    if read_chat_template(base_model_folder) is None:
        # The base has none, so whoever runs the adapter needs the one that it was trained with.
        (folder / "chat_template.jinja").write_text(template, "utf-8")
    (folder / "eval").mkdir(exist_ok=True)
    scores = [score.model_dump(mode="json") for score in result.scores]
    (folder / "eval" / "scores.json").write_text(json.dumps(scores, indent=2) + "\n", "utf-8")
    for name, records in (("samples", result.samples), ("held_out", result.held_out)):
        lines = [json.dumps(record.model_dump(mode="json"), ensure_ascii=False) + "\n" for record in records]
        (folder / "eval" / f"{name}.jsonl").write_text("".join(lines), "utf-8", errors="replace")
    history = {"recipe": _portable(recipe), "provenance": result.provenance.model_dump(mode="json")}
    (folder / "studio.json").write_text(json.dumps(history, indent=2, ensure_ascii=False) + "\n", "utf-8")
    write_card(folder, recipe, result, hub_id=hub_id, licence=licence, commit=commit)
    result.write(folder)
    write_checksums(folder)
    return result


def prove(
    model: Any,
    folder: Path,
    probe_ids: Sequence[Sequence[int]],
    *,
    reload: Callable[[Any, Path], Any] = reload_with_peft,
) -> tuple[bool, float]:
    """Whether the saved folder, reloaded, gives the model's logits again, and by how much they differ at most.

    Takes the adapter off `model`; the base stays usable, with the saved adapter on it.
    """
    before = [_logits(model, ids) for ids in probe_ids]
    loaded = reload(model, folder)
    # peft gives logits of virtual tokens too, before those of the prompt.
    after = [_logits(loaded, ids)[-len(one) :] for ids, one in zip(probe_ids, before, strict=True)]
    difference = max(float((one - other).abs().max()) for one, other in zip(before, after, strict=True))
    largest = max(1.0, *(float(one.abs().max()) for one in before))
    tolerance = TOLERANCES.get(loaded.dtype, TOLERANCES[torch.bfloat16])
    return difference <= tolerance * largest, difference


def load(model: Any, folder: Path) -> Any:
    """The base with the saved adapter, or the whole model that was made of it, not trainable.

    Raises:
        BaseModelError: what was saved and the base do not fit.
    """
    try:
        is_whole = not (folder / CONFIG_FILE).exists() and (folder / "config.json").exists()
        peft_type = "" if is_whole else json.loads((folder / CONFIG_FILE).read_text("utf-8"))["peft_type"]
        method = method_of_type(peft_type)
        if method is None:
            return PeftModel.from_pretrained(model, str(folder), is_trainable=False).eval()
        return method.load(model, folder).eval()
    except (OSError, KeyError, ValueError, RuntimeError, TypeError) as error:
        if is_out_of_memory(error) or is_gpu_failure(error):
            raise
        raise BaseModelError(
            f"The adapter does not fit this base model: {str(error).strip().splitlines()[0]}",
            next_step="Load it onto the base model that its adapter_config.json names.",
        ) from error


def write_checksums(folder: Path) -> None:
    """SHA256SUMS over every other file of the folder, as `sha256sum -c` reads it."""
    lines = [
        f"{file_sha256(path)}  {path.relative_to(folder).as_posix()}\n"
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != CHECKSUM_FILE
    ]
    (folder / CHECKSUM_FILE).write_text("".join(lines), "utf-8")


def _logits(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """Logits in float32 of the last tokens of a prompt, on the CPU."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    with torch.no_grad():
        found = model(input_ids=torch.tensor([list(ids)[-MAX_PROBE_TOKENS:]], device=device)).logits[0].float().cpu()
    model.train(was_training)
    return found


def _portable(recipe: Recipe) -> dict[str, Any]:
    """The recipe without the paths of the machine that ran it."""
    value = recipe.to_dict()
    value["base_model"]["path"] = None
    value["dataset"]["path"] = None
    if "split" in value["dataset"]:
        value["dataset"]["split"]["path"] = None
    return value

"""The finished product on disk: a folder that plain transformers and peft load, with its scores and its history.

Weights are stored as they were trained, in float32: rounded to bfloat16 they would give other logits than those that
were scored. Programs that serve in 16 bits round them on loading.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel

from workers.base_folders import hub_name
from workers.errors import BaseModelError
from workers.methods import get_method, method_of_type
from workers.recipe import Recipe
from workers.rendering import read_chat_template
from workers.results import Provenance, Result

CONFIG_FILE = "adapter_config.json"
CHECKSUM_FILE = "SHA256SUMS"
MAX_PROBE_TOKENS = 256
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
"""Largest difference of logits, as a share of the largest logit, that the order of additions explains."""

# Kept in adapter_config.json whatever their value: what programs that load LoRA look for.
_CORE_KEYS = frozenset(
    {
        "peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "r", "lora_alpha",
        "lora_dropout", "target_modules", "modules_to_save", "bias", "use_dora", "use_rslora", "fan_in_fan_out",
        "rank_pattern", "alpha_pattern", "num_virtual_tokens", "token_dim", "num_attention_heads", "num_layers",
        "num_transformer_submodules", "encoder_hidden_size", "prefix_projection",
    }
)  # fmt: skip


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


def save_with_peft(model: Any, folder: Path, *, base: str, commit: str) -> None:
    """Writes adapter_config.json and adapter_model.safetensors.

    The configuration's `revision` is the hub's commit where that is known, else null: loaders hand it to the hub,
    which does not know our digests. Keys that only repeat peft's defaults are left out, so that older releases of
    peft can read it.
    """
    # Without save_embedding_layers=False peft asks the model hub whether the vocabulary has grown.
    model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
    # peft's card names the base by its local path.
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / CONFIG_FILE
    config = json.loads(path.read_text("utf-8"))
    config["base_model_name_or_path"] = base
    config["revision"] = commit or None
    if isinstance(config.get("target_modules"), list):
        config["target_modules"] = sorted(config["target_modules"])
    defaults = _defaults(model.active_peft_config)
    kept = {
        key: value
        for key, value in config.items()
        if key in _CORE_KEYS or key not in defaults or value != defaults[key]
    }
    path.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", "utf-8")


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
    (folder / "README.md").write_text(_card(recipe, result, hub_id, licence, commit), "utf-8")
    result.write(folder)
    write_checksums(folder)
    return result


def reload_with_peft(model: Any, folder: Path) -> Any:
    """The saved adapter in plain peft, on the base that `model` was made of."""
    bare = model.unload()
    # peft refuses to load a prefix onto a base that has it switched on.
    bare.gradient_checkpointing_disable()
    bare.requires_grad_(False)
    return PeftModel.from_pretrained(bare, str(folder), is_trainable=False)


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
        raise BaseModelError(
            f"The adapter does not fit this base model: {str(error).strip().splitlines()[0]}",
            next_step="Load it onto the base model that its adapter_config.json names.",
        ) from error


def write_checksums(folder: Path) -> None:
    """SHA256SUMS over every other file of the folder, as `sha256sum -c` reads it."""
    lines = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != CHECKSUM_FILE:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            lines.append(f"{digest}  {path.relative_to(folder).as_posix()}\n")
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


def _defaults(config: PeftConfig) -> dict[str, Any]:
    """Values that this kind of configuration has when nothing is said."""
    found = {}
    for field in dataclasses.fields(config):
        if field.default is not dataclasses.MISSING:
            found[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            made: Any = field.default_factory()
            found[field.name] = (
                dataclasses.asdict(made) if dataclasses.is_dataclass(made) and not isinstance(made, type) else made
            )
    return found


def _portable(recipe: Recipe) -> dict[str, Any]:
    """The recipe without the paths of the machine that ran it."""
    value = recipe.to_dict()
    value["base_model"]["path"] = None
    value["dataset"]["path"] = None
    return value


# --- the card ---------------------------------------------------------------------------------------------------


def _card(recipe: Recipe, result: Result, hub_id: str, licence: str, commit: str) -> str:
    """README.md as model hubs read it. Every string in the front matter is JSON, which YAML contains."""
    base = hub_id or recipe.base_model.name
    method = get_method(recipe.method)
    product = method.product
    quoted = json.dumps
    tags = [recipe.method, recipe.objective, "peft-studio", f"base_model:{product.relation}:{base}"]
    front = [
        "---",
        f"base_model: {quoted(base)}",
        f"base_model_relation: {product.relation}",
        f"library_name: {product.library}",
        "pipeline_tag: text-generation",
        *([f"license: {quoted(licence)}"] if licence else []),
        f"tags: {quoted(tags)}",
        f"metrics: {quoted([score.evaluation for score in result.scores])}",
    ]
    if result.scores:
        front += [
            "model-index:",
            f"- name: {quoted(recipe.name)}",
            "  results:",
            "  - task: {type: text-generation, name: Text Generation}",
            f"    dataset: {{type: {quoted(recipe.dataset.name)}, name: {quoted(recipe.dataset.name + ' (held-out)')}, "
            f"split: held_out, revision: {quoted(recipe.dataset.sha256)}}}",
            "    metrics:",
        ]
        front += [
            f"    - {{type: {score.evaluation}, name: {quoted(score.label)}, value: {score.value:.6g}, args: "
            f"{{n: {score.num_rows}, baseline: {score.base_value:.6g}, ci95: [{score.low:.6g}, {score.high:.6g}]}}}}"
            for score in result.scores
        ]
    front.append("---")
    body = [
        "",
        f"# {_one_line(recipe.name)}",
        "",
        f"{product.described.format(label=method.label, base=f'`{base}`')}, trained on "
        f"{_one_line(recipe.dataset.name)} "
        f"({result.provenance.num_train_rows} rows, {result.provenance.num_steps} steps, "
        f"{result.num_trainable} trained parameters). {method.source}.",
        "",
        *_score_table(result, product.noun),
        "## Use",
        "",
        "```python",
        *([f"import {method.companion_module}  # lies in this folder"] if method.companion_module else []),
        *_USE[product.library](base, commit),
        "```",
        "",
        f"Loads in: {', '.join(method.runs_in)}.",
        "",
        "## How it was made",
        "",
        f"- base precision: {recipe.precision}; learning rate: {recipe.training.learning_rate}; "
        f"batch size: {recipe.training.batch_size}; epochs: {result.provenance.epochs:.3g}",
        f"- digest of the base's files: `{result.provenance.base_revision}`",
        f"- digest of the dataset: `{result.provenance.dataset_sha256}`",
        f"- recipe, versions and device: `studio.json`; answers of base and {product.noun}: `eval/samples.jsonl`",
    ]
    body += _choice_lines(recipe, result.provenance)
    if result.stopped_at_step is not None:
        body.append(f"- training was stopped by a person at step {result.stopped_at_step}")
    if result.provenance.verified is not None:
        outcome = "gives the same logits" if result.provenance.verified else "does NOT give the same logits"
        body.append(
            f"- this folder, loaded in plain {product.library}, {outcome} as in training "
            f"(largest difference {result.provenance.max_logit_difference:.2g})"
        )
    return "\n".join([*front, *body]) + "\n"


def _choice_lines(recipe: Recipe, provenance: Provenance) -> list[str]:
    """What was chosen on validation rows, for the card."""
    found = []
    if provenance.early_stopped_at_step is not None:
        found.append(
            f"- early stopping ended training at step {provenance.early_stopped_at_step}, after "
            f"{recipe.training.early_stopping_patience} validations without improvement"
        )
    if provenance.best_value is not None and recipe.training.keep_best == "best":
        found.append(
            f"- the adapter has the weights of step {provenance.adapter_step or provenance.num_steps} of "
            f"{provenance.num_steps}, the best validated one: {provenance.best_by} {provenance.best_value:.4f}"
        )
    if found or provenance.num_validation_rows:
        found.append(
            f"- validation used {provenance.num_validation_rows} held-out rows of its own; the scores above do not"
            " use them"
        )
    return found


def _use_with_peft(base: str, commit: str) -> list[str]:
    pinned = f", revision={json.dumps(commit)}" if commit else ""
    return [
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"base = AutoModelForCausalLM.from_pretrained({json.dumps(base)}{pinned})",
        'model = PeftModel.from_pretrained(base, ".")',
        f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(base)})",
    ]


def _use_with_transformers(base: str, commit: str) -> list[str]:
    return [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained(".")',
        'tokenizer = AutoTokenizer.from_pretrained(".")',
    ]


_USE = {"peft": _use_with_peft, "transformers": _use_with_transformers}
"""Lines that load the folder from within, by the library that does so."""


def _score_table(result: Result, noun: str) -> list[str]:
    if not result.scores:
        return []
    rows = [
        f"| {score.label} ({'higher' if score.higher_is_better else 'lower'} is better) | {score.base_value:.4f} | "
        f"{score.value:.4f} [{score.low:.4f}, {score.high:.4f}] | {score.difference:+.4f} "
        f"[{score.difference_low:+.4f}, {score.difference_high:+.4f}] | {score.num_rows} |"
        for score in result.scores
    ]
    return [
        "On held-out rows, with 95 % intervals; the difference is paired by row:",
        "",
        f"| measure | base | {noun} | difference | rows |",
        "| --- | --- | --- | --- | --- |",
        *rows,
        "",
    ]


def _one_line(text: str) -> str:
    return " ".join(text.split())

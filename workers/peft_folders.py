"""Adapters as peft keeps them: adapter_config.json and adapter_model.safetensors, made fit to travel."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel

CONFIG_FILE = "adapter_config.json"

# Kept in adapter_config.json whatever their value: what programs that load LoRA look for.
_CORE_KEYS = frozenset(
    {
        "peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "r", "lora_alpha",
        "lora_dropout", "target_modules", "modules_to_save", "bias", "use_dora", "use_rslora", "fan_in_fan_out",
        "rank_pattern", "alpha_pattern", "num_virtual_tokens", "token_dim", "num_attention_heads", "num_layers",
        "num_transformer_submodules", "encoder_hidden_size", "prefix_projection",
    }
)  # fmt: skip


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


def reload_with_peft(model: Any, folder: Path) -> Any:
    """The saved adapter in plain peft, on the base that `model` was made of."""
    bare = model.unload()
    # peft refuses to load a prefix onto a base that has it switched on.
    bare.gradient_checkpointing_disable()
    bare.requires_grad_(False)
    return PeftModel.from_pretrained(bare, str(folder), is_trainable=False)


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

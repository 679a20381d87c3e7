"""Full fine-tuning: the base's own weights trained in float32, multiplied in bfloat16 where the device does so.

The product is a model folder like the base's own: plain transformers loads it, without peft and without the base.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from workers import base_models, devices
from workers.recipe import Precision

SHARD_BYTES = "2GB"
"""Largest file of weights: a zip without 64-bit records can still hold it."""
COPIED = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "chat_template.jinja", "generation_config.json",
    "LICENSE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
"""Files that go from the base's folder into the product's, bit for bit: how it reads and writes text, and under which
terms its weights may be passed on."""


class FullyTunedModel(nn.Module):
    """A base whose own weights are trained; it offers the engine what a PeftModel offers.

    Args:
        base_folder: where the untouched weights lie. They are read again when they are asked for, and never written.
        mixed_precision: multiply in bfloat16 while training, on a device that does so in hardware.
    """

    def __init__(self, model: Any, *, base_folder: Path, mixed_precision: bool) -> None:
        super().__init__()
        self.model = model
        self.base_folder = base_folder
        self._multiplies_in_bfloat16 = mixed_precision and devices.supports_bfloat16(model.device)
        self._untouched: list[Any] = []  # not an attribute of its own: it would count as a part of this module

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def dtype(self) -> torch.dtype:
        found: torch.dtype = self.model.dtype
        return found

    @property
    def device(self) -> torch.device:
        found: torch.device = self.model.device
        return found

    def autocast(self) -> AbstractContextManager[None]:
        """Mixed precision while in training mode (Micikevicius et al. 2018, section 3.1): products in bfloat16, sums
        and weights in float32. Nothing in evaluation mode.

        A weight has one product per pass, so nothing is gained by keeping its 16-bit copy until the pass ends.
        """
        enabled = self.training and self._multiplies_in_bfloat16
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled, cache_enabled=False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward; the base's own inside `disable_adapter`."""
        model = self._untouched[-1] if self._untouched else self.model
        with self.autocast():
            return model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' generate, of the model or, inside `disable_adapter`, of the base."""
        return (self._untouched[-1] if self._untouched else self.model).generate(*args, **kwargs)

    def get_base_model(self) -> Any:
        """The transformers model whose weights are trained."""
        return self.model

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Recompute activations on the way back instead of keeping them."""
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The base as its folder has it. Meanwhile memory holds both."""
        self._untouched.append(self.unload())
        try:
            yield
        finally:
            self._untouched.pop()

    def unload(self) -> Any:
        """The base as its folder has it, in float32 and not trainable."""
        return base_models.load(self.base_folder, "float32", self.device, checked=True).model


def attach_full(model: Any, *, train_embeddings: bool, mixed_precision: bool) -> FullyTunedModel:
    """The base with all its weights trainable; without `train_embeddings`, all but those of input and output tokens."""
    model.requires_grad_(True)
    if not train_embeddings:
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            module.weight.requires_grad_(False)
    return FullyTunedModel(model, base_folder=Path(model.name_or_path), mixed_precision=mixed_precision)


def save_full(tuned: FullyTunedModel, folder: Path) -> None:
    """Writes the whole model into `folder`, in float32: config.json, weights in shards, tokenizer, chat template.

    Raises:
        OSError: the disk has no room for it; nothing was written.
    """
    num_bytes = sum(parameter.numel() * parameter.element_size() for parameter in tuned.parameters())
    if shutil.disk_usage(folder).free < num_bytes:
        raise OSError(errno.ENOSPC, "No space left on device", str(folder))
    tuned.model.save_pretrained(str(folder), max_shard_size=SHARD_BYTES)
    for pattern in COPIED:
        for path in sorted(tuned.base_folder.glob(pattern)):
            shutil.copyfile(path, folder / path.name)


def reload_full(tuned: FullyTunedModel, folder: Path) -> Any:
    """The model that plain transformers makes of the saved folder."""
    return base_models.load(folder, "float32", tuned.device, checked=True).model


def load_full(model: Any, folder: Path) -> FullyTunedModel:
    """The saved model, not trainable, in the precision and on the device of the base that it was made from."""
    precision: Precision = "bfloat16" if model.dtype == torch.bfloat16 else "float32"
    saved = base_models.load(folder, precision, model.device)
    return FullyTunedModel(saved.model, base_folder=Path(model.name_or_path), mixed_precision=False)

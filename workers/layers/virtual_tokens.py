"""What every adapter made of virtual tokens shares: peft's files and classes around a forward pass of our own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from peft import PeftModelForCausalLM, set_peft_model_state_dict
from peft.config import PromptLearningConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from workers.errors import RecipeError


class VirtualTokenModel(PeftModelForCausalLM):
    """A base with trained virtual tokens. Forward and generate take what the base takes and give what it gives:
    positions, masks and logits of the row's own tokens."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base's forward; a subclass has put the virtual tokens into it."""
        return self.base_model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base's generate, with or without a cache."""
        base: Any = self.base_model
        return base.generate(*args, **kwargs)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The base alone."""
        before, self._adapters_disabled = self._adapters_disabled, True
        try:
            yield
        finally:
            self._adapters_disabled = before


M = TypeVar("M", bound=VirtualTokenModel)


def load_virtual_tokens(model_class: type[M], config_class: type[PromptLearningConfig], model: Any, folder: Path) -> M:
    """The base with the virtual tokens of a saved adapter, not trainable.

    Raises:
        RuntimeError: the saved weights have another shape than the folder's configuration says.
    """
    from safetensors.torch import load_file

    config: Any = config_class.from_pretrained(str(folder))
    config.inference_mode = True
    adapted = model_class(model, config)
    set_peft_model_state_dict(adapted, load_file(folder / SAFETENSORS_WEIGHTS_NAME))
    adapted.requires_grad_(False)
    return adapted


def text_ids(model: Any, text: str, count: int) -> list[int]:
    """`count` ids: the text again and again, by the tokenizer in the base's own folder, without special tokens.

    Raises:
        RecipeError: the text has no tokens.
    """
    ids: Sequence[int] = read_tokenizer(model).encode(text, add_special_tokens=False).ids
    if not ids:
        raise RecipeError(
            "The starting text is empty.", next_step="Write a sentence that says the task.", field="settings.init_text"
        )
    return (list(ids) * (count // len(ids) + 1))[:count]


def read_tokenizer(model: Any) -> Any:
    """The tokenizer in the folder that the base was loaded from; never asks a hub."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(Path(model.name_or_path) / "tokenizer.json"))

"""A key-value cache of fixed size with a slot for each row being written: rows come and go, nothing is copied."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

# S slots, N of them in use, T columns of a slot, H key heads, D features of a head, K rows that join.

FULL, SLIDING = "full_attention", "sliding_attention"
FAMILIES = frozenset({
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "gpt2", "gpt_neox",
    "smollm3", "olmo2", "granite", "starcoder2", "stablelm", "cohere",
})  # fmt: skip
"""Model types whose layers keep keys and values alone and take a mask of rows by columns."""


class SlotCache(Cache):
    """Keys and values of S rows. A token's column is its place in its row, a prompt in front of it counted in.

    Before a pass with one new token for each of the first N rows, `aim` says at which columns they are written and
    how many columns are read.
    """

    layers: list[_SlotLayer]  # type: ignore[assignment]

    def __init__(self, like: Any, *, num_slots: int, num_columns: int) -> None:
        """`like` holds rows of the same model, which say what each layer keeps."""
        super().__init__(layers=[_SlotLayer(layer, num_slots, num_columns) for layer in like.layers])
        self.num_slots = num_slots
        self.num_columns = num_columns

    def aim(self, rows_N: Tensor, columns_N: Tensor, window: int) -> None:
        """Write the next token of row n at `columns_N[n]` of slot `rows_N[n]`, and read `window` columns.

        `rows_N` counts from 0.
        """
        for layer in self.layers:
            layer.rows_N, layer.columns_N, layer.window = rows_N, columns_N, window

    def fill(self, slots_K: Tensor, rows: Any) -> None:
        """Put the rows of a cache without slots into these slots, from column 0 on."""
        for layer, other in zip(self.layers, rows.layers, strict=True):
            layer.fill(slots_K, other.keys, other.values)

    def move(self, from_K: Tensor, to_K: Tensor, num_columns: int) -> None:
        """Copy the first columns of slots to others; no slot is in both."""
        for layer in self.layers:
            for kept in (layer.keys, layer.values):
                kept[to_K, :, :num_columns] = kept[from_K, :, :num_columns]


class _SlotLayer(CacheLayerMixin):
    is_compileable = False
    is_sliding = False
    keys: Tensor
    values: Tensor

    def __init__(self, like: Any, num_slots: int, num_columns: int) -> None:
        super().__init__()
        self.rows_N, self.columns_N, self.window = torch.empty(0), torch.empty(0), 0
        self.keys, self.values = (
            kept.new_zeros(num_slots, kept.shape[1], num_columns, kept.shape[3]) for kept in (like.keys, like.values)
        )
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is left to do: the sizes were known from the start."""

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write one token per row, (N, H, 1, D), and give what it may look at, (N, H, window, D)."""
        num_rows = key_states.shape[0]
        self.keys[self.rows_N, :, self.columns_N] = key_states[:, :, 0]
        self.values[self.rows_N, :, self.columns_N] = value_states[:, :, 0]
        return self.keys[:num_rows, :, : self.window], self.values[:num_rows, :, : self.window]

    def fill(self, slots_K: Tensor, keys: Tensor, values: Tensor) -> None:
        self.keys[slots_K, :, : keys.shape[2]] = keys
        self.values[slots_K, :, : values.shape[2]] = values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.window, 0

    def get_seq_length(self) -> int:
        return self.window - 1

    def get_max_length(self) -> int:
        return int(self.keys.shape[2])


def takes_slots(model: Any) -> bool:
    """Whether this model's rows can be written in slots; other models keep states of other kinds, or mask otherwise."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or [FULL])
    if config.model_type not in FAMILIES or not kinds <= {FULL, SLIDING} or "flash" in config._attn_implementation:
        return False
    # These turn by the longest row of a pass, so that a row's angles would depend on its neighbours.
    return not _rope_types(getattr(config, "rope_parameters", None) or {}) & {"dynamic", "longrope"}


def _rope_types(parameters: dict[str, Any]) -> set[str]:
    """By name; a model with several kinds of layers has parameters for each."""
    nested = [one for one in parameters.values() if isinstance(one, dict)]
    return {str(one["rope_type"]) for one in [parameters, *nested] if "rope_type" in one}


def masks(model: Any, columns_N: Tensor, window: int, num_columns: int) -> Tensor | dict[str, Tensor]:
    """What each row's new token may see of the first `window` columns, (N, 1, 1, window), for every kind of layer.

    Boolean, or to be added to the scores where the model computes them itself. A model with both whole and sliding
    attention gets a mask for each kind.
    """
    config = model.config.get_text_config()
    places_T = torch.arange(window, device=columns_N.device)
    whole_NT = places_T <= columns_N[:, None]
    found = {FULL: whole_NT}
    size = getattr(config, "sliding_window", None)
    # Where everything fits into the window it hides nothing.
    if size is not None and size < num_columns:
        found[SLIDING] = whole_NT & (places_T > columns_N[:, None] - size)
    kinds = _kinds(config)
    shaped = {kind: _shaped(config, model.dtype, found.get(kind, whole_NT)) for kind in kinds}
    if len(kinds) == 1 or SLIDING not in found:
        return shaped[kinds[0]]
    return shaped


def _kinds(config: Any) -> Sequence[str]:
    listed = getattr(config, "layer_types", None)
    if listed:
        return sorted(set(listed))
    return [SLIDING if getattr(config, "sliding_window", None) is not None else FULL]


def _shaped(config: Any, dtype: torch.dtype, seen_NT: Tensor) -> Tensor:
    if config._attn_implementation != "eager":
        return seen_NT[:, None, None]
    hidden = torch.finfo(dtype).min
    return torch.zeros_like(seen_NT, dtype=dtype).masked_fill_(~seen_NT, hidden)[:, None, None]


def bytes_per_column(like: Any) -> int:
    """What one token of one row takes in all layers of a cache."""
    kept = [tensor for layer in like.layers for tensor in (layer.keys, layer.values)]
    return sum(tensor.shape[1] * tensor.shape[3] * tensor.element_size() for tensor in kept)

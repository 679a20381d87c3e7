"""What every contender of the training benchmark trains on: sizes of models, and rows in their lengths.

It imports neither torch nor anything of the engine, so that a peer's process has only the peer's libraries in it.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

LLAMA_SHAPES: dict[str, dict[str, int]] = {
    "8b": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    },
    "3b": {
        "vocab_size": 128256, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
        "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128,
    },
    "1b": {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
    },
}  # fmt: skip
"""Sizes of Llama 3.1 8B, Llama 3.2 3B and 1B (their config.json), here with an output layer of its own in all."""
TINY: dict[str, int] = {
    "vocab_size": 384, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
ALL_SHAPES = LLAMA_SHAPES | {
    "135m": {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
    },
    "tiny": TINY,
}  # fmt: skip
"""Those and the sizes of SmolLM2 135M, and of a model for tests."""
BATCH, STEPS, WARM = 16, 30, 8
"""Rows of a step, steps of a run, and those of them before the clock runs."""
PAD, BEGIN, END = 0, 1, 2
"""Tokens that no row has."""
MAX_LENGTH = 2048
MASKED_SHARE = 0.35
LEARNING_RATE = 2e-4
RANK, ALPHA = 16, 32


def row_lengths(num: int, length: int | None) -> list[int]:
    """Tokens of each row, seeded: all `length`, or log-normal as those of instruction datasets."""
    if length is not None:
        return [length] * num
    drawn = np.random.default_rng(17).lognormal(np.log(220), 0.8, num)
    return [int(one) for one in np.clip(drawn, 16, MAX_LENGTH)]


def row_tokens(number: int, length: int, num_tokens: int) -> tuple[list[int], int]:
    """The tokens of a row by its number, and how many of the first are without loss."""
    ids = np.random.default_rng([17, number]).integers(END + 1, num_tokens, length).tolist()
    return ids, int(MASKED_SHARE * length)


def sizes_of(folder: Path) -> dict[str, int]:
    """The sizes of a model's folder, as those of a shape."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    found = {name: config[name] for name in TINY if name != "head_dim"}
    return found | {"head_dim": config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]}

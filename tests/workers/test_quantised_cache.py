"""Quantised bases from the disk: the same bits as without, and never a damaged one."""

from __future__ import annotations

import errno
import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch

from tests.tiny import make_tiny_base
from workers import base_models, quantised
from workers.bases import weights_digest
from workers.quantised import QuantisedCache


def load(folder: Path, precision: Any, cache: QuantisedCache | None, said: list[str] | None = None) -> Any:
    return base_models.load(folder, precision, "cpu", cache=cache, say=(said if said is not None else []).append).model


def bits(model: Any) -> dict[str, Any]:
    """Every weight with its type, and all that it is computed back from."""
    found: dict[str, Any] = {}
    for name, parameter in model.named_parameters():
        found[name] = (type(parameter), parameter.dtype, parameter.detach().clone())
        state = vars(parameter).get("quant_state")
        if state is not None:
            found[f"{name}.state"] = (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
            second = state.state2
            found[f"{name}.sizes"] = (state.shape, state.dtype, state.blocksize, state.quant_type, second.blocksize)
        found[f"{name}.int8"] = (vars(parameter).get("CB"), vars(parameter).get("SCB"))
    found |= {f"buffer {name}": (buffer,) for name, buffer in model.named_buffers()}
    return found


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma", "qwen2"])
@pytest.mark.parametrize("precision", ["nf4", "int8"])
def test_a_base_from_the_cache_is_the_freshly_quantised_one_bit_for_bit(
    precision: str, family: str, tmp_path: Path
) -> None:
    folder, cache = make_tiny_base(tmp_path / "base", family), QuantisedCache(tmp_path / "cache")
    said: list[str] = []
    plain = load(folder, precision, None)
    load(folder, precision, cache, said)
    (entry,) = (tmp_path / "cache").glob("*/*")
    shutil.move(folder / "model.safetensors", tmp_path / "aside")
    # Without its weights the folder cannot be what the model comes from.
    cached = base_models.load(
        folder, precision, "cpu", checked=True, cache=cache, revision=entry.parent.name, say=said.append
    ).model
    assert not said
    expected, found = bits(plain), bits(cached)
    assert expected.keys() == found.keys()
    assert [name for name in expected if not same(expected[name], found[name])] == []
    assert weights_digest(plain) == weights_digest(cached)
    assert plain.generation_config.to_dict() == cached.generation_config.to_dict()
    assert cached.name_or_path == str(folder)
    ids_BT = torch.arange(4, 20)[None]
    assert torch.equal(plain(input_ids=ids_BT).logits, cached(input_ids=ids_BT).logits)
    flags = {
        module.support_avx512bf16_for_cpu
        for module in cached.modules()
        if isinstance(module, bitsandbytes.nn.Linear4bit)
    }
    assert flags <= {False}, "bitsandbytes may not repack the layers for a kernel without gradients"


def test_what_decides_the_bits_decides_the_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, cache = make_tiny_base(tmp_path / "base"), QuantisedCache(tmp_path / "cache")
    load(folder, "nf4", cache)
    load(folder, "nf4", cache)
    assert len(list(cache.root.glob("*/*"))) == 1
    load(folder, "int8", cache)
    for compute_dtype in (torch.bfloat16, torch.float32):  # one of them is what this CPU computes in anyway
        base_models.load(folder, "nf4", "cpu", cache=cache, compute_dtype=compute_dtype)
    assert len(list(cache.root.glob("*/*"))) == 3
    real = quantised.metadata.version
    monkeypatch.setattr(quantised.metadata, "version", lambda name: f"{real(name)}.1")
    load(folder, "nf4", cache)
    assert len(list(cache.root.glob("*/*"))) == 4
    (folder / "generation_config.json").write_text("{}")
    load(folder, "nf4", cache)
    assert len(list(cache.root.iterdir())) == 2
    load(folder, "float32", cache)
    assert len(list(cache.root.glob("*/*"))) == 5


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: _flip(entry / "model.safetensors"),
        lambda entry: (entry / "model.safetensors").write_bytes(b""),
        lambda entry: (entry / "model.safetensors").unlink(),
        lambda entry: (entry / "config.json").write_text("{}"),
        lambda entry: (entry / "more.py").write_text("1"),
        lambda entry: (entry / "MANIFEST.json").unlink(),
        lambda entry: (entry / "MANIFEST.json").write_text('{"files": 1}'),
        lambda entry: (entry / "MANIFEST.json").write_text('{"files": {}}'),
    ],
    ids=["a bit", "cut", "no weights", "config", "more", "no manifest", "odd manifest", "empty manifest"],
)
def test_a_damaged_entry_is_dropped_with_a_sentence_and_made_again(damage: Any, tmp_path: Path) -> None:
    folder, cache = make_tiny_base(tmp_path / "base"), QuantisedCache(tmp_path / "cache")
    expected = weights_digest(load(folder, "nf4", cache))
    (entry,) = cache.root.glob("*/*")
    damage(entry)
    said: list[str] = []
    assert weights_digest(load(folder, "nf4", cache, said)) == expected
    assert len(said) == 1
    assert "damaged" in said[0]
    again: list[str] = []
    assert weights_digest(load(folder, "nf4", cache, again)) == expected
    assert not again


def test_an_entry_that_transformers_cannot_load_is_made_again(tmp_path: Path) -> None:
    folder, cache = make_tiny_base(tmp_path / "base"), QuantisedCache(tmp_path / "cache")
    expected = weights_digest(load(folder, "nf4", cache))
    (entry,) = cache.root.glob("*/*")
    # Whole by its digests, and wrong all the same.
    (entry / "config.json").write_text(json.dumps({"model_type": "llamoid"}))
    (entry / "MANIFEST.json").unlink()
    quantised._write_manifest(entry)
    said: list[str] = []
    assert weights_digest(load(folder, "nf4", cache, said)) == expected
    assert len(said) == 1


def test_without_room_nothing_is_kept_and_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, cache = make_tiny_base(tmp_path / "base"), QuantisedCache(tmp_path / "cache")
    usage = namedtuple("usage", "total used free")  # as shutil has it
    said: list[str] = []
    with monkeypatch.context() as patched:
        patched.setattr(quantised.shutil, "disk_usage", lambda path: usage(10**9, 10**9, 10**4))
        assert load(folder, "nf4", cache, said) is not None
    assert "GB are free" in said[0]
    assert not list(cache.root.glob("*/*"))

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(quantised, "_sync", full)
    assert load(folder, "nf4", cache, said) is not None
    assert "No space left on device" in said[1]
    assert not list(cache.root.glob("*/*")), "nothing half-written is left"


def test_the_entries_of_a_base_go_with_it(tmp_path: Path) -> None:
    folder, cache = make_tiny_base(tmp_path / "base"), QuantisedCache(tmp_path / "cache")
    load(folder, "nf4", cache)
    (of_revision,) = cache.root.iterdir()
    quantised.remove(cache.root, of_revision.name)
    assert not list(cache.root.iterdir())

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from tests.tiny import FAMILIES, make_tiny_base
from workers.base_folders import read_base_folder, read_safetensors_header
from workers.errors import BaseModelError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_tiny_base(tmp_path / "base")


def change_config(folder: Path, **values) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def write_safetensors(path: Path, header: object, body: bytes = b"", claimed: int | None = None) -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if claimed is None else claimed) + text + body)
    return path


@pytest.mark.parametrize("family", FAMILIES)
def test_it_counts_what_transformers_counts(family, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    made = make_tiny_base(tmp_path / family, family)
    shape = read_base_folder(made).shape
    model = AutoModelForCausalLM.from_pretrained(made)
    assert shape.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    config = model.config
    assert (shape.num_layers, shape.hidden_size, shape.vocabulary_size, shape.num_heads) == (
        config.num_hidden_layers, config.hidden_size, config.vocab_size, config.num_attention_heads
    )  # fmt: skip
    sizes = []
    for name, module in model.named_modules():
        if ".0." in name and module.__class__.__name__ in {"Linear", "Conv1D"}:
            size = module.weight.shape
            last = name.rsplit(".", 1)[-1]
            sizes.append((last, *(size if isinstance(module, Conv1D) else reversed(size))))
    assert sorted(sizes) == sorted((one.name, one.in_features, one.out_features) for one in shape.linears)


def test_the_revision_follows_the_contents(folder: Path) -> None:
    before = read_base_folder(folder)
    assert read_base_folder(folder).revision == before.revision
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file["name"] for file in before.files}
    change_config(folder, rms_norm_eps=1e-6)
    assert read_base_folder(folder).revision != before.revision


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt", "model.pkl", "x.ckpt", "deep/er/rng.pth"])
def test_it_refuses_pickles(folder: Path, name: str) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\x80\x04")
    with pytest.raises(BaseModelError) as caught:
        read_base_folder(folder)
    assert caught.value.code == "safetensors_only"
    assert name in caught.value.message


def test_it_refuses_a_folder_without_safetensors(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(BaseModelError) as caught:
        read_base_folder(folder)
    assert caught.value.code == "safetensors_only"


def test_it_refuses_program_code(folder: Path) -> None:
    (folder / "modeling_x.py").write_text("print('hello')")
    with pytest.raises(BaseModelError, match="program code"):
        read_base_folder(folder)


@pytest.mark.parametrize(
    "key", ["auto_map", "trust_remote_code", "_attn_implementation_internal", "_experts_implementation_internal"]
)
@pytest.mark.parametrize("nest", [lambda inner: inner, lambda inner: {"a": {"b": [1, {"c": inner}]}}])
def test_it_refuses_keys_that_import_code_at_any_depth(folder: Path, key: str, nest) -> None:
    change_config(folder, **nest({key: {"AutoModel": "x.y"}}))
    with pytest.raises(BaseModelError) as caught:
        read_base_folder(folder)
    assert caught.value.code == "unsafe_config_key"
    assert key in caught.value.message


def test_it_refuses_such_keys_in_the_tokenizers_configuration(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": ["x.y", None]}}))
    with pytest.raises(BaseModelError) as caught:
        read_base_folder(folder)
    assert caught.value.code == "unsafe_config_key"


def test_it_refuses_links_that_lead_out(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    (folder / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(BaseModelError, match="leads out"):
        read_base_folder(folder)


def test_it_takes_the_links_of_a_hub_snapshot_and_reads_its_name(tmp_path: Path) -> None:
    repository = tmp_path / "models--owner--name"
    made = make_tiny_base(repository / "blobs")
    snapshot = repository / "snapshots" / ("0123456789" * 4)
    snapshot.mkdir(parents=True)
    for path in made.iterdir():
        (snapshot / path.name).symlink_to(path)
    found = read_base_folder(snapshot)
    assert (found.hub_id, found.commit) == ("owner/name", "0123456789" * 4)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"num_hidden_layers": ...}, "num_hidden_layers"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"model_type": ...}, "model_type"),
        ({"architectures": ["BertForMaskedLM"]}, "not a causal language model"),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"quantization_config": {"bits": 4}}, "quantised already"),
    ],
)
def test_it_says_what_the_configuration_lacks(folder: Path, values, says: str) -> None:
    change_config(folder, **values)
    with pytest.raises(BaseModelError) as caught:
        read_base_folder(folder)
    assert says in caught.value.message
    assert caught.value.next_step


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_it_names_a_missing_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(BaseModelError, match=name):
        read_base_folder(folder)


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "body", "claimed", "says"),
    [
        ({"a": ENTRY}, b"\0" * 8, 200_000_000, "more than 100000000"),
        ({"a": ENTRY}, b"\0" * 8, 5_000, "but the file has"),
        ({"a": ENTRY}, b"\0" * 4, None, "should have"),
        ({"a": ENTRY}, b"\0" * 12, None, "should have"),
        ({"a": ENTRY, "b": ENTRY}, b"\0" * 8, None, "overlaps"),
        ({"a": ENTRY, "b": ENTRY | {"data_offsets": [12, 20]}}, b"\0" * 20, None, "gap"),
        ({"a": ENTRY | {"data_offsets": [8, 0]}}, b"\0" * 8, None, "does not fit"),
        ({"a": ENTRY | {"data_offsets": [-8, 0]}}, b"\0" * 8, None, "negative"),
        ({"a": ENTRY | {"shape": [3]}}, b"\0" * 8, None, "does not fit"),
        ({"a": ENTRY | {"shape": [-2, -1]}}, b"\0" * 8, None, "negative"),
        ({"a": ENTRY | {"dtype": "PICKLE"}}, b"\0" * 8, None, "unknown type"),
        ({"a": 3}, b"", None, "not one of a tensor"),
        ([], b"", None, "not a JSON object"),
    ],
)
def test_it_refuses_a_header_that_lies(tmp_path: Path, header, body, claimed, says: str) -> None:
    path = write_safetensors(tmp_path / "x.safetensors", header, body, claimed)
    with pytest.raises(BaseModelError) as caught:
        read_safetensors_header(path)
    assert caught.value.code == "damaged_safetensors"
    assert says in caught.value.message


def test_it_refuses_a_truncated_file(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BaseModelError, match="but has"):
        read_base_folder(folder)
    path.write_bytes(b"abc")
    with pytest.raises(BaseModelError, match="shorter than 8"):
        read_base_folder(folder)


def test_it_needs_no_torch(folder: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys; from pathlib import Path; import workers.base_folders as b; "
        "import workers.memory, workers.resolving, workers.results, workers.statistics; "
        f"b.read_base_folder(Path({str(folder)!r})); "
        "assert not {'torch', 'transformers', 'peft'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

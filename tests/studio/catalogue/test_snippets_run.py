"""The snippet that the adapter's page shows, pasted beside the unpacked zip, in a process without our code."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from studio.accounts.models import Team, User
from studio.catalogue.bundles import stream_zip
from studio.catalogue.models import Adapter
from studio.catalogue.registering import checked_files, register_adapter
from studio.catalogue.usage import usages
from studio.storage import adapter_folder
from tests.factories import make_adapter, make_base_model, make_dataset_version, make_recipe, make_result
from workers.methods import get_method


@pytest.mark.usefixtures("data_dir")
@pytest.mark.parametrize(("name", "chosen"), [("lora", {"rank": 4}), ("bottleneck", {"placement": "parallel"})])
def test_the_peft_snippet_runs_as_pasted(name: str, chosen: dict, team: Team, alice: User, tmp_path: Path) -> None:
    from workers import adapters, base_models  # heavy: not while tests are collected

    base, version = make_base_model(), make_dataset_version(team, alice)
    method = get_method(name)
    loaded = base_models.load(Path(base.folder), "float32", "cpu")
    saved = tmp_path / "saved"
    saved.mkdir()
    recipe = make_recipe(base, version, method=name, settings=chosen)
    adapters.save(method.attach(loaded.model, method.read_settings(chosen)), saved, recipe=recipe, hub_id="")
    files = {path.name: path.read_bytes() for path in saved.iterdir()}
    adapter = make_adapter(
        team, alice, base_model=base, dataset_version=version, method=name, settings=chosen, files=files,
        evaluation={"max_new_tokens": 4},
    )  # fmt: skip
    run_as_pasted(adapter, "peft", tmp_path)


@pytest.mark.usefixtures("data_dir")
def test_the_snippet_of_a_whole_model_runs_without_peft_and_base(team: Team, alice: User, tmp_path: Path) -> None:
    from workers import adapters, base_models

    base, version = make_base_model(family="qwen2"), make_dataset_version(team, alice)
    method = get_method("full")
    recipe = make_recipe(base, version, method="full", settings={}, evaluation={"max_new_tokens": 4})
    tuned = method.attach(base_models.load(Path(base.folder), "float32", "cpu").model, method.read_settings({}))
    key = "tests/whole-model"
    result = adapters.finish(
        tuned, adapter_folder(key), recipe=recipe, result=make_result(num_trainable=7),
        base_model_folder=Path(base.folder), template="", probe_ids=[[5, 9, 40]],
    )  # fmt: skip
    model = register_adapter(
        team=team, user=alice, name="Whole", base_model=base, dataset_version=version, recipe=recipe,
        folder_key=key, files=checked_files(key), result=result,
    )  # fmt: skip
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {str(file["name"]) for file in model.files}
    assert model.num_bytes > 4 * base.model_shape().num_parameters
    shutil.rmtree(base.folder)
    run_as_pasted(model, "transformers", tmp_path, hidden=("peft",))


def run_as_pasted(adapter: Adapter, key: str, tmp_path: Path, *, hidden: tuple[str, ...] = ()) -> None:
    """Runs a snippet beside the unpacked download; packages in `hidden` cannot be imported."""
    unpacked = tmp_path / "unpacked"
    with zipfile.ZipFile(io.BytesIO(b"".join(stream_zip(adapter)))) as archive:
        archive.extractall(unpacked)
    snippet = next(usage.code for usage in usages(adapter) if usage.key == key)
    hiding = "".join(f"sys.modules[{name!r}] = None\n" for name in hidden)
    (unpacked / "run.py").write_text(f"import sys\n{hiding}{snippet}")
    ran = subprocess.run(
        # -I: neither the working tree nor PYTHONPATH is importable.
        [sys.executable, "-I", "run.py"],
        cwd=unpacked,
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr

"""The snippet that the adapter's page shows, pasted beside the unpacked zip, in a process without our code."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from studio.accounts.models import Team, User
from studio.catalogue.bundles import stream_zip
from studio.catalogue.usage import usages
from tests.factories import make_adapter, make_base_model, make_dataset_version, make_recipe
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
    unpacked = tmp_path / "unpacked"
    with zipfile.ZipFile(io.BytesIO(b"".join(stream_zip(adapter)))) as archive:
        archive.extractall(unpacked)
    snippet = next(usage.code for usage in usages(adapter) if usage.key == "peft")
    (unpacked / "run.py").write_text(snippet)
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

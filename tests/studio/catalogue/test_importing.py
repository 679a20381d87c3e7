"""Base models from folders: by hand, and idempotent by content."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import pytest
from django.core.management import CommandError, call_command

from studio.catalogue.importing import allowed_folder, register_base_model, suggested_folders
from studio.catalogue.models import BaseModel
from tests.tiny import make_tiny_base
from workers.errors import BaseModelError

pytestmark = pytest.mark.django_db


def test_it_records_shape_files_and_revision(data_dir: Path) -> None:
    base = register_base_model(folder=make_tiny_base(data_dir / "m"), name="M", hub_id="a/b", licence="mit")
    shape = BaseModel.objects.get(pk=base.pk).model_shape()
    assert (shape.num_layers, shape.hidden_size) == (2, 64)
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= {file["name"] for file in base.files}
    assert base.num_bytes == sum(path.stat().st_size for path in (data_dir / "m").rglob("*") if path.is_file())


def test_another_folder_with_the_same_files_is_the_same_base(data_dir: Path) -> None:
    first = register_base_model(folder=make_tiny_base(data_dir / "a"), name="A", hub_id="", licence="")
    shutil.move(data_dir / "a", data_dir / "b")
    again = register_base_model(folder=data_dir / "b", name="B", hub_id="", licence="")
    assert again.pk == first.pk
    assert BaseModel.objects.get().folder == str(data_dir / "b")


def test_a_name_that_stands_for_other_files_is_refused(data_dir: Path) -> None:
    register_base_model(folder=make_tiny_base(data_dir / "a"), name="A", hub_id="", licence="")
    with pytest.raises(BaseModelError) as caught:
        register_base_model(folder=make_tiny_base(data_dir / "b", "qwen2"), name="A", hub_id="", licence="")
    assert caught.value.field == "name"
    assert BaseModel.objects.count() == 1


def test_an_admin_may_add_roots(data_dir: Path, tmp_path_factory: pytest.TempPathFactory, settings: object) -> None:
    root = tmp_path_factory.mktemp("models")
    make_tiny_base(root / "m")
    with pytest.raises(BaseModelError, match="outside"):
        allowed_folder(str(root / "m"))
    settings.BASE_MODEL_ROOTS = [root]  # type: ignore[attr-defined]
    assert allowed_folder(str(root / "m")) == root / "m"
    assert suggested_folders() == [str(root / "m")]


def test_the_command_registers_a_folder_anywhere(tmp_path: Path) -> None:
    out = io.StringIO()
    call_command("registerbase", str(make_tiny_base(tmp_path / "m")), "--name", "Mine", "--licence", "mit", stdout=out)
    assert BaseModel.objects.get().name == "Mine"
    assert "Mine: registered" in out.getvalue()


def test_the_command_explains_what_is_wrong(tmp_path: Path) -> None:
    folder = make_tiny_base(tmp_path / "m")
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CommandError, match=r"pytorch_model\.bin"):
        call_command("registerbase", str(folder))
    assert not BaseModel.objects.exists()

"""The mission's five methods on a real pretrained model, SmolLM2-135M-Instruct: every row of the contract."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.workers.methods.test_every_method import (
    MISSION,
    check_checkpointing,
    check_generation,
    check_packing,
    check_resuming,
    exact_precision,
)
from tests.workers.methods.trying import attach, disturb, random_rows, recipe_of, tiny_settings, trainable
from workers import adapters, base_models
from workers.base_folders import read_base_folder
from workers.bundled import prepare_smollm2
from workers.methods import get_method
from workers.recipe import Precision

pytestmark = [pytest.mark.slow, pytest.mark.parametrize("name", sorted(MISSION))]


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_smollm2(tmp_path_factory.mktemp("real") / "smollm2")


def precisions_of(name: str) -> list[Precision]:
    """Full precision where the method takes it, and 4 bits."""
    exact = exact_precision(get_method(name))
    return [exact] if exact == "nf4" or "nf4" not in get_method(name).precisions else [exact, "nf4"]


def test_packed_rows_train_as_separate_rows_do(name: str, smollm2: Path) -> None:
    for precision in precisions_of(name):
        check_packing(name, smollm2, precision)


def test_gradient_checkpointing_gives_the_same_gradients(name: str, smollm2: Path) -> None:
    for precision in precisions_of(name):
        check_checkpointing(name, smollm2, precision)


def test_answers_are_the_same_alone_batched_and_without_a_cache(name: str, smollm2: Path) -> None:
    for precision in precisions_of(name):
        check_generation(name, smollm2, precision)


def test_saving_and_loading_gives_the_same_logits(name: str, smollm2: Path, tmp_path: Path) -> None:
    precision = exact_precision(get_method(name))
    adapted = attach(name, smollm2, precision).eval()
    disturb(adapted)
    ids_BT = torch.tensor(random_rows(24))
    adapters.save(adapted, tmp_path / "adapter", recipe=recipe_of(name), hub_id="owner/base")
    loaded = adapters.load(base_models.load(smollm2, precision, "cpu", checked=True).model, tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids_BT).logits, adapted(input_ids=ids_BT).logits, rtol=0, atol=0)


def test_the_formula_gives_the_real_number_of_parameters(name: str, smollm2: Path) -> None:
    method = get_method(name)
    found = sum(parameter.numel() for parameter in trainable(attach(name, smollm2, method.precisions[0])).values())
    shape = read_base_folder(smollm2).shape
    assert found == method.num_trainable(method.read_settings(tiny_settings(name)), shape)
    defaults = method.num_trainable(method.read_settings({}), shape)
    assert 0 < defaults < 0.2 * shape.num_parameters


def test_a_killed_run_that_goes_on_ends_with_the_same_bytes(name: str, smollm2: Path, tmp_path: Path) -> None:
    check_resuming(name, smollm2, tmp_path, [7])

"""What holds for every method that is found, on every precision that it takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.tiny import FAMILIES, make_tiny_base
from workers import adapters, base_models
from workers.base_folders import read_base_folder
from workers.batching import Batch
from workers.losses import summed_cross_entropy
from workers.methods import get_method, methods
from workers.recipe import Recipe

CASES = [(name, precision) for name, method in methods().items() for precision in method.precisions]
SETTINGS = {"lora": {"dropout": 0.0, "rank": 4}, "qlora": {"dropout": 0.0, "rank": 4}}


def recipe_of(name: str) -> Recipe:
    return Recipe.from_dict(
        {
            "name": name,
            "method": name,
            "base_model": {"name": "tiny"},
            "dataset": {"name": "rows", "format": "alpaca"},
        }
    )


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {family: make_tiny_base(root / family, family) for family in FAMILIES}


def attach(name: str, folder: Path, precision, settings: dict | None = None):
    method = get_method(name)
    torch.manual_seed(5)
    model = base_models.load(folder, precision, "cpu", checked=True).model
    adapted = method.attach(model, method.read_settings(SETTINGS.get(name, {}) | (settings or {})))
    return adapted.train()


def padded(rows: list[list[int]]) -> Batch:
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    places = [(index, at) for index, row in enumerate(rows) for at in range(len(row) - 1)]
    return Batch(
        input_ids=ids,
        position_ids=None,
        positions_N=torch.tensor([index * width + at for index, at in places]),
        targets_N=torch.tensor([rows[index][at + 1] for index, at in places]),
        rows_N=torch.tensor([index for index, _ in places]),
        lengths=tuple(map(len, rows)),
    )


def packed(rows: list[list[int]]) -> Batch:
    starts = [sum(map(len, rows[:index])) for index in range(len(rows))]
    places = [(index, at) for index, row in enumerate(rows) for at in range(len(row) - 1)]
    return Batch(
        input_ids=torch.tensor([[token for row in rows for token in row]]),
        position_ids=torch.cat([torch.arange(len(row)) for row in rows])[None],
        positions_N=torch.tensor([starts[index] + at for index, at in places]),
        targets_N=torch.tensor([rows[index][at + 1] for index, at in places]),
        rows_N=torch.tensor([index for index, _ in places]),
        lengths=tuple(map(len, rows)),
    )


def random_rows(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(4, 250, (length,), generator=generator).tolist() for length in lengths]


def trainable(model) -> dict[str, torch.Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def disturb(model) -> None:
    generator = torch.Generator().manual_seed(2)
    for parameter in trainable(model).values():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)


def gradients(model, batch: Batch) -> tuple[float, torch.Tensor]:
    model.zero_grad()
    loss, count = summed_cross_entropy(model, batch)
    (loss / count).backward()
    return loss.item() / int(count), torch.cat([p.grad.flatten().float() for p in trainable(model).values()])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", methods())
def test_the_formula_gives_the_real_number_of_parameters(name: str, family, bases) -> None:
    shape = read_base_folder(bases[family]).shape
    method = get_method(name)
    adapted = attach(name, bases[family], method.precisions[0])
    settings = method.read_settings(SETTINGS.get(name, {}))
    assert sum(parameter.numel() for parameter in trainable(adapted).values()) == method.num_trainable(settings, shape)
    assert all(parameter.dtype == torch.float32 for parameter in trainable(adapted).values())


@pytest.mark.parametrize(("name", "precision"), CASES)
def test_only_the_adapter_trains_and_its_loss_falls(name: str, precision, bases) -> None:
    adapted = attach(name, bases["llama"], precision)
    frozen = {key: p.detach().clone() for key, p in adapted.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW(trainable(adapted).values(), lr=3e-2, weight_decay=0.0)
    batch = padded(random_rows(24, 17))
    losses = []
    for _ in range(24):
        loss, count = summed_cross_entropy(adapted, batch)
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item() / int(count))
    assert losses[-1] < losses[0] - 0.2
    for key, value in adapted.named_parameters():
        if not value.requires_grad:
            assert torch.equal(value, frozen[key]), key


@pytest.mark.parametrize(("name", "precision"), CASES)
def test_packed_rows_train_as_separate_rows_do(name: str, precision, bases) -> None:
    if not get_method(name).can_pack:
        pytest.skip("declares that it cannot be packed")
    adapted = attach(name, bases["llama"], precision)
    disturb(adapted)
    rows = random_rows(21, 9, 14)
    loss, gradient = gradients(adapted, padded(rows))
    packed_loss, packed_gradient = gradients(adapted, packed(rows))
    close = 1e-4 if precision == "float32" else 3e-2
    assert packed_loss == pytest.approx(loss, rel=close)
    assert (packed_gradient - gradient).norm() / gradient.norm() < (1e-3 if precision == "float32" else 0.15)


@pytest.mark.parametrize("name", methods())
@pytest.mark.parametrize("family", FAMILIES)
def test_packing_is_right_in_every_family(name: str, family, bases) -> None:
    precision = "float32" if "float32" in get_method(name).precisions else get_method(name).precisions[0]
    adapted = attach(name, bases[family], precision).eval()
    rows = random_rows(21, 9)
    with torch.no_grad():
        apart = torch.cat([adapted(input_ids=torch.tensor([row]), use_cache=False).logits[0] for row in rows])
        batch = packed(rows)
        together = adapted(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits[0]
    torch.testing.assert_close(together, apart, rtol=1e-3, atol=1e-3 if precision == "float32" else 5e-2)


@pytest.mark.parametrize(("name", "precision"), CASES)
def test_gradient_checkpointing_gives_the_same_gradients(name: str, precision, bases) -> None:
    if not get_method(name).can_checkpoint_activations:
        pytest.skip("declares that it cannot")
    adapted = attach(name, bases["llama"], precision)
    disturb(adapted)
    batch = padded(random_rows(20, 12))
    loss, gradient = gradients(adapted, batch)
    adapted.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    again, other = gradients(adapted, batch)
    assert again == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(other, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("name", "precision"), CASES)
def test_saving_and_loading_gives_the_same_logits(name: str, precision, bases, tmp_path: Path) -> None:
    adapted = attach(name, bases["llama"], precision).eval()
    disturb(adapted)
    ids_BT = torch.tensor(random_rows(16))
    adapters.save(adapted, tmp_path / "adapter", recipe=recipe_of(name), hub_id="owner/base")
    fresh = base_models.load(bases["llama"], precision, "cpu", checked=True).model
    loaded = adapters.load(fresh, tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids_BT).logits, adapted(input_ids=ids_BT).logits, rtol=0, atol=0)


@pytest.mark.parametrize("name", methods())
def test_switching_the_adapter_off_gives_the_base(name: str, bases) -> None:
    precision = get_method(name).precisions[0]
    ids_BT = torch.tensor(random_rows(16))
    base = base_models.load(bases["llama"], precision, "cpu", checked=True).model
    adapted = attach(name, bases["llama"], precision).eval()
    disturb(adapted)
    with torch.no_grad():
        expected = base(input_ids=ids_BT).logits
        with adapted.disable_adapter():
            torch.testing.assert_close(adapted(input_ids=ids_BT).logits, expected, rtol=0, atol=0)
        assert not torch.equal(adapted(input_ids=ids_BT).logits, expected)
        torch.testing.assert_close(adapted.unload()(input_ids=ids_BT).logits, expected, rtol=0, atol=0)

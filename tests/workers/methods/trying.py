"""A method on a tiny base: attached, fed, compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from workers import base_models
from workers.batching import Batch
from workers.losses import summed_cross_entropy
from workers.methods import get_method
from workers.recipe import Recipe

# Small sizes, and nothing by chance, for whichever method has a setting of that name.
SMALL = {"dropout": 0.0, "rank": 4, "num_virtual_tokens": 5, "mixed_precision": False}


def tiny_settings(name: str) -> dict[str, Any]:
    """Settings of a method that suit a tiny base."""
    return {key: value for key, value in SMALL.items() if key in get_method(name).Settings.model_fields}


def recipe_of(name: str) -> Recipe:
    return Recipe.from_dict(
        {
            "name": name,
            "method": name,
            "base_model": {"name": "tiny"},
            "dataset": {"name": "rows", "format": "alpaca"},
        }
    )


def attach(name: str, folder: Path, precision, settings: dict | None = None):
    method = get_method(name)
    torch.manual_seed(5)
    model = base_models.load(folder, precision, "cpu", checked=True).model
    return method.attach(model, method.read_settings(tiny_settings(name) | (settings or {}))).train()


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

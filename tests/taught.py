"""A tiny base that has read general text for some seconds, so that it knows something and can forget it."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.tiny import make_tiny_base
from workers.general import general_rows
from workers.rendering import Renderer

NUM_STEPS, BATCH_ROWS = 150, 16


def make_taught_base(folder: Path) -> Path:
    """The tiny base after 150 steps on the general set's questions and answers; always the same weights."""
    from transformers import AutoModelForCausalLM

    make_tiny_base(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    renderer = Renderer(folder, max_length=256, loss_on="all")
    rows = [renderer.render(example) for example in general_rows()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    order = torch.Generator().manual_seed(17)
    for _ in range(NUM_STEPS):
        chosen = [rows[index] for index in torch.randperm(len(rows), generator=order)[:BATCH_ROWS].tolist()]
        width = max(len(row.ids) for row in chosen)
        ids_BT = torch.tensor([list(row.ids) + [0] * (width - len(row.ids)) for row in chosen])
        model(input_ids=ids_BT, labels=ids_BT.masked_fill(ids_BT == 0, -100)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder

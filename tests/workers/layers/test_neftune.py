"""The noise against a small computation of its own, through every method."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.tiny import HIDDEN, make_tiny_base
from tests.workers.methods.trying import tiny_settings
from workers import base_models
from workers.batching import Batch, TokenRows, collate, split_step
from workers.layers.neftune import EmbeddingNoise
from workers.losses import summed_cross_entropy
from workers.methods import get_method, methods

CPU = torch.device("cpu")
LENGTHS = (19, 12, 7, 4)
ALPHA, SEED, STEP = 5.0, 17, 3


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_base(tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> TokenRows:
    found = TokenRows(tmp_path_factory.mktemp("rows"))
    generator = torch.Generator().manual_seed(3)
    for line, length in enumerate(LENGTHS, start=1):
        found._append(line, torch.randint(4, 300, (length,), generator=generator).tolist(), [True] * length)
    found._close()
    return found


def noise_by_hand() -> list[Tensor]:
    """alpha / sqrt(L d) * uniform(-1, 1) for one row after the other."""
    digest = hashlib.blake2b(f"neftune:{SEED}:{STEP}".encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
    return [
        (2 * torch.rand(length, HIDDEN, generator=generator) - 1) * ALPHA / (length * HIDDEN) ** 0.5
        for length in LENGTHS
    ]


def noise() -> EmbeddingNoise:
    return EmbeddingNoise(ALPHA, seed=SEED, step=STEP, device=CPU)


def step_batches(rows: TokenRows, micro_batch_size: int, packing: bool) -> list[Batch]:
    order = range(len(rows))
    groups = split_step(order, rows, micro_batch_size)
    return [collate(group, rows, packing=packing, pad_id=0) for group in groups]


def attach(name: str, base: Path) -> Any:
    method = get_method(name)
    torch.manual_seed(5)
    model = base_models.load(base, "float32", "cpu", checked=True).model
    return method.attach(model, method.read_settings(tiny_settings(name))).train()


class Heard:
    """What the base's input embeddings give, behind every other hook."""

    def __init__(self, model: Any) -> None:
        self.outputs: list[Tensor] = []
        self._embedding = model.get_base_model().get_input_embeddings()

    def during(self, call: Any) -> Tensor:
        handle = self._embedding.register_forward_hook(lambda _m, _i, output: self.outputs.append(output.detach()))
        try:
            call()
        finally:
            handle.remove()
        return self.outputs[-1]


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("micro_batch_size", [1, 3, 4])
def test_every_row_gets_its_own_noise_in_any_micro_batches(
    base: Path, rows: TokenRows, micro_batch_size: int, packing: bool
) -> None:
    model = attach("lora", base)
    drawn = noise()
    expected = noise_by_hand()
    row = 0
    for batch in step_batches(rows, micro_batch_size, packing):
        clean = model.get_base_model().get_input_embeddings()(batch.input_ids)
        with drawn.added_to(model, batch):
            seen = Heard(model).during(lambda batch=batch: summed_cross_entropy(model, batch))
        added = seen - clean
        if packing:
            own = expected[row : row + len(batch.lengths)]
            torch.testing.assert_close(added[0], torch.cat(own), rtol=1e-4, atol=1e-6)
        else:
            for index, length in enumerate(batch.lengths):
                torch.testing.assert_close(added[index, :length], expected[row + index], rtol=1e-4, atol=1e-6)
                assert not added[index, length:].any(), "padding stays as it was"
        row += len(batch.lengths)
    assert row == len(LENGTHS)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("name", [name for name, method in methods().items() if "float32" in method.precisions])
def test_losses_and_gradients_are_those_of_noisy_rows_one_by_one(
    name: str, base: Path, rows: TokenRows, packing: bool, checkpointing: bool
) -> None:
    method = get_method(name)
    if (packing and not method.can_pack) or (checkpointing and not method.can_checkpoint_activations):
        pytest.skip("declares that it cannot")
    model = attach(name, base)
    embedding = model.get_base_model().get_input_embeddings()
    total = torch.zeros(())
    for row, own in enumerate(noise_by_hand()):
        ids = torch.from_numpy(rows.ids(row).astype("int64"))[None]
        handle = embedding.register_forward_hook(
            lambda _m, _i, output, own=own: output + own if output.shape[:-1] == (1, len(own)) else None
        )
        logits = model(input_ids=ids, use_cache=False).logits[0, -ids.shape[1] :]
        handle.remove()
        total = total + functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="sum")
    total.backward()
    trained = {key: one for key, one in model.named_parameters() if one.requires_grad}
    wanted = {key: one.grad.clone() for key, one in trained.items()}
    model.zero_grad()

    if checkpointing:
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    batch = collate(range(len(rows)), rows, packing=packing, pad_id=0)
    with noise().added_to(model, batch):
        loss, _ = summed_cross_entropy(model, batch)
        loss.backward()
    assert loss.item() == pytest.approx(total.item(), rel=1e-5)
    for key, parameter in trained.items():
        scale = max(wanted[key].abs().max().item(), 1e-6)
        assert (parameter.grad - wanted[key]).abs().max().item() < 2e-3 * scale + 1e-5, key


def test_another_step_or_seed_draws_other_noise_and_nothing_else_is_drawn(base: Path, rows: TokenRows) -> None:
    model = attach("lora", base)
    batch = collate([0], rows, packing=False, pad_id=0)

    def losses(seed: int, step: int, alpha: float = ALPHA) -> float:
        with EmbeddingNoise(alpha, seed=seed, step=step, device=CPU).added_to(model, batch):
            return summed_cross_entropy(model, batch)[0].item()

    summed_cross_entropy(model, batch)
    before = torch.get_rng_state()
    assert losses(1, 1) == losses(1, 1)
    assert len({losses(1, 1), losses(1, 2), losses(2, 1), losses(1, 1, alpha=0.0)}) == 4
    assert torch.equal(before, torch.get_rng_state()), "dropout goes on as if there were no noise"
    assert losses(1, 1, alpha=0.0) == summed_cross_entropy(model, batch)[0].item()


def test_a_model_that_goes_round_its_embeddings_is_noticed(base: Path, rows: TokenRows) -> None:
    model = attach("lora", base)
    batch = collate([0], rows, packing=False, pad_id=0)
    with pytest.raises(AssertionError, match="input embeddings"), noise().added_to(model, batch):
        model(inputs_embeds=torch.zeros(1, 5, HIDDEN))

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from tests.tiny import FAMILIES, make_tiny_base
from workers import losses
from workers.batching import TokenRows, collate
from workers.losses import head_is_plain, summed_cross_entropy


def make_rows(folder: Path) -> TokenRows:
    rows = TokenRows(folder)
    generator = torch.Generator().manual_seed(3)
    for line, length in enumerate((17, 5, 11), start=1):
        ids = torch.randint(4, 300, (length,), generator=generator).tolist()
        rows._append(line, ids, [place >= 2 and place != 3 for place in range(length)])
    rows._close()
    return rows


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def plain_loss(model: Any, rows: TokenRows) -> tuple[torch.Tensor, int]:
    """Row by row, with all logits, by transformers' own forward: nothing of ours."""
    total, count = torch.zeros(()), 0
    for row in range(len(rows)):
        ids = torch.from_numpy(rows.ids(row).astype("int64"))[None]
        labels = torch.where(torch.from_numpy(rows.trained(row).copy())[None], ids, -100)
        logits = model(input_ids=ids).logits.float()
        total = total + functional.cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=-100, reduction="sum")
        count += int((labels[0, 1:] != -100).sum())
    return total, count


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


def freeze_all_but_layers(model: Any) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name or "ln_" in name or "mlp" in name)


def compare_with_plain(model: Any, rows: TokenRows, *, packing: bool) -> None:
    expected, count = plain_loss(model, rows)
    expected.backward()
    wanted = gradients(model)
    model.zero_grad()
    batch = collate([0, 1, 2], rows, packing=packing, pad_id=2)
    total, num_tokens = summed_cross_entropy(model, batch)
    total.backward()
    assert int(num_tokens) == count == batch.num_loss_tokens
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    found = gradients(model)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        scale = gradient.abs().max().item()
        assert (found[name] - gradient).abs().max().item() <= 1e-4 * scale + 1e-6, name


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_padded_and_packed_rows_give_the_loss_and_gradients_of_single_rows(
    tmp_path: Path, family: str, packing: bool
) -> None:
    model = load(make_tiny_base(tmp_path / "base", family))
    freeze_all_but_layers(model)
    compare_with_plain(model, make_rows(tmp_path), packing=packing)
    assert head_is_plain(model)


@pytest.mark.parametrize("packing", [False, True])
def test_weighted_losses_are_the_weighted_mean_of_single_tokens(tmp_path: Path, packing: bool) -> None:
    model = load(make_tiny_base(tmp_path / "base", "llama"))
    freeze_all_but_layers(model)
    generator = torch.Generator().manual_seed(3)
    rows, total, divisor = TokenRows(tmp_path), torch.zeros(()), 0.0
    for line, length in enumerate((17, 5, 11), start=1):
        ids = torch.randint(4, 300, (length,), generator=generator)
        weights = (torch.rand(length, generator=generator) + 0.1) if line != 2 else torch.ones(length)
        rows._append(line, ids.tolist(), [True] * length, weights.tolist() if line != 2 else None)
        losses_T = functional.cross_entropy(model(input_ids=ids[None]).logits[0, :-1], ids[1:], reduction="none")
        total = total + (losses_T * weights[1:]).sum()
        divisor += weights[1:].sum().item()
    rows._close()
    (total / divisor).backward()
    wanted = gradients(model)
    model.zero_grad()
    batch = collate([0, 1, 2], rows, packing=packing, pad_id=2)
    summed, weight = summed_cross_entropy(model, batch)
    (summed / weight).backward()
    assert weight.item() == pytest.approx(divisor, rel=1e-6)
    assert batch.loss_weight == pytest.approx(divisor, rel=1e-6)
    assert summed.item() == pytest.approx(total.item(), rel=1e-5)
    for name, gradient in wanted.items():
        torch.testing.assert_close(gradients(model)[name], gradient, rtol=1e-3, atol=1e-5)


def test_a_trainable_output_layer_gets_the_same_gradients(tmp_path: Path) -> None:
    model = load(make_tiny_base(tmp_path / "base", "llama"))
    compare_with_plain(model, make_rows(tmp_path), packing=True)
    assert model.lm_head.weight.requires_grad


def test_many_chunks_give_what_one_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(make_tiny_base(tmp_path / "base", "llama"))
    freeze_all_but_layers(model)
    monkeypatch.setattr(losses, "LOGIT_BYTES", {"cpu": 1})
    compare_with_plain(model, make_rows(tmp_path), packing=False)


@pytest.mark.parametrize(("kind", "setting"), [("gemma2", "final_logit_softcapping"), ("cohere", "logit_scale")])
def test_what_follows_the_output_layer_is_not_forgotten(tmp_path: Path, kind: str, setting: str) -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model(
        kind, vocab_size=350, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=128, pad_token_id=0,
    )  # fmt: skip
    setattr(config, setting, 0.5)
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    assert not head_is_plain(model)
    freeze_all_but_layers(model)
    compare_with_plain(model, make_rows(tmp_path), packing=False)


def test_no_logits_of_a_whole_batch_are_made(tmp_path: Path) -> None:
    model = load(make_tiny_base(tmp_path / "base", "llama"))
    freeze_all_but_layers(model)
    seen: list[int] = []
    model.lm_head.register_forward_hook(lambda _m, _i, output: seen.append(output.numel()))
    head_is_plain(model)
    seen.clear()
    summed_cross_entropy(model, collate([0, 1, 2], make_rows(tmp_path), packing=False, pad_id=0))
    assert seen == [350]


def test_asking_about_the_output_layer_uses_no_random_numbers(tmp_path: Path) -> None:
    model = load(make_tiny_base(tmp_path / "base", "gpt2"))
    model.train()
    model.transformer.drop.p = 0.5
    torch.manual_seed(1)
    before = torch.get_rng_state()
    head_is_plain(model)
    assert torch.equal(before, torch.get_rng_state())

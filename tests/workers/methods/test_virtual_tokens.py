"""What holds for prefix tuning, prompt tuning and P-tuning alike, with each of their settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
)
from safetensors.torch import load_file

from tests.tiny import FAMILIES, make_tiny_base
from tests.workers.methods.trying import (
    attach,
    disturb,
    gradients,
    packed,
    padded,
    random_rows,
    recipe_of,
    trainable,
)
from workers import adapters, base_models, checkpoints
from workers.base_folders import read_base_folder
from workers.generation import context_room, generate
from workers.losses import head_is_plain, summed_cross_entropy
from workers.methods import get_method

COUNT = 6
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "prompt, random": ("prompt_tuning", {"num_virtual_tokens": COUNT}),
    "prompt, text": ("prompt_tuning", {"num_virtual_tokens": COUNT, "init": "text", "init_text": "user assistant"}),
    "encoder, MLP": ("p_tuning", {"num_virtual_tokens": COUNT}),
    "encoder, LSTM": ("p_tuning", {"num_virtual_tokens": COUNT, "encoder": "LSTM", "encoder_size": 24}),
    "prefix": ("prefix_tuning", {"num_virtual_tokens": COUNT}),
    "prefix, projected": ("prefix_tuning", {"num_virtual_tokens": COUNT, "projection": True, "projection_size": 16}),
}
UPSTREAM: dict[str, Any] = {
    "prompt_tuning": PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=COUNT),
    "p_tuning": PromptEncoderConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=COUNT, encoder_hidden_size=16),
    "prefix_tuning": PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=COUNT),
}
PRECISIONS = ("float32", "bfloat16", "nf4", "int8")
GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {family: make_tiny_base(root / family, family) for family in FAMILIES}


def fresh(folder: Path, precision: Any = "float32") -> Any:
    return base_models.load(folder, precision, "cpu", checked=True).model


def attached(variant: str, folder: Path, precision: Any = "float32") -> Any:
    name, settings = VARIANTS[variant]
    adapted = attach(name, folder, precision, settings)
    disturb(adapted)
    return adapted


def own_logits(model: Any, ids_BT: torch.Tensor, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids_BT, **inputs).logits[:, -ids_BT.shape[1] :]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_plain_peft_gives_our_logits_and_answers(variant: str, family, bases, tmp_path: Path) -> None:
    ours = attached(variant, bases[family]).eval()
    adapters.save(ours, tmp_path, recipe=recipe_of(VARIANTS[variant][0]), hub_id="owner/base")
    assert list(load_file(tmp_path / "adapter_model.safetensors")) == ["prompt_embeddings"]
    theirs = PeftModel.from_pretrained(fresh(bases[family]), str(tmp_path)).eval()
    ids_BT = torch.tensor(random_rows(14, 14))
    torch.testing.assert_close(own_logits(ours, ids_BT), own_logits(theirs, ids_BT), rtol=1e-5, atol=1e-5)
    expected = theirs.generate(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), **GREEDY)
    for use_cache in (True, False):
        found = ours.generate(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), use_cache=use_cache, **GREEDY)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", UPSTREAM)
def test_what_plain_peft_saves_gives_its_logits_and_answers_here(name: str, family, bases, tmp_path: Path) -> None:
    torch.manual_seed(3)
    config = type(UPSTREAM[name])(**{**UPSTREAM[name].to_dict(), "peft_type": None})
    theirs = get_peft_model(fresh(bases[family]), config).eval()
    theirs.save_pretrained(str(tmp_path), save_embedding_layers=False)
    ours = adapters.load(fresh(bases[family]), tmp_path)
    assert not trainable(ours)
    ids_BT = torch.tensor(random_rows(14, 14))
    torch.testing.assert_close(own_logits(ours, ids_BT), own_logits(theirs, ids_BT), rtol=1e-5, atol=1e-5)
    inputs = {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT)}
    assert torch.equal(ours.generate(**inputs, **GREEDY), theirs.generate(**inputs, **GREEDY))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_answer_is_the_same_alone_and_in_a_batch(variant: str, family, bases) -> None:
    adapted = attached(variant, bases[family]).eval()
    rows = random_rows(13, 5, 9)
    longest = max(map(len, rows))
    ids_BT = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask_BT = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    alone = [adapted.generate(input_ids=torch.tensor([row]), **GREEDY)[0, len(row) :].tolist() for row in rows]
    for use_cache in (True, False):
        together = adapted.generate(input_ids=ids_BT, attention_mask=mask_BT, use_cache=use_cache, **GREEDY)
        assert together[:, longest:].tolist() == alone
        assert generate(adapted, rows, max_new_tokens=8, stop_ids=(), use_cache=use_cache) == alone


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_and_checkpointed_rows_give_the_gradients_of_separate_ones(variant: str, precision, bases) -> None:
    adapted = attached(variant, bases["llama"], precision)
    rows = random_rows(21, 9, 14)
    loss, gradient = gradients(adapted, padded(rows))
    packed_loss, packed_gradient = gradients(adapted, packed(rows))
    assert packed_loss == pytest.approx(loss, rel=1e-4 if precision == "float32" else 3e-2)
    assert (packed_gradient - gradient).norm() / gradient.norm() < (1e-3 if precision == "float32" else 0.15)
    adapted.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    again, checkpointed = gradients(adapted, padded(rows))
    assert again == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(checkpointed, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_packed_unevenly_into_several_tensor_rows_keep_their_logits(variant: str, family, bases) -> None:
    adapted = attached(variant, bases[family]).eval()
    first, second, third, fourth = random_rows(7, 4, 5, 16)
    positions_BT = torch.stack([torch.cat([torch.arange(n) for n in (7, 4, 5)]), torch.arange(16)])
    with torch.no_grad():
        together = adapted(
            input_ids=torch.tensor([first + second + third, fourth]), position_ids=positions_BT, use_cache=False
        ).logits
        apart = [adapted(input_ids=torch.tensor([row])).logits[0] for row in (first, second, third, fourth)]
    torch.testing.assert_close(together[0], torch.cat(apart[:3]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(together[1], apart[3], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_reading_piece_by_piece_with_a_cache_gives_the_logits_of_one_pass(variant: str, family, bases) -> None:
    adapted = attached(variant, bases[family]).eval()
    ids_BT = torch.tensor(random_rows(12, 12))
    whole = own_logits(adapted, ids_BT)
    cache, pieces = None, []
    with torch.no_grad():
        for piece in ids_BT.split((5, 1, 6), dim=1):
            output = adapted(input_ids=piece, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            pieces.append(output.logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_comes_out_belongs_to_the_rows_own_tokens(variant: str, family, bases) -> None:
    adapted = attached(variant, bases[family]).eval()
    assert head_is_plain(adapted)
    ids_BT = torch.tensor(random_rows(11, 11))
    with torch.no_grad():
        output = adapted(input_ids=ids_BT, output_hidden_states=True, labels=ids_BT)
        last = adapted(input_ids=ids_BT, logits_to_keep=1).logits
        embedded = adapted(inputs_embeds=adapted.get_base_model().get_input_embeddings()(ids_BT)).logits
    assert output.logits.shape == (2, 11, adapted.config.vocab_size)
    assert {states.shape[1] for states in output.hidden_states} == {11}
    torch.testing.assert_close(last[:, -1], output.logits[:, -1])
    torch.testing.assert_close(embedded, output.logits)
    expected = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)
    loss, count = summed_cross_entropy(adapted, padded(ids_BT.tolist()))
    assert loss.item() / int(count) == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_formula_gives_the_real_number_of_parameters(family, variant: str, bases) -> None:
    name, settings = VARIANTS[variant]
    method = get_method(name)
    adapted = attached(variant, bases[family])
    assert all(parameter.dtype == torch.float32 for parameter in trainable(adapted).values())
    assert sum(parameter.numel() for parameter in trainable(adapted).values()) == method.num_trainable(
        method.read_settings(settings), read_base_folder(bases[family]).shape
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_can_be_switched_off_and_taken_off(variant: str, bases) -> None:
    ids_BT = torch.tensor(random_rows(10))
    base = fresh(bases["gemma"])
    expected, answer = own_logits(base, ids_BT), base.generate(input_ids=ids_BT, **GREEDY)
    adapted = attached(variant, bases["gemma"]).eval()
    with_adapter = own_logits(adapted, ids_BT)
    assert not torch.equal(with_adapter, expected)
    with adapted.disable_adapter():
        assert torch.equal(own_logits(adapted, ids_BT), expected)
        assert torch.equal(adapted.generate(input_ids=ids_BT, **GREEDY), answer)
    assert torch.equal(own_logits(adapted, ids_BT), with_adapter)
    assert torch.equal(own_logits(adapted.unload(), ids_BT), expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_that_resumes_ends_with_the_same_bits(variant: str, bases, tmp_path: Path) -> None:
    batch = padded(random_rows(24, 17))

    def steps(model: Any, optimizer: torch.optim.Optimizer, count: int) -> None:
        for _ in range(count):
            loss, tokens = summed_cross_entropy(model, batch)
            (loss / tokens).backward()
            optimizer.step()
            optimizer.zero_grad()

    def optimizer_of(model: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(trainable(model).values(), lr=1e-2)

    unbroken = attached(variant, bases["qwen2"])
    optimizer = optimizer_of(unbroken)
    steps(unbroken, optimizer, 2)
    position = checkpoints.Position(2, 0, 0, 0, 2, 0.0, None, None)
    saved = checkpoints.save(
        tmp_path, attempt=1, position=position, recipe_sha256="", versions={}, model=unbroken, optimizer=optimizer
    )
    steps(unbroken, optimizer, 3)
    resumed = attached(variant, bases["qwen2"])
    optimizer = optimizer_of(resumed)
    checkpoints.restore(saved, model=resumed, optimizer=optimizer)
    steps(resumed, optimizer, 3)
    for name, parameter in trainable(resumed).items():
        assert torch.equal(parameter, trainable(unbroken)[name]), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_its_loss_falls_at_the_methods_own_learning_rate(variant: str, bases) -> None:
    name, settings = VARIANTS[variant]
    adapted = attach(name, bases["llama"], "float32", settings)
    optimizer = torch.optim.AdamW(trainable(adapted).values(), lr=get_method(name).learning_rate, weight_decay=0.0)
    batch = padded(random_rows(24, 17))
    losses = []
    for _ in range(12):
        loss, count = summed_cross_entropy(adapted, batch)
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item() / int(count))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_first_gradient_reaches_every_part(variant: str, bases) -> None:
    name, settings = VARIANTS[variant]
    adapted = attach(name, bases["llama"], "float32", settings)
    gradients(adapted, padded(random_rows(24, 17)))
    assert all(parameter.grad.abs().max() > 0 for parameter in trainable(adapted).values())


@pytest.mark.parametrize("variant", VARIANTS)
def test_virtual_tokens_take_their_share_of_the_context(variant: str, bases) -> None:
    name, settings = VARIANTS[variant]
    method = get_method(name)
    shape = read_base_folder(bases["llama"]).shape
    recipe = recipe_of(name)
    assert method.num_virtual_tokens(method.read_settings(settings)) == COUNT
    assert context_room(attached(variant, bases["llama"])) == shape.context_length - COUNT
    assert method.refusals(recipe, shape) == {}
    half = shape.context_length // 2
    for count, refused in ((half, True), (half - 1, False)):
        found = method.refusals(recipe.model_copy(update={"settings": {"num_virtual_tokens": count}}), shape)
        assert ("settings.num_virtual_tokens" in found) == refused
    # A short context is filled by the default alone.
    short = shape.model_copy(update={"context_length": 40})
    assert "at most 19" in method.refusals(recipe, short)["settings.num_virtual_tokens"]


def test_weights_of_another_shape_are_refused_in_words(bases, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from workers.errors import BaseModelError

    adapted = attached("prompt, random", bases["llama"])
    adapters.save(adapted, tmp_path, recipe=recipe_of("prompt_tuning"), hub_id="owner/base")
    # One row would be spread over all six by broadcasting.
    save_file({"prompt_embeddings": torch.zeros(1, 64)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(BaseModelError, match="does not fit"):
        adapters.load(fresh(bases["llama"]), tmp_path)

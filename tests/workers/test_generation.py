from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.tiny import make_tiny_base
from workers import base_models
from workers.generation import generate


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder: Path = make_tiny_base(tmp_path_factory.mktemp("bases") / "llama")
    return base_models.load(folder, "float32", "cpu").model


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(4, 250, (length,), generator=generator).tolist() for length in (5, 17, 9, 12, 5)]


def reference(model, prompt: list[int], stop: int, max_new_tokens: int) -> list[int]:
    ids = torch.tensor([prompt])
    found = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_new_tokens,
        eos_token_id=stop, pad_token_id=0,
    )[0, len(prompt) :].tolist()  # fmt: skip
    return found[: found.index(stop)] if stop in found else found


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_it_writes_what_transformers_writes_row_by_row(model, batch_size: int, use_cache: bool) -> None:
    # A token that one of the answers really contains, so that rows end at different times.
    stop = reference(model, prompts()[1], stop=383, max_new_tokens=12)[4]
    expected = [reference(model, prompt, stop, 12) for prompt in prompts()]
    assert len({len(answer) for answer in expected}) > 1
    found = generate(model, prompts(), max_new_tokens=12, stop_ids=[stop], batch_size=batch_size, use_cache=use_cache)
    assert found == expected


def test_it_reports_finished_rows_and_ends_when_told(model) -> None:
    told: list[int] = []
    found = generate(
        model, prompts(), max_new_tokens=3, stop_ids=[], batch_size=2, on_finished=lambda n: told.append(n) or True
    )
    assert told == [2]
    assert sum(bool(answer) for answer in found) == 2


def test_it_ends_where_the_context_ends(model) -> None:
    long = [7] * 510
    found = generate(model, [long, [7] * 600], max_new_tokens=50, stop_ids=[])
    assert len(found[0]) == 2
    assert found[1] == []


def test_sampling_follows_its_seed_and_not_the_global_one(model) -> None:
    arguments = {"max_new_tokens": 8, "stop_ids": [], "temperature": 1.5, "top_p": 0.9}
    first = generate(model, prompts(), seed=1, **arguments)
    torch.manual_seed(99)
    assert generate(model, prompts(), seed=1, **arguments) == first
    assert generate(model, prompts(), seed=2, **arguments) != first


def test_it_leaves_the_mode_as_it_was(model) -> None:
    model.train()
    generate(model, prompts()[:1], max_new_tokens=1, stop_ids=[])
    assert model.training
    model.eval()


def test_each_prompt_may_have_a_limit_of_its_own(model) -> None:
    whole = generate(model, prompts(), max_new_tokens=9, stop_ids=[])
    limits = [9, 0, 3, 1, 5]
    found = generate(model, prompts(), max_new_tokens=limits, stop_ids=[], batch_size=3)
    assert found == [answer[:limit] for answer, limit in zip(whole, limits, strict=True)]
    with pytest.raises(ValueError, match="2 limits for 5 prompts"):
        generate(model, prompts(), max_new_tokens=[1, 2], stop_ids=[])


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_stop_is_obeyed_before_the_next_token(model, use_cache: bool) -> None:
    told: list[int] = []
    asked: list[object] = []

    def stop_in_the_second_row() -> bool:
        asked.append(None)
        return bool(told)

    found = generate(
        model, [prompts()[1], prompts()[0]], max_new_tokens=4, stop_ids=[], batch_size=1, use_cache=use_cache,
        on_finished=lambda n: told.append(n), should_stop=stop_in_the_second_row,
    )  # fmt: skip
    assert (len(found[0]), found[1], told) == (4, [], [1])
    assert 3 <= len(asked) <= 5, "before each token of the first row, and once more"
    assert model.training is False

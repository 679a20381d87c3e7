"""Prompt tuning by itself, and what peft 0.21.2 gets wrong about prompts of any kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PromptTuningConfig, TaskType, get_peft_model
from tokenizers import Tokenizer

from tests.tiny import FAMILIES, make_tiny_base
from tests.workers.methods.trying import attach, packed, random_rows, recipe_of
from workers import adapters, base_models
from workers.errors import RecipeError

COUNT = 6
TEXT = {"num_virtual_tokens": COUNT, "init": "text", "init_text": "user assistant"}


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {family: make_tiny_base(root / family, family) for family in FAMILIES}


def fresh(folder: Path) -> Any:
    return base_models.load(folder, "float32", "cpu", checked=True).model


def prompt_ids(folder: Path) -> list[int]:
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode("user assistant", add_special_tokens=False).ids
    return (ids * COUNT)[:COUNT]


@pytest.mark.parametrize("family", FAMILIES)
def test_it_begins_as_the_base_that_reads_the_text_first(family, bases) -> None:
    adapted = attach("prompt_tuning", bases[family], "float32", TEXT).eval()
    row = random_rows(12)[0]
    with torch.no_grad():
        expected = fresh(bases[family])(input_ids=torch.tensor([prompt_ids(bases[family]) + row])).logits[:, COUNT:]
        torch.testing.assert_close(adapted(input_ids=torch.tensor([row])).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_random_start_is_made_of_tokens_of_the_vocabulary(family, bases) -> None:
    adapted = attach("prompt_tuning", bases[family], "float32", {"num_virtual_tokens": 20})
    embeddings = adapted.get_base_model().get_input_embeddings()
    vocabulary_VH = embeddings(torch.arange(adapted.config.vocab_size))
    places = (adapted.prompt()[:, None] == vocabulary_VH).all(dim=-1).nonzero()
    assert places[:, 0].tolist() == list(range(20))
    chosen = places[:, 1].tolist()
    assert len(set(chosen)) == 20
    special = Tokenizer.from_file(str(bases[family] / "tokenizer.json")).get_added_tokens_decoder()
    assert special
    assert not set(chosen) & set(special)


def test_the_seed_decides_the_random_start(bases) -> None:
    from workers.layers.prompt import attach_prompt

    def start(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        adapted = attach_prompt(fresh(bases["llama"]), num_virtual_tokens=20, init="random", init_text="unused")
        return adapted.prompt()

    assert torch.equal(start(6), start(6))
    assert not torch.equal(start(6), start(7))


def test_a_prompt_longer_than_the_vocabulary_repeats_it(tmp_path: Path) -> None:
    adapted = attach("prompt_tuning", make_tiny_base(tmp_path / "base"), "float32", {"num_virtual_tokens": 700})
    assert adapted.prompt().shape == (700, 64)


@pytest.mark.parametrize("text", ["user assistant " * 30, "user"])
def test_a_text_is_cut_or_repeated_to_length(text: str, bases) -> None:
    adapted = attach("prompt_tuning", bases["llama"], "float32", TEXT | {"init_text": text})
    ids = Tokenizer.from_file(str(bases["llama"] / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    expected = fresh(bases["llama"]).get_input_embeddings()(torch.tensor((ids * COUNT)[:COUNT]))
    assert torch.equal(adapted.prompt(), expected)


def test_a_text_without_tokens_is_refused_in_words(bases, monkeypatch) -> None:
    from workers.layers import virtual_tokens

    class Silent:
        def encode(self, _text: str, *, add_special_tokens: bool) -> Any:
            return type("Encoding", (), {"ids": []})()

    monkeypatch.setattr(virtual_tokens, "read_tokenizer", lambda _model: Silent())
    with pytest.raises(RecipeError, match="starting text is empty") as caught:
        attach("prompt_tuning", bases["llama"], "float32", TEXT)
    assert caught.value.field == "settings.init_text"


def test_the_saved_folder_names_no_path(bases, tmp_path: Path) -> None:
    adapted = attach("prompt_tuning", bases["llama"], "float32", TEXT)
    adapters.save(adapted, tmp_path, recipe=recipe_of("prompt_tuning"), hub_id="owner/base")
    text = (tmp_path / "adapter_config.json").read_text()
    assert str(bases["llama"]) not in text
    assert json.loads(text)["peft_type"] == "PROMPT_TUNING"


def test_a_mask_made_for_a_static_cache_is_refused_in_words(bases) -> None:
    adapted = attach("prompt_tuning", bases["llama"], "float32").eval()
    with pytest.raises(ValueError, match="default cache"):
        adapted.generate(
            input_ids=torch.tensor(random_rows(6)), cache_implementation="static", max_new_tokens=3, do_sample=False
        )


def test_a_sliding_window_counts_the_prompt_among_the_tokens_behind(tmp_path: Path) -> None:
    folder = make_tiny_base(tmp_path / "mistral", "mistral")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"sliding_window": 8}))
    adapted = attach("prompt_tuning", folder, "float32", TEXT).eval()
    rows = random_rows(20, 9)
    batch = packed(rows)
    with torch.no_grad():
        together = adapted(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits[0]
        base = fresh(folder)
        apart = [base(input_ids=torch.tensor([prompt_ids(folder) + row])).logits[0, COUNT:] for row in rows]
    torch.testing.assert_close(together, torch.cat(apart), rtol=1e-4, atol=1e-4)


def test_a_mask_says_that_restarting_positions_are_one_row(bases) -> None:
    # As the base has it: left-padded rows have position 0 several times.
    adapted = attach("prompt_tuning", bases["llama"], "float32", TEXT).eval()
    base = fresh(bases["llama"])
    batch = packed(random_rows(9, 5))
    assert batch.position_ids is not None
    prompt = torch.tensor([prompt_ids(bases["llama"])])
    with torch.no_grad():
        found = adapted(
            input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=torch.ones_like(batch.input_ids)
        ).logits
        ids_BS = torch.cat([prompt, batch.input_ids], dim=1)
        positions_BS = torch.cat([torch.arange(COUNT)[None], batch.position_ids + COUNT], dim=1)
        expected = base(input_ids=ids_BS, position_ids=positions_BS, attention_mask=torch.ones_like(ids_BS)).logits
    torch.testing.assert_close(found, expected[:, COUNT:], rtol=1e-5, atol=1e-5)


def test_packed_rows_need_no_word_about_the_cache(bases) -> None:
    # The base makes a cache when nothing is said, and then masks packed rows as one.
    adapted = attach("prompt_tuning", bases["llama"], "float32", TEXT).eval()
    batch = packed(random_rows(9, 5))
    inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids}
    with torch.no_grad():
        assert torch.equal(adapted(**inputs).logits, adapted(**inputs, use_cache=False).logits)


# --- what is wrong in peft 0.21.2, which workers/layers/prompt.py answers; when one of these fails, peft was mended ---


def upstream(bases, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=COUNT, **settings)
    return get_peft_model(fresh(bases["llama"]), config).eval()


def test_upstream_still_gives_logits_of_virtual_tokens(bases) -> None:
    ids_BT = torch.tensor(random_rows(12))
    assert upstream(bases)(input_ids=ids_BT).logits.shape[1] == 12 + COUNT


def test_upstream_is_still_wrong_for_packed_rows(bases) -> None:
    rows = random_rows(20, 12)
    model = upstream(bases)
    batch = packed(rows)
    with torch.no_grad():
        apart = torch.cat([model(input_ids=torch.tensor([row])).logits[0, -len(row) :] for row in rows])
        together = model(input_ids=batch.input_ids, position_ids=batch.position_ids).logits[0, -32:]
    assert (together - apart).abs().max() > 1e-2


def test_upstream_still_moves_a_padded_row_away_from_its_prompt(bases) -> None:
    row = random_rows(9)[0]
    model = upstream(bases)
    mask_BT = torch.tensor([[0] * 40 + [1] * 9])
    seen: list[torch.Tensor] = []
    model.base_model.model.rotary_emb.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    arguments = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 0}
    model.generate(input_ids=torch.tensor([[0] * 40 + row]), attention_mask=mask_BT, **arguments)
    assert seen[0][0, -9:].tolist() != list(range(COUNT, COUNT + 9))


def test_upstream_still_leaves_the_tokenizers_path_in_the_file(bases, tmp_path: Path) -> None:
    model = upstream(
        bases,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text="user assistant",
        tokenizer_name_or_path=str(bases["llama"]),
    )
    model.save_pretrained(str(tmp_path), save_embedding_layers=False)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["tokenizer_name_or_path"] == str(bases["llama"])

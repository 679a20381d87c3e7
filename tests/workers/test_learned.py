"""What is shown as learned is what the trainer's batch holds, token by token."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer

from tests.tiny import make_tiny_base
from tests.workers.formats.samples import SAMPLES
from workers.batching import TokenRows, collate
from workers.examples import AnyExample, Example, Message, PreferenceExample, TextExample, UnpairedExample
from workers.formats import formats, get_format
from workers.learned import MAX_CHARACTERS, Conversation, learned
from workers.objectives import is_trainable
from workers.rendering import LossOn, Renderer

MANY = 100_000
TURN = "{{ message['content'] | trim }}"
# Written after the families' own templates: their markers, what they trim and where a turn ends.
TEMPLATES: dict[str, tuple[str, list[str], str]] = {
    "chatml": ("", [], "<|im_end|>"),
    "chatml with generation tags": (
        "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
        "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}"
        "{% else %}{{ message.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        [],
        "<|im_end|>",
    ),
    "llama 3": (
        "{{ bos_token }}{% for message in messages %}"
        "<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n" + TURN + "<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "<|eot_id|>",
    ),
    "mistral": (
        "{{ bos_token }}{% for message in messages %}"
        "{% if message.role == 'assistant' %} " + TURN + "{{ eos_token }}"
        "{% else %}[INST] " + TURN + " [/INST]{% endif %}{% endfor %}",
        ["<s>", "</s>", "[INST]", "[/INST]"],
        "</s>",
    ),
    "gemma": (
        "{{ bos_token }}{% for message in messages %}"
        "<start_of_turn>{{ 'model' if message.role == 'assistant' else message.role }}\n" + TURN + "<end_of_turn>\n"
        "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        ["<bos>", "<start_of_turn>", "<end_of_turn>"],
        "<end_of_turn>",
    ),
    "phi 3": (
        "{% for message in messages %}<|{{ message.role }}|>\n" + TURN + "<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
        ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "</s>"],
        "<|end|>",
    ),
    "qwen with tools": (
        "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
        "{% for message in messages %}<|im_start|>{{ message.role }}\n"
        "{% if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>\n{% endif %}"
        "{{ message.content }}{% for call in message.tool_calls %}"
        "<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        [],
        "<|im_end|>",
    ),
    "no template": ("-", [], "<|im_end|>"),
}


def make_base(folder: Path, family: str) -> Path:
    """A tiny base whose tokenizer knows a family's markers and whose turns are framed by its template."""
    template, markers, stop = TEMPLATES[family]
    make_tiny_base(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(one, special=True, normalized=False) for one in markers])
    tokenizer.save(str(folder / "tokenizer.json"))
    if template == "-":
        (folder / "chat_template.jinja").unlink()
    elif template:
        (folder / "chat_template.jinja").write_text(template, "utf-8")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"bos_token": markers[0], "eos_token": "</s>" if "</s>" in markers else stop} if markers else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def sample_rows() -> list[AnyExample]:
    """A row of every dialect of every format that some objective learns from, and conversations of many kinds."""
    found: list[AnyExample] = []
    for line, ((name, _dialect), row) in enumerate(SAMPLES.items(), start=1):
        plugin = get_format(name)
        if is_trainable(plugin.example_type):
            example, problems = plugin.parse(row, line, plugin.recognise([row])[1])
            assert example is not None, problems
            found.append(example)
    long = "What does the cat say? " * 30
    user, answer = Message("user", "Größe? 日本語 🙂"), Message("assistant", "ja 🙂 meow")
    for messages in (
        (user, answer, Message("user", "and <|im_end|> the dog?"), Message("assistant", "woof </s> woof")),
        (user, Message("assistant", "quiet", train=False), user, Message("assistant", "loud", weight=0.25)),
        (Message("user", long), answer),
        (user, Message("assistant", long)),
    ):
        found.append(Example(len(found) + 1, messages))
    return found


def shown_and_batched(
    renderer: Renderer, examples: Sequence[AnyExample], folder: Path
) -> tuple[list[Conversation], TokenRows]:
    shown = [one for example in examples for one in learned(renderer, example, max_tokens=MANY)]
    rows = [one for example in examples for one in example.conversations()]
    return shown, TokenRows.render(rows, renderer, folder)[0]


def test_every_type_that_trains_is_among_the_rows() -> None:
    types = {plugin.example_type for plugin in formats().values() if is_trainable(plugin.example_type)}
    assert {example.type for example in sample_rows()} == types != set()


@pytest.mark.parametrize("loss_on", ["assistant", "all"])
@pytest.mark.parametrize("max_length", [24, 64, 4096])
@pytest.mark.parametrize("family", TEMPLATES)
def test_what_is_shown_is_the_batch_that_is_trained(
    tmp_path: Path, family: str, max_length: int, loss_on: LossOn
) -> None:
    folder = make_base(tmp_path / "base", family)
    shown, rows = shown_and_batched(
        Renderer(folder, max_length=max_length, loss_on=loss_on), sample_rows(), tmp_path
    )  # fmt: skip
    usable = [one for one in shown if not one.problem]
    assert len(usable) == len(rows) > 3
    for packing in (True, False):
        batch = collate(range(len(rows)), rows, packing=packing, pad_id=0)
        flat = batch.input_ids.flatten()
        for index, conversation in enumerate(usable):
            kept = [one for one in conversation.tokens if one.kind != "cut"]
            start = sum(batch.lengths[:index]) if packing else index * batch.input_ids.shape[1]
            assert flat[start : start + len(kept)].tolist() == [one.id for one in kept]
            assert batch.lengths[index] == len(kept) == conversation.num_trained + conversation.num_context
            own = batch.rows_N == index
            # A position predicts the token behind it.
            assert (batch.positions_N[own] + 1 - start).tolist() == [
                place for place, one in enumerate(kept) if one.kind == "trained"
            ]
            trained = [one for one in kept if one.kind == "trained"]
            assert batch.targets_N[own].tolist() == [one.id for one in trained]
            # Without weights each token counts 1; uncut, one of the rows has a weight.
            assert batch.weights_N is not None or max_length < 4096
            weights = torch.ones(len(flat)) if batch.weights_N is None else batch.weights_N[own]
            assert weights[: len(trained)].tolist() == [one.weight for one in trained]


@pytest.mark.parametrize("family", TEMPLATES)
def test_counts_are_those_of_the_tokens_and_their_texts_are_the_whole_row(tmp_path: Path, family: str) -> None:
    folder = make_base(tmp_path, family)
    renderer = Renderer(folder, max_length=40, loss_on="assistant")
    for example in sample_rows():
        (found,) = learned(renderer, example, max_tokens=MANY)
        kinds = [one.kind for one in found.tokens]
        assert [kinds.count(kind) for kind in ("trained", "context", "cut")] == [
            found.num_trained, found.num_context, found.num_cut,
        ]  # fmt: skip
        assert len(kinds) == found.num_tokens
        if found.tokens:
            whole = renderer.with_limits(max_length=MANY, loss_on="assistant").render(example)  # type: ignore[arg-type]
            assert "".join(one.text for one in found.tokens) == whole.text
            assert found.num_trained + found.num_cut_trained == whole.num_trained


@pytest.mark.parametrize("loss_on", ["assistant", "all"])
@pytest.mark.parametrize("family", TEMPLATES)
def test_a_turn_that_ends_in_the_end_of_turn_token_is_in_order(tmp_path: Path, family: str, loss_on: LossOn) -> None:
    renderer = Renderer(make_base(tmp_path, family), max_length=512, loss_on=loss_on)
    example = Example(1, (Message("user", "hi"), Message("assistant", "hello")))
    (found,) = learned(renderer, example, max_tokens=MANY)
    assert TEMPLATES[family][2] in renderer.stop_tokens()
    assert found.end_problem == ""
    assert any(one.is_end and one.kind == "trained" for one in found.tokens)


def test_a_template_without_an_end_of_turn_is_named(tmp_path: Path) -> None:
    make_tiny_base(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(
        "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    example = Example(1, (Message("user", "hi"), Message("assistant", "hello")))
    for loss_on in ("assistant", "all"):
        (found,) = learned(Renderer(tmp_path, max_length=512, loss_on=loss_on), example, max_tokens=MANY)  # type: ignore[arg-type]
        assert "does not end in an end-of-turn token (this base stops at <|im_end|>)" in found.end_problem
        assert "never stops by itself" in found.end_problem
        assert not found.problem


def test_an_end_that_is_cut_off_is_told_from_one_that_is_missing(tmp_path: Path) -> None:
    example = Example(1, (Message("user", "hi"), Message("assistant", "one two three four five")))
    renderer = Renderer(make_tiny_base(tmp_path), max_length=512, loss_on="assistant")
    (whole,) = learned(renderer, example, max_tokens=MANY)
    shorter = renderer.with_limits(max_length=whole.num_tokens - 3, loss_on="assistant")
    (cut,) = learned(shorter, example, max_tokens=MANY)
    assert whole.end_problem == ""
    assert "lies behind token" in cut.end_problem
    assert (cut.num_cut, cut.num_cut_trained) == (3, 2), "the newline behind the turn is not trained"


def test_a_row_that_training_leaves_out_says_why(tmp_path: Path) -> None:
    example = Example(1, (Message("user", "hi " * 40), Message("assistant", "hello")))
    (found,) = learned(Renderer(make_tiny_base(tmp_path), max_length=16, loss_on="assistant"), example, max_tokens=MANY)
    assert "behind token 16, where it is cut. Raise the maximum length" in found.problem
    assert {one.kind for one in found.tokens} == {"context", "cut"}
    assert found.num_cut_trained > 0


def test_pairs_and_verdicts_are_shown_answer_by_answer_and_plain_text_is_not(tmp_path: Path) -> None:
    renderer = Renderer(make_tiny_base(tmp_path), max_length=512, loss_on="assistant")
    prompt, good, bad = (Message("user", "hi"),), (Message("assistant", "yes"),), (Message("assistant", "no"),)
    pair = learned(renderer, PreferenceExample(1, prompt, good, bad), max_tokens=MANY)
    assert [one.label for one in pair] == ["Chosen", "Rejected"]
    assert [one.label for one in learned(renderer, UnpairedExample(1, prompt, bad, False), max_tokens=9)] == [
        "Unwanted answer"
    ]
    assert learned(renderer, TextExample(1, "just words"), max_tokens=MANY) == []


def test_what_is_listed_and_what_is_rendered_have_a_limit(tmp_path: Path) -> None:
    renderer = Renderer(make_tiny_base(tmp_path), max_length=512, loss_on="assistant")
    (found,) = learned(renderer, Example(1, (Message("user", "a b c"), Message("assistant", "d"))), max_tokens=4)
    assert len(found.tokens) == 4 < found.num_tokens
    huge = Example(1, (Message("user", "x" * MAX_CHARACTERS), Message("assistant", "y")))
    (refused,) = learned(renderer, huge, max_tokens=4)
    assert "rows of up to 1,000,000 are shown" in refused.problem

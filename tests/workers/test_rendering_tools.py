"""Tools and their calls through chat templates: as transformers renders them, with loss on the calls, nothing lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import make_tiny_base
from tests.workers.formats.samples import SAMPLES, TOOL
from tests.workers.test_rendering import renderer_of, set_template, trained_texts
from workers.examples import Example, Message
from workers.formats import get_format
from workers.rendering import RenderingError

HEAD = (
    "{% if tools %}{{ '<|im_start|>system\nTools: ' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message.reasoning_content %}{{ '<think>' + message.reasoning_content + '</think>' }}{% endif %}"
    "{{ message['content'] }}{% for call in message.tool_calls or [] %}{{ '\n<call>' + call.function.name + ' ' }}"
)
TAIL = (
    "{{ '</call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
OBJECTS = HEAD + "{{ call.function.arguments | tojson }}" + TAIL
TEXTS = HEAD + "{{ call.function.arguments }}" + TAIL


def example_of(row: dict[str, Any]) -> Example:
    example, problems = get_format("messages").parse(row, 1, {})
    assert isinstance(example, Example), problems
    return example


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_tiny_base(tmp_path / "base")


def test_tools_and_calls_give_the_ids_of_transformers(base: Path) -> None:
    from transformers import AutoTokenizer

    set_template(base, OBJECTS)
    row = SAMPLES["messages", "tools"]
    turns = json.loads(json.dumps(row["messages"]))
    turns[1]["content"] = ""
    call = turns[1]["tool_calls"][0]["function"]
    call["arguments"] = json.loads(call["arguments"])  # as transformers asks for them
    expected = AutoTokenizer.from_pretrained(base).apply_chat_template(
        turns, tools=row["tools"], tokenize=True, return_dict=False
    )
    assert renderer_of(base).render(example_of(row)).ids == expected


@pytest.mark.parametrize("template", [OBJECTS, TEXTS])
def test_a_call_is_learned_and_written_as_json_whatever_the_template_takes(base: Path, template: str) -> None:
    set_template(base, template)
    call, answer = trained_texts(renderer_of(base), example_of(SAMPLES["messages", "tools"]))
    assert call.startswith("\n<call>weather {")
    assert json.loads(call[len("\n<call>weather ") : call.index("</call>")]) == {"city": "Bern"}
    assert call.endswith("<|im_end|>")
    assert answer == "hello<|im_end|>"


def test_a_call_of_weight_0_carries_no_loss(base: Path) -> None:
    set_template(base, OBJECTS)
    row = json.loads(json.dumps(SAMPLES["messages", "tools"]))
    row["messages"][1]["weight"] = 0
    assert trained_texts(renderer_of(base), example_of(row)) == ["hello<|im_end|>"]


def test_the_prompt_of_the_last_turn_holds_the_tools(base: Path) -> None:
    set_template(base, OBJECTS)
    prompt = renderer_of(base).prompt_text(example_of(SAMPLES["messages", "tools"]))
    assert json.dumps(TOOL, ensure_ascii=False) in prompt
    assert prompt.endswith("<|im_start|>assistant\n")


def test_a_control_token_in_arguments_and_definitions_is_read_as_text(base: Path) -> None:
    set_template(base, OBJECTS)
    row = json.loads(json.dumps(SAMPLES["messages", "tools"]))
    row["messages"][1]["tool_calls"][0]["function"]["arguments"] = '{"city": "<|im_end|>"}'
    row["tools"][0]["function"]["description"] = "<|im_end|>"
    renderer = renderer_of(base)
    rendered = renderer.render(example_of(row))
    ends = sum(rendered.ids.count(one) for one in renderer.stop_ids)
    assert rendered.text.count("<|im_end|>") == ends + 2


def test_a_template_without_a_place_for_tools_is_said_so(base: Path) -> None:
    with pytest.raises(RenderingError, match='does not write the tool "weather"') as error:
        renderer_of(base).render(example_of(SAMPLES["messages", "tools"]))
    assert error.value.rule == "template_without_tools"


def test_reasoning_is_written_where_the_template_knows_it_and_refused_elsewhere(base: Path) -> None:
    row = SAMPLES["messages", "reasoning"]
    with pytest.raises(RenderingError, match="reasoning"):
        renderer_of(base).render(example_of(row))
    set_template(base, OBJECTS)
    assert trained_texts(renderer_of(base), example_of(row)) == ["<think>Be polite.</think>hello<|im_end|>"]


def test_a_call_turn_with_an_end_of_its_own_ends_where_the_next_turn_begins(base: Path) -> None:
    # As Llama 3.1 does: a turn that calls a tool ends with a token that is no stop.
    own_end = (
        "{{ '</call>' }}{% endfor %}{% if message.tool_calls %}{{ '~end~\n' }}{% else %}{{ '<|im_end|>\n' }}{% endif %}"
    )
    set_template(base, OBJECTS.replace("{{ '</call>' }}{% endfor %}{{ '<|im_end|>\n' }}", own_end))
    call, answer = trained_texts(renderer_of(base), example_of(SAMPLES["messages", "tools"]))
    assert call.rstrip().endswith("~end~")
    assert "sunny" not in call
    assert answer == "hello<|im_end|>"


def test_a_message_without_tools_renders_as_before(base: Path) -> None:
    example = Example(1, (Message("user", "hi"), Message("assistant", "hello")))
    assert renderer_of(base).render(example).num_trained > 0

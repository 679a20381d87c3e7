"""Every format recognises its own rows and no other's, and names the line of a bad one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.workers.formats.samples import FORMATS, SAMPLES, TOOL
from workers.examples import AnyExample, Example, Message, PreferenceExample, UnpairedExample
from workers.formats import formats, get_format
from workers.reading import SURE, column_names, read_examples, recognise_rows
from workers.rules import RULES


def test_every_format_has_samples() -> None:
    assert set(FORMATS) == set(formats())


@pytest.mark.parametrize(("name", "dialect"), SAMPLES)
def test_a_format_recognises_its_own_samples_and_no_others(name: str, dialect: str) -> None:
    row = SAMPLES[name, dialect]
    found = recognise_rows([row] * 5)
    assert found is not None
    assert found.format == name
    assert found.confidence >= 0.5
    if name != "mapped":  # the last resort, which guesses at everything
        sure = {other.name for other in formats().values() if other.recognise([row] * 5)[0] >= SURE} - {"mapped"}
        assert sure == {name}
    example, problems = get_format(name).parse(row, 7, found.columns)
    assert problems == []
    assert example is not None
    assert (example.line, example.type) == (7, get_format(name).example_type)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("other", FORMATS)
def test_a_row_of_another_format_is_a_problem_with_its_line(name: str, other: str) -> None:
    if name == other or {name, other} == {"prompt_completion", "kto"}:
        return  # the latter two share their fields but one
    columns = {"prompt": "alpha", "completion": "beta"} if name == "mapped" else {}
    for sample, row in SAMPLES.items():
        if sample[0] != other or (name == "text" and "text" in row) or (name == "kto" and other == "alpaca"):
            continue
        if {name, other} == {"messages", "sharegpt"}:
            continue  # turns are read whatever their keys are called
        example, problems = get_format(name).parse(row, 9, columns)
        if other in ("kto", "preference") and example is not None:
            assert get_format(name).recognise([row])[0] < SURE  # no file of such rows is read as this format
            continue
        assert example is None, sample
        assert problems
        assert all(problem.line == 9 and problem.rule in RULES and problem.fix for problem in problems)


def test_a_stray_row_of_another_format_is_told_what_it_is() -> None:
    _, (problem,) = get_format("messages").parse(SAMPLES["alpaca", "input"], 3, {})
    assert problem.rule == "F011"
    assert "Alpaca" in problem.message


def read(name: str, dialect: str) -> AnyExample:
    row = SAMPLES[name, dialect]
    found = recognise_rows([row])
    assert found is not None
    example, problems = get_format(name).parse(row, 1, found.columns)
    assert example is not None, problems
    return example


def said(messages: tuple[Message, ...]) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in messages]


@pytest.mark.parametrize(
    ("name", "dialect"), [("messages", "tools"), ("messages", "functions"), ("sharegpt", "tools as text")]
)
def test_tool_calls_are_read_in_every_dialect(name: str, dialect: str) -> None:
    example = read(name, dialect)
    assert isinstance(example, Example)
    assert said(example.messages) == [("user", "hi"), ("assistant", ""), ("tool", "sunny"), ("assistant", "hello")]
    (call,) = example.messages[1].tool_calls
    assert call.name == "weather"
    assert json.loads(call.arguments) == ({} if dialect == "functions" else {"city": "Bern"})
    assert json.loads(example.tools) == [{"type": "function", "function": TOOL}]


@pytest.mark.parametrize("dialect", [dialect for name, dialect in SAMPLES if name == "preference"])
def test_every_dialect_of_pairs_gives_the_same_pair(dialect: str) -> None:
    example = read("preference", dialect)
    assert isinstance(example, PreferenceExample)
    if dialect == "TRL implicit texts":
        assert said(example.prompt) == [("user", "The sky is")]
        assert (example.chosen[0].content, example.rejected[0].content) == ("blue.", "green.")
        return
    assert said(example.chosen) == [("assistant", "hello")]
    assert said(example.rejected) == [("assistant", "what")]
    expected = {
        "Argilla": [("system", "Be brief."), ("user", "hi")],
        "LLaMA-Factory Alpaca": [("user", "a"), ("assistant", "b"), ("user", "hi\n\nthere")],
    }
    assert said(example.prompt) == expected.get(dialect, [("user", "hi")])


@pytest.mark.parametrize("dialect", [dialect for name, dialect in SAMPLES if name == "kto"])
def test_every_dialect_of_verdicts_gives_the_answer_and_its_verdict(dialect: str) -> None:
    example = read("kto", dialect)
    assert isinstance(example, UnpairedExample)
    assert (said(example.prompt), said(example.completion)) == ([("user", "hi")], [("assistant", "hello")])
    row = SAMPLES["kto", dialect]
    assert example.label is (row["label"] if "label" in row else row["kto_tag"])


def test_parts_of_text_are_joined_and_reasoning_is_kept() -> None:
    parts = read("messages", "parts")
    assert said(parts.messages) == [("user", "hi"), ("assistant", "hello")]
    assert read("messages", "reasoning").messages[1].reasoning == "Be polite."


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"question": "q", "answer": "a"}, {"prompt": "question", "completion": "answer"}),
        ({"input": "q", "target": "a"}, {"prompt": "input", "completion": "target"}),
        ({"Question": "q", "ANSWER ": "a", "id": "1"}, {"prompt": "Question", "completion": "ANSWER "}),
    ],
)
def test_pairs_of_the_field_are_mapped_by_the_first_guess(row: dict[str, Any], columns: dict[str, str]) -> None:
    found = recognise_rows([row] * 3)
    assert found is not None
    assert (found.format, found.columns) == ("mapped", columns)
    assert found.confidence > 0.8


def test_alpaca_takes_response_system_and_history() -> None:
    row = {"instruction": "I", "input": "", "response": "R", "system": "S", "history": [["u", "a"]]}
    found = recognise_rows([row])
    assert found is not None
    assert (found.format, found.columns) == ("alpaca", {"output": "response"})
    example, _ = get_format("alpaca").parse(row, 1, found.columns)
    assert example is not None
    assert [(m.role, m.content) for m in example.messages] == [
        ("system", "S"), ("user", "u"), ("assistant", "a"), ("user", "I"), ("assistant", "R"),
    ]  # fmt: skip


def test_the_alpaca_prompt_is_the_instruction_a_blank_line_and_the_input() -> None:
    example, _ = get_format("alpaca").parse(SAMPLES["alpaca", "input"], 1, {})
    assert example is not None
    assert example.messages[0].content == "Add.\n\n1 and 2"


def user(content: Any = "hi") -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any = "hello", **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


@pytest.mark.parametrize(
    ("turns", "rule", "says"),
    [
        ([user()], "C103", "ends with a user turn, so there is nothing to learn"),
        ([{"role": "system", "content": "s"}], "C103", "no assistant turn"),
        ([assistant()], "C103", "no user turn before"),
        ([user(), assistant("")], "C102", 'an empty "messages[1].content"'),
        ([user(), assistant(None)], "C102", 'null in "messages[1].content"'),
        ([user(), assistant(["x"])], "C102", "a list in"),
        ([user(), assistant([{"type": "image_url", "image_url": {}}])], "C115", 'of the type "image_url"'),
        ([{**user(), "images": ["a.png"]}, assistant()], "C116", "no text"),
        ([user(), {"role": "assistant"}], "C102", 'no "messages[1].content"'),
        ([user(), {"role": "asistant", "content": "x"}], "C101", 'unknown role "asistant"'),
        ([user(), {"content": "x"}], "C101", 'no "role"'),
        ([user(), {"role": 1, "content": "x"}], "C101", "a number as the role"),
        ([user(), "x"], "C102", "text, where an object"),
        ([], "C102", "an empty list"),
        ("x", "C102", "text, where a list"),
        ([user(), assistant(weight=-1)], "C106", '"messages[1].weight" is -1; it can be 0 (not learned) or from'),
        ([user(), assistant(weight=2000)], "C106", "is 2000; it can be"),
        ([user(), assistant(weight=10**400)], "C106", "it can be"),
        ([user(), assistant(weight=float("nan"))], "C106", "is NaN; it can be"),
        ([user(), assistant(weight="1")], "C106", "is 1; it can be"),
        ([user(), assistant(weight=[1])], "C106", "is [1]; it can be"),
        ([user(), assistant(train=0.5)], "C106", '"messages[1].train" is 0.5; it can be true or false'),
        ([user(), assistant(weight=0)], "C106", "weight 0, so there is nothing"),
        ([user(), assistant(None, tool_calls=[{"id": "1"}])], "C107", "calls a tool without saying which"),
        ([user(), assistant(None, tool_calls=[{"name": "f", "arguments": "{"}])], "C112", "no JSON object"),
        ([user(), {"role": "tool", "tool_call_id": "9", "content": "x"}, assistant()], "C110", 'the id "9"'),
    ],
)
def test_a_conversation_that_teaches_nothing_is_an_error(turns: Any, rule: str, says: str) -> None:
    example, problems = get_format("messages").parse({"messages": turns}, 812, {})
    assert example is None
    assert [problem.rule for problem in problems] == [rule]
    assert problems[0].message.startswith("Line 812")
    assert says in problems[0].message


def test_an_unknown_role_gets_the_nearest_one() -> None:
    _, (problem,) = get_format("messages").parse({"messages": [{"role": "humann", "content": "x"}, assistant()]}, 1, {})
    assert problem.fix == 'Did you mean "human"?'


@pytest.mark.parametrize(
    ("turns", "rule"),
    [
        ([user(), assistant(), user()], "C104"),
        ([user(), user(), assistant()], "C104"),
        ([assistant(), user(), assistant()], "C104"),
        ([user(), {"role": "system", "content": "s"}, assistant()], "C105"),
    ],
)
def test_an_unusual_order_is_usable_with_a_warning(turns: Any, rule: str) -> None:
    example, problems = get_format("messages").parse({"messages": turns}, 1, {})
    assert example is not None
    assert [(problem.rule, problem.level) for problem in problems] == [(rule, "warning")]


def test_weights_say_what_is_learned() -> None:
    turns = [user(), assistant(weight=0), user(), assistant(weight=1)]
    example, _ = get_format("messages").parse({"messages": turns}, 1, {})
    assert example is not None
    assert [message.train for message in example.messages] == [None, False, None, True]
    assert {message.weight for message in example.messages} == {1.0}


def test_a_weight_between_says_how_much_a_turn_counts() -> None:
    turns = [user(), assistant(weight=0.25), user(), assistant(weight=3), user(), assistant(weight=0.0)]
    example, problems = get_format("messages").parse({"messages": turns}, 1, {})
    assert example is not None
    assert problems == []
    assert [(message.train, message.weight) for message in example.messages[1::2]] == [
        (True, 0.25), (True, 3.0), (False, 1.0),
    ]  # fmt: skip
    assert {message.weight for message in example.messages[::2]} == {1.0}


def test_a_bad_weight_is_named_by_line_and_field() -> None:
    _, (problem,) = get_format("messages").parse({"messages": [user(), assistant(weight="high")]}, 7, {})
    assert (problem.line, problem.field, problem.level) == (7, "messages[1].weight", "error")


def test_every_turn_that_is_wrong_is_reported_at_once() -> None:
    _, problems = get_format("messages").parse(
        {"messages": [user(""), assistant(None), {"role": "x", "content": 1}]}, 1, {}
    )
    assert [problem.rule for problem in problems] == ["C102", "C102", "C101", "C102"]


def test_a_column_may_lie_inside_a_row() -> None:
    row = {"instruction": "i", "instances": [{"input": "", "output": 42}]}
    assert column_names([row]) == ["instruction", "instances[0].input", "instances[0].output"]
    columns = {"prompt": "instruction", "completion": "instances[0].output"}
    example, _ = get_format("mapped").parse(row, 1, columns)
    assert example is not None
    assert example.messages[1].content == "42"


def test_the_first_guess_enters_nested_instances_and_leaves_the_choice_to_a_person() -> None:
    row = {"id": "1", "name": "sum", "instruction": "Add.", "instances": [{"input": "1 and 2", "output": "3"}]}
    found = recognise_rows([row] * 4)
    assert found is not None
    assert found.confidence < SURE
    assert found.columns == {
        "prompt": "instruction", "context": "instances[0].input", "completion": "instances[0].output",
    }  # fmt: skip
    example, _ = get_format("mapped").parse(row, 1, found.columns)
    assert example is not None
    assert said(example.messages) == [("user", "Add.\n\n1 and 2"), ("assistant", "3")]


def test_columns_that_are_added_to_the_prompt_may_be_empty() -> None:
    columns = {"prompt": "q", "context": "c", "more_context": "d", "completion": "a", "system": "s"}
    row = {"q": "ask", "c": "", "d": "more", "a": "said", "s": "Be brief."}
    example, problems = get_format("mapped").parse(row, 1, columns)
    assert problems == []
    assert example is not None
    assert said(example.messages) == [("system", "Be brief."), ("user", "ask\n\nmore"), ("assistant", "said")]


def test_usable_and_quarantined_are_all_rows_where_errors_are_planted(tmp_path: Path) -> None:
    planted = {5: "C102", 17: "F002", 18: "F003", 40: "F004", 77: "C102", 100: "F010"}
    bad = {
        5: '{"prompt": "", "completion": "x"}', 17: '{"prompt": "x"', 18: "[]",
        40: '{"prompt": "x", "prompt": "y", "completion": "z"}', 77: '{"prompt": "x"}', 100: '{"other": 1}',
    }  # fmt: skip
    good = json.dumps(SAMPLES["prompt_completion", "texts"])
    path = tmp_path / "rows"
    path.write_text("\n".join(bad.get(line, good) for line in range(1, 101)))
    found = list(read_examples(path, "prompt_completion", {}))
    assert {item.line: item.rule for item in found if not isinstance(item, Example)} == planted
    assert sorted(item.line or 0 for item in found) == list(range(1, 101))

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest

from tests.tiny import make_tiny_base
from workers.errors import RecipeError
from workers.evaluations import Question, RowValue, ScoredRow, evaluations, get_evaluation, named_by
from workers.examples import Example, Message
from workers.recipe import MetricChoice, Recipe
from workers.rendering import Renderer
from workers.scoring import compare_rows, score_rows

PLAIN = {"name": "n", "base_model": {"name": "b"}, "dataset": {"name": "d", "format": "alpaca"}}


def chosen(name: str, **settings: object) -> MetricChoice:
    return MetricChoice(name=name, settings=settings)


def row(answer: str = "", reference: str = "", prompt: str = "q", **more: object) -> ScoredRow:
    return ScoredRow(1, prompt, reference, answer, 0.0, 0, 0, **more)  # type: ignore[arg-type]


def recipe(*metrics: object) -> Recipe:
    return Recipe.from_dict({**PLAIN, "evaluation": {"metrics": list(metrics)}})


def test_a_recipe_names_metrics_alone_or_with_settings_and_old_ones_stay_the_same_bytes() -> None:
    old = recipe("loss", "token_f1")
    assert old.to_dict()["evaluation"]["metrics"] == ["loss", "token_f1"]
    assert old.sha256() == recipe({"name": "loss"}, {"name": "token_f1", "settings": {}}).sha256()
    new = recipe("loss", {"name": "regex", "settings": {"pattern": "a+"}})
    assert Recipe.from_dict(new.to_dict()) == new
    with pytest.raises(RecipeError) as caught:
        recipe("loss", {"settings": {}})
    assert caught.value.field == "evaluation.metrics.1.name"


def test_two_of_the_same_name_have_keys_and_labels_that_tell_them_apart() -> None:
    stem = "a" * 100
    several = [get_evaluation(chosen("regex", pattern=one)) for one in ("a", "b", stem + "x", stem + "y")]
    assert len({one.key for one in several}) == len({one.label for one in several}) == 4
    assert all(len(one.key) <= 80 and len(one.label) <= 80 for one in several)
    default = get_evaluation(chosen("multiple_choice", per_character=False))
    assert (default.key, default.label) == ("multiple_choice", evaluations()["multiple_choice"].label)
    assert get_evaluation("loss").key == "loss"


@pytest.mark.parametrize(
    ("metric", "field"),
    [
        ("regex", "evaluation.metrics.2.settings.pattern"),
        (chosen("regex", pattern="("), "evaluation.metrics.2.settings.pattern"),
        (chosen("regex", pattern=r"(a)\1"), "evaluation.metrics.2.settings.pattern"),
        (chosen("regex", pattern="a", case=True), "evaluation.metrics.2.settings.case"),
        (chosen("loss", pattern="a"), "evaluation.metrics.2.settings.pattern"),
        (chosen("json_schema", definition="{"), "evaluation.metrics.2.settings.definition"),
        (chosen("multiple_choice", options_from="list", options=["yes"]), "evaluation.metrics.2.settings"),
    ],
)
def test_settings_that_cannot_be_used_are_refused_at_their_field(metric: str | MetricChoice, field: str) -> None:
    with pytest.raises(RecipeError) as caught:
        get_evaluation(metric, field="evaluation.metrics.2")
    assert caught.value.field == field
    assert "Value error" not in caught.value.message


@pytest.mark.parametrize(
    ("mode", "answer", "expected"),
    [
        ("search", "so #### 12 it is", RowValue(1.0)),
        ("search", "12", RowValue(0.0)),
        ("full_match", " #### 12\n", RowValue(1.0)),
        ("full_match", "so #### 12", RowValue(0.0)),
        ("same_group", "so #### 12", RowValue(1.0)),
        ("same_group", "so #### 13", RowValue(0.0)),
    ],
)
def test_a_regular_expression_is_found_matched_whole_or_compared_with_the_reference(
    mode: str, answer: str, expected: RowValue
) -> None:
    found = get_evaluation(chosen("regex", pattern=r"#### (\d+)", mode=mode))
    assert found.row_value(row(answer, "#### 12")) == expected  # type: ignore[attr-defined]
    if mode == "same_group":
        assert found.row_value(row(answer, "twelve")).weight == 0  # type: ignore[attr-defined]


def test_a_hostile_pattern_or_schema_ends_in_time() -> None:
    hostile = "a" * 50_000 + "!"
    pattern = get_evaluation(chosen("regex", pattern="(a+)+$"))
    twice = {f"a{n}": {"allOf": [{"$ref": f"#/$defs/a{n + 1}"}] * 2} for n in range(60)} | {"a60": {}}
    grown = {"$ref": "#/$defs/a0", "$defs": twice}
    schemas = [
        {"type": "string", "pattern": "^(a+)+$"},
        grown,
        {"$ref": "#"},
    ]
    started = time.process_time()
    assert pattern.row_value(row(hostile)).value == 0  # type: ignore[attr-defined]
    for schema in schemas:
        found = get_evaluation(chosen("json_schema", definition=json.dumps(schema)))
        assert found.row_value(row(json.dumps(hostile))).value == 0  # type: ignore[attr-defined]
    assert time.process_time() - started < 60, "a backtracking engine would take years"


def test_a_json_schema_accepts_what_it_says_and_fetches_nothing() -> None:
    schema = (
        '{"type": "object", "required": ["city"], "properties": {"city": {"$ref": "#/$defs/name"}},'
        ' "$defs": {"name": {"type": "string", "pattern": "^[A-Z]"}}}'
    )
    found = get_evaluation(chosen("json_schema", definition=schema))
    values = [found.row_value(row(one)).value for one in ('{"city": "Bonn"}', '{"city": "bonn"}', "{}", "Bonn")]  # type: ignore[attr-defined]
    assert values == [1.0, 0.0, 0.0, 0.0]
    for reference in ("https://example.org/s.json", "other.json", "#/$defs/none"):
        with pytest.raises(RecipeError, match="refers to"):
            get_evaluation(chosen("json_schema", definition=json.dumps({"$ref": reference})))


def test_options_come_from_a_list_the_prompt_or_the_references() -> None:
    rows = [Question("Which? (A) x (B) y (A)", "(A)"), Question("Which? (A) x", "(B)")]
    assert get_evaluation("multiple_choice").options(rows) == [("(A)", "(B)"), ()]
    listed = get_evaluation(chosen("multiple_choice", options_from="list", options=["not sure", "no"]))
    assert listed.options(rows) == [("not sure", "no")] * 2
    references = get_evaluation(chosen("multiple_choice", options_from="references"))
    assert references.options(rows) == [("(A)", "(B)")] * 2
    assert references.options([Question("q", str(n)) for n in range(30)]) == [()] * 30


def test_a_row_that_has_no_part_in_a_choice_says_why() -> None:
    def why(references: list[str], prompt: str = "(A) or (B)?", **settings: object) -> list[str]:
        rows = [Question(prompt, reference) for reference in references]
        return get_evaluation(chosen("multiple_choice", **settings)).why_left_out(rows)

    assert why(["(A)", "(C)"]) == ["", 'The right answer "(C)" is none of the options "(A)", "(B)".']
    (only,) = why(["(A)"], prompt="(A)?")
    assert only == "The pattern finds only one option in the question; it takes two or more."
    (none,) = why(["yes"], prompt="?")
    assert "finds no option" in none
    (many,) = why(["a1"], prompt=" ".join(f"a{n}" for n in range(30)), pattern=r"a\d+")
    assert many == "The pattern finds 30 options in the question; 26 are taken at most."
    assert why(["yes", "maybe"], options_from="list", options=["yes", "no"]) == [
        "", 'The right answer "maybe" is none of the options "yes", "no".'
    ]  # fmt: skip
    assert why([str(n) for n in range(20)], options_from="references") == [""] * 20
    assert set(why([str(n) for n in range(21)], options_from="references")) == {
        "The scored rows have 21 different right answers, and 20 at most make options. "
        "Take the options from the prompt or from a list."
    }
    assert "nothing to choose from" in why(["yes", "yes"], options_from="references")[0]


@pytest.mark.parametrize("name", evaluations())
def test_a_row_is_left_out_with_a_reason_exactly_when_it_has_no_part(name: str) -> None:
    settings = {
        "regex": {"pattern": r"(\d+)", "mode": "same_group"},
        "json_schema": {"definition": '{"type": "object"}'},
    }
    evaluation = get_evaluation(MetricChoice(name=name, settings=settings.get(name, {})))
    rows = [Question("(A) or (B)?", reference) for reference in ("(A)", "(C)", "12", "{}", "word")]
    for row, why, options in zip(rows, evaluation.why_left_out(rows), evaluation.options(rows), strict=True):
        scored = ScoredRow(
            1, row.prompt, row.reference, "12", 3.0, 2, 4, {evaluation.key: dict.fromkeys(options, -1.0)}
        )
        assert (evaluation.row_counts(scored)[-1] == 0) == bool(why), row.reference


def test_the_likeliest_option_is_chosen_and_of_equal_ones_the_first() -> None:
    plain = get_evaluation("multiple_choice")
    long = get_evaluation(chosen("multiple_choice", per_character=True))

    def value(reference: str, **options: float) -> float:
        found = row("", reference, options={plain.key: options, long.key: options})
        assert plain.row_value(found).weight == 1  # type: ignore[attr-defined]
        return float(plain.row_value(found).value)  # type: ignore[attr-defined]

    assert value("b", a=-2.0, b=-1.0) == 1
    assert [value(one, a=-1.0, b=-1.0) for one in "ab"] == [1, 0]
    uneven = row("", "longer", options={long.key: {"no": -2.0, "longer": -3.0}})
    assert long.row_value(uneven).value == 1  # type: ignore[attr-defined]
    assert long.row_value(row("", "none", options={long.key: {"no": -2.0}})).weight == 0  # type: ignore[attr-defined]


def test_options_are_scored_in_batches_by_the_log_likelihood_of_their_tokens(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    folder = make_tiny_base(tmp_path / "base", "llama")
    model = AutoModelForCausalLM.from_pretrained(folder)
    renderer = Renderer(folder, max_length=256, loss_on="assistant")
    examples = [
        Example(n, (Message("user", f"Is {n} even?"), Message("assistant", ("yes", "no")[n % 2]))) for n in (1, 2, 3)
    ]
    metric = chosen("multiple_choice", options_from="list", options=["yes", "no", "not at all"])
    evaluation = get_evaluation(metric)
    found = score_rows(model, renderer, examples, generate_lines=(), max_new_tokens=1, evaluations=[evaluation])
    for example, scored in zip(examples, found, strict=True):
        for option, value in scored.options[evaluation.key].items():
            # White space at the end of the prompt counts with the option.
            before = renderer.prompt_text(example).rstrip()
            ids = renderer._tokenizer.encode(renderer.prompt_text(example) + option, add_special_tokens=False).ids
            start = len(renderer._tokenizer.encode(before, add_special_tokens=False).ids)
            with torch.no_grad():
                logits_TV = model(torch.tensor([ids])).logits[0].log_softmax(dim=-1)
            expected = sum(float(logits_TV[at - 1, ids[at]]) for at in range(start, len(ids)))
            assert math.isclose(value, expected, rel_tol=1e-4)
    (record,) = compare_rows(found, found, [metric])
    assert (record.evaluation, record.num_rows, record.difference) == (evaluation.key, 3, 0)


def test_the_best_step_may_be_chosen_by_a_metric_with_settings() -> None:
    metrics = (chosen("regex", pattern="a"), chosen("regex", pattern="b"))
    key = get_evaluation(metrics[1]).key
    assert named_by(key, metrics) == metrics[1]
    assert named_by("regex", metrics) == metrics[0]
    assert named_by("loss", metrics) == "loss"

from __future__ import annotations

import pytest

from workers.__main__ import main
from workers.evaluations import evaluations
from workers.methods import methods


def test_it_lists_every_method_and_lora_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["describe"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[: len(methods())]] == list(methods())
    assert lines[0].startswith("lora ")


@pytest.mark.parametrize("name", methods())
def test_it_explains_every_setting_of_a_method(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["describe", name]) == 0
    said = capsys.readouterr().out
    for key, field in methods()[name].Settings.model_fields.items():
        assert f"settings.{key} = " in said
        assert field.title in said
    assert methods()[name].source in said


def test_it_explains_what_all_methods_share(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["describe", "training", "split", "evaluation"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    for words in ("training.learning_rate = auto", "split.held_out_share = 0.1", "evaluation.num_generated = 32 rows"):
        assert words in said
    assert "Default: QLoRA (Dettmers et al. 2023)" in said


@pytest.mark.parametrize("name", evaluations())
def test_it_lists_every_metric_and_explains_its_settings(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["describe"]) == 0
    (line,) = (one for one in capsys.readouterr().out.splitlines() if one.split()[:1] == [name])
    settings = evaluations()[name].Settings
    assert ("(has settings)" in line) == (settings is not None)
    assert main(["describe", name]) == 0
    said = capsys.readouterr().out
    assert f'"{name}"' in said, "it says how a recipe names the metric"
    for key, field in (settings.model_fields if settings else {}).items():
        assert f"settings.{key} = " in said
        assert str(field.title) in said


def test_an_unknown_name_is_told_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["describe", "lorra"]) == 1
    assert 'Did you mean "lora"?' in capsys.readouterr().err
    assert main(["describe", "regx"]) == 1
    assert 'Did you mean "regex"?' in capsys.readouterr().err

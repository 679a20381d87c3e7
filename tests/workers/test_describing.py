from __future__ import annotations

import pytest

from workers.__main__ import main
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


def test_an_unknown_name_is_told_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["describe", "lorra"]) == 1
    assert 'Did you mean "lora"?' in capsys.readouterr().err

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench import curves
from tests.bench.curves import agree, windows

OURS = [[2.0 - 0.05 * step + offset for step in range(12)] for offset in (0.0, 0.02, -0.02)]


def shifted(by: float, *, factor: float = 1.0) -> list[list[float]]:
    return [[loss * factor + by for loss in curve] for curve in OURS]


def test_curves_within_the_spread_of_the_seeds_agree() -> None:
    assert agree(windows(OURS, shifted(0.03)))


def test_curves_further_apart_than_the_seeds_do_not() -> None:
    assert not agree(windows(OURS, shifted(0.05)))


def test_one_window_that_is_off_is_enough() -> None:
    theirs = [[*curve[:6], *(loss + 0.05 for loss in curve[6:8]), *curve[8:]] for curve in OURS]
    found = windows(OURS, theirs)
    assert [one.agrees for one in found] == [True, True, True, False, True, True]
    assert not agree(found)


def test_curves_that_learn_nothing_agree_about_nothing() -> None:
    flat = [[2.0 + offset] * 12 for offset in (0.0, 0.02, -0.02)]
    assert not agree(windows(flat, flat))


def test_steps_left_over_join_the_last_window() -> None:
    curve = [[float(step) for step in range(15)]] * 2
    assert [(one.first, one.last) for one in windows(curve, curve)][-2:] == [(11, 12), (13, 15)]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_ours_and_trl_agree_on_a_tiny_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "sys.argv",
        ["curves", "--out", str(tmp_path), "--seeds", "1", "2", "--steps", "12", "--learning-rate", "1e-2"],
    )
    with pytest.raises(SystemExit) as ended:
        curves.main()
    said = capsys.readouterr().out
    assert ended.value.code == 0, said
    assert "Equal work is equal loss: yes." in said

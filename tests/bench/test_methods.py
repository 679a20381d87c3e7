"""The benchmark of the methods, end to end on a tiny base: what its rows keep is what its table needs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.bench.methods import Options, merge, print_table, row, speed
from tests.tiny import make_tiny_base, tiny_rows
from workers.measured import measured_methods
from workers.methods import methods

ROWS = Path(__file__).with_name("rows") / "methods"
README = Path(__file__).parents[2] / "README.md"


@pytest.fixture
def options(tmp_path: Path) -> Options:
    rows = [{"question": one["instruction"], "answer": f"{one['output']} #### {i % 3}"} for i, one in
            enumerate(tiny_rows(60))]  # fmt: skip
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(one) + "\n" for one in rows))
    (tmp_path / "out").mkdir()
    return Options(
        make_tiny_base(tmp_path / "tiny"), data, tmp_path / "out", num_rows=48, num_held_out=8, num_generated=4,
        max_new_tokens=8,
    )  # fmt: skip


@pytest.mark.slow
def test_rows_are_kept_resumed_and_merged(options: Options, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in (1, 2):
        row("lora", seed, options)
    file = row("ia3", 1, options)
    before = file.stat().st_mtime_ns
    assert row("ia3", 1, options).stat().st_mtime_ns == before, "a row that is there is not trained again"
    speed("lora", options)
    table = merge(options.out)
    assert [one.method for one in table.rows] == sorted(
        ["lora", "ia3"], key={one.method: one.loss.value for one in table.rows}.__getitem__
    )
    lora = next(one for one in table.rows if one.method == "lora")
    assert (lora.num_seeds, lora.loss.num_rows, lora.numeric_answer.num_rows) == (2, 8, 4)
    assert lora.loss.low <= lora.loss.value <= lora.loss.high
    assert lora.loss.lowest_seed <= lora.loss.value <= lora.loss.highest_seed
    assert lora.tokens_per_second
    assert next(one for one in table.rows if one.method == "ia3").tokens_per_second is None
    print_table(table)
    said = capsys.readouterr().out
    assert "| LoRA |" in said
    assert "not measured" in said


def test_the_published_table_is_what_the_kept_rows_say() -> None:
    published = measured_methods()
    assert published is not None
    assert merge(ROWS).model_dump(exclude={"measured_on"}) == published.model_dump(exclude={"measured_on"})
    assert {one.method for one in published.rows} == set(methods())
    assert {one.num_seeds for one in published.rows} == {3}


def test_the_readme_quotes_the_published_table() -> None:
    published = measured_methods()
    assert published is not None
    readme = README.read_text("utf-8")
    for one in published.rows:
        quoted = f"| {one.loss.value:.3f} [{one.loss.low:.3f}, {one.loss.high:.3f}] | {one.num_trainable:,} |"
        assert quoted in readme, one.label

"""A row's columns by name and path, the same for choosing columns, dividing by them and filtering by them."""

from __future__ import annotations

from typing import Any

import pytest

from workers.reading import column_names
from workers.row_paths import MISSING, leaves_of, value_at
from workers.row_table import filter_columns, value_text

ROW: dict[str, Any] = {
    "plain": "a", "dotted.name": "b", "": "nameless",
    "meta": {"source": "c", "": "d", "a[b": "e", "0": "f", "none": None},
    "instances": [{"output": "g", "tags": ["h", "i"]}, {"output": "j"}], "matrix": [[1, 2]], "empty": [],
    "deep": {"one": {"two": {"three": "too deep"}, "two.half": 2}},
}  # fmt: skip


def test_the_value_at_every_column_of_a_row_is_that_columns() -> None:
    found = dict(leaves_of(ROW))
    del found["deep.one.two.half"]  # nobody can tell it from an object in an object
    assert {path: value_at(ROW, path) for path in found} == found
    assert list(found) == [
        "plain", "dotted.name", "", "meta.source", "meta.", "meta.a[b", "meta.0", "meta.none", "instances[0].output",
        "instances[0].tags[0]",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "path",
    ["x", "meta.x", "meta.source.x", "instances[2].output", "instances.output", "plain[0]", "meta[0]", "[0]", "."],
)
def test_a_path_that_a_row_has_not_is_missing(path: str) -> None:
    assert value_at(ROW, path) is MISSING


def test_any_place_of_a_list_can_be_named() -> None:
    assert value_at(ROW, "instances[1].output") == "j"
    assert value_at(ROW, "instances[0].tags[1]") == "i"
    assert value_at(ROW, "matrix[0][1]") == 2


@pytest.mark.timeout(30)
def test_a_name_of_many_brackets_takes_no_longer_than_its_length() -> None:
    name = "[1]" * 300_000 + "x"
    assert value_at({name: {"prompt": "k"}}, f"{name}.prompt") == "k"
    assert value_at({name: {"prompt": "k"}}, f"{name}[1].prompt") is MISSING


def test_rows_are_filtered_by_the_very_columns_that_can_be_chosen() -> None:
    offered = filter_columns([ROW, {"meta": {"0": "x" * 1000}}])
    assert offered == [name for name in column_names([ROW]) if "[" not in name and name != "meta.0"]
    assert "meta." in offered
    assert value_text(value_at(ROW, "meta.")) == "d"
    assert value_text(value_at(ROW, "meta.x")) is None

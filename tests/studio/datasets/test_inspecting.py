"""Inspection: every row counted once, problems stored, states reached."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
from django.test import Client
from django.utils import timezone

from studio.catalogue.models import BaseModel
from studio.datasets import inspecting
from studio.datasets.models import DatasetVersion
from tests.studio.datasets.conftest import Upload, good_rows, jsonl
from tests.tiny import make_tiny_base


def test_it_counts_every_row_and_names_the_lines_of_problems(upload: Upload) -> None:
    rows = good_rows(20)
    rows[3] = {"prompt": "no answer"}
    content = jsonl(rows[:10]) + b'{"prompt": "broken\n' + b"[1]\n\n" + jsonl(rows[10:])
    version = upload(content)
    assert version.state == "ready"
    assert (version.num_rows, version.num_usable, version.num_quarantined) == (22, 19, 3)
    found = {(problem.line, problem.rule) for problem in version.problems.all()}
    assert found == {(4, "C102"), (11, "F002"), (12, "F003")}
    assert version.problem_counts == {"C102": 1, "F002": 1, "F003": 1}
    assert version.statistics["characters"]["num_rows"] == 19


def test_it_counts_tokens_for_each_base_model(upload: Upload, tmp_path: Path) -> None:
    folder = make_tiny_base(tmp_path / "base")
    BaseModel.objects.create(name="tiny", folder=str(folder), revision="r" * 64)
    version = upload(jsonl(good_rows()))
    tokens = version.tokens_of("r" * 64)
    assert tokens is not None
    assert tokens["num_rows"] == 12
    assert tokens["total"] > 12
    assert sum(rows for _, rows in tokens["histogram"]) == 12
    assert tokens["cut"] == {"512": 0, "1024": 0, "2048": 0}
    assert tokens["is_whole"]


def test_it_lists_the_longest_rows_with_their_lines(upload: Upload, tmp_path: Path, bob_client: Client) -> None:
    BaseModel.objects.create(name="tiny", folder=str(make_tiny_base(tmp_path / "base")), revision="r" * 64)
    rows = good_rows(120)
    rows[7]["completion"] = "word " * 300
    rows[90]["completion"] = "word " * 400
    version = upload(jsonl(rows))
    tokens = version.tokens_of("r" * 64)
    assert tokens is not None
    longest = tokens["longest_rows"]
    assert [line for line, _ in longest[:2]] == [91, 8]
    assert longest[0][1] == tokens["longest"]
    assert len(longest) == 100
    assert [num for _, num in longest] == sorted((num for _, num in longest), reverse=True)
    page = bob_client.get(f"{version.get_absolute_url()}statistics/").content.decode()
    assert "The 100 longest rows" in page
    assert f"{version.get_absolute_url()}learned/?base=" in page
    assert "&amp;line=91" in page


def test_unknown_columns_wait_for_a_mapping(upload: Upload) -> None:
    version = upload(jsonl([{"alpha": "a", "beta": "b"} for _ in range(12)]))
    assert version.state == "needs_mapping"
    assert version.columns == {"prompt": "alpha", "completion": "beta"}
    assert version.column_names == ["alpha", "beta"]


def test_a_file_of_broken_rows_only_is_unreadable_and_says_the_first_line(upload: Upload) -> None:
    version = upload(b"{'prompt': 'a'}\n" * 12)
    assert version.state == "unreadable"
    assert "Line 1" in version.error
    assert version.num_quarantined == 12
    assert version.problems.count() == 12


def test_a_reader_that_runs_out_of_memory_makes_the_version_unreadable(
    upload: Upload, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One row of 6 MB does not fit into what the limit leaves beside the interpreter.
    version = upload(jsonl([{"prompt": "x", "completion": "y" * 6_000_000}]), inspect=False)
    run = inspecting.run_child
    monkeypatch.setattr(
        inspecting, "run_child",
        lambda module, arguments, seconds: run(
            module, [*arguments, "--memory-bytes", str(40 * 1024**2)], seconds=seconds
        ),
    )  # fmt: skip
    inspecting.inspect(version.pk)
    version.refresh_from_db()
    assert version.state == "unreadable"
    assert "memory" in version.error


def test_the_sweep_asks_again_for_lost_and_dead_inspections(upload: Upload, no_broker: list[int]) -> None:
    version = upload(jsonl(good_rows()), inspect=False)
    no_broker.clear()
    assert inspecting.inspect_waiting() == 0
    long_ago = timezone.now() - timedelta(minutes=10)
    DatasetVersion.objects.update(queued_at=long_ago)
    assert inspecting.inspect_waiting() == 1
    DatasetVersion.objects.update(queued_at=long_ago, heartbeat_at=timezone.now())
    assert inspecting.inspect_waiting() == 0
    DatasetVersion.objects.update(heartbeat_at=long_ago)
    assert inspecting.inspect_waiting() == 1
    assert no_broker == [version.pk, version.pk]


def test_an_inspection_that_runs_is_not_run_twice(upload: Upload) -> None:
    version = upload(jsonl(good_rows()), inspect=False)
    DatasetVersion.objects.update(heartbeat_at=timezone.now())
    inspecting.inspect(version.pk)
    version.refresh_from_db()
    assert version.state == "inspecting"


def test_hostile_text_is_stored_and_counted(upload: Upload) -> None:
    rows = good_rows(10)
    content = jsonl(rows) + b'{"prompt": "a\\u0000b", "completion": "c"}\n{"pro\\u0000mpt": 1}\n{"prompt": "\xff"}\n'
    version = upload(content)
    assert (version.num_usable, version.num_quarantined) == (10, 3)
    assert {problem.rule for problem in version.problems.all()} == {"F005", "F001"}

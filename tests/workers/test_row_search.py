"""Rows written at rest and looked through: what is found is what reading every row would find."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import time
import unicodedata
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from workers import row_search, row_table
from workers.errors import DatasetError
from workers.folding import find_folded, fold
from workers.grams import grams, may_hold
from workers.reading import read_rows, recognise
from workers.row_search import answer, rows_with
from workers.row_table import write_rows

Ask = Callable[..., dict[str, Any]]


def chat(*turns: tuple[str, str], **columns: Any) -> dict[str, Any]:
    return {**columns, "messages": [{"role": role, "content": text} for role, text in turns]}


def rows_of(num: int) -> list[dict[str, Any]]:
    """Conversations with columns; every fifth has a system prompt, every seventh four turns."""
    rows = []
    for n in range(num):
        turns = [("system", f"Be brief. {n}")] if n % 5 == 0 else []
        turns += [("user", f"What is {n} plus {n}?"), ("assistant", f"It is {2 * n}, ISTANBUL-{n % 11}.")]
        if n % 7 == 0:
            turns += [("user", "And the Straße?"), ("assistant", f"Its ÜBER-name is {'long ' * (n % 13)}.")]
        rows.append(chat(*turns, id=n, topic=("billing", "returns", "Ärger")[n % 3], meta={"source": f"s{n % 2}"}))
    return rows


@pytest.fixture
def ask(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Ask:
    """Writes a file's rows at rest, and asks about them."""
    made: dict[bytes, dict[str, Any]] = {}

    def table(content: bytes) -> dict[str, Any]:
        if content not in made:
            path, out = tmp_path / f"{len(made)}.data", tmp_path / f"{len(made)}.parquet"
            path.write_bytes(content)
            found = recognise(path)
            assert found is not None
            capsys.readouterr()
            write_rows(path, found.format, found.columns, out)
            done = json.loads(capsys.readouterr().out.splitlines()[-1])
            made[content] = {
                "path": str(out), "names": [one["name"] for one in done["columns"]], "format": found.format,
                "columns": found.columns, "order": "line", "limit": 1000, "source": path, "done": done,
            }  # fmt: skip
        return made[content]

    def asked(content: bytes, filters: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
        known = table(content)
        found = answer({**known, "filters": filters or {}, **more}, time.monotonic() + 60)
        return {**found, "done": known["done"], "source": known["source"], "path": known["path"]}

    return asked


def lines(found: dict[str, Any]) -> list[int]:
    return [row["line"] for row in found["rows"]]


def jsonl(rows: list[Any]) -> bytes:
    return b"".join((row if isinstance(row, bytes) else orjson.dumps(row)) + b"\n" for row in rows)


@pytest.mark.parametrize("text", ["plus 3", "ISTANBUL-7", "istanbul-10", "straße", "STRASSE", "über", "e", "zzz", "\t"])
def test_a_search_finds_the_rows_whose_text_holds_it_whatever_its_case(
    ask: Ask, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setattr(row_table, "GROUP_ROWS", 64)
    rows = rows_of(500)
    expected = [
        number
        for number, row in enumerate(rows, start=1)
        if any(text.casefold() in turn["content"].casefold() for turn in row["messages"])
    ]
    found = ask(jsonl(rows), {"text": text})
    assert lines(found) == expected
    assert (found["num_matches"], found["num_rows"], found["is_whole"]) == (len(expected), 500, True)


@pytest.mark.parametrize("num_hits", [0, 1, 60, 70, 200, 999, 1000])
def test_few_and_many_hits_are_looked_for_in_other_ways_that_agree(num_hits: int) -> None:
    texts = [
        f"row {n} {'the needle' if n * num_hits // 1000 != (n + 1) * num_hits // 1000 else 'hay'}\n"
        for n in range(1000)
    ]
    array = pa.array(texts)
    for needle in ("needle", "ne", "e", "\u00e9t\u00e9"):
        assert rows_with(array, needle.encode()).tolist() == [needle in text for text in texts]
        assert rows_with(array.slice(300), needle.encode()).tolist() == [needle in text for text in texts[300:]]


def test_nothing_is_found_across_the_border_of_two_rows(ask: Ask) -> None:
    rows = [chat(("user", "a"), ("assistant", "ends in nee")), chat(("user", "dle begins"), ("assistant", "b"))] * 6
    assert ask(jsonl(rows), {"text": "needle"})["num_matches"] == 0
    with pytest.raises(DatasetError, match="one line"):
        ask(jsonl(rows), {"text": "nee\ndle"})


def test_letters_in_pieces_are_found_and_so_are_other_scripts(ask: Ask) -> None:
    rows = [
        chat(("user", unicodedata.normalize("NFD", "Où est l'Été?")), ("assistant", "Là.")),
        chat(("user", "注文番号を教えてください"), ("assistant", "はい")),
        chat(("user", "ПРИВЕТ"), ("assistant", "мир")),
        *rows_of(10),
    ]
    assert [lines(ask(jsonl(rows), {"text": text})) for text in ("été", "番号", "привет")] == [[1], [2], [3]]


def test_hits_are_placed_in_the_text_as_it_is_shown() -> None:
    text = "Die STRASSE heißt Große Straße, x."
    places = [text[start:end] for start, end in find_folded(text, fold("strasse"), most=9)]
    assert places == ["STRASSE", "Straße"]
    pieces = unicodedata.normalize("NFD", "L'été en été")
    assert [unicodedata.normalize("NFC", pieces[a:b]) for a, b in find_folded(pieces, "été", most=9)] == ["été", "été"]
    # One letter becomes two, two become one: as long as before, and yet not in its place.
    mixed = "straße und cafe\u0301"
    assert [mixed[a:b] for a, b in find_folded(mixed, "und", most=9)] == ["und"]
    assert find_folded("aaaa", "aa", most=1) == [(0, 2)]
    assert find_folded("anything", "", most=5) == []


def num_characters(row: dict[str, Any]) -> int:
    return sum(len(turn["content"]) for turn in row["messages"])


FILTERS: list[tuple[dict[str, Any], Callable[[int, dict[str, Any]], bool]]] = [
    ({"system": "with"}, lambda n, row: n % 5 == 0),
    ({"system": "without"}, lambda n, row: n % 5 != 0),
    ({"role": "system"}, lambda n, row: n % 5 == 0),
    ({"role": "tool"}, lambda n, row: False),
    ({"min_turns": 4}, lambda n, row: len(row["messages"]) >= 4),
    ({"max_turns": 2}, lambda n, row: len(row["messages"]) <= 2),
    ({"min_characters": 40, "max_characters": 60}, lambda n, row: 40 <= num_characters(row) <= 60),
    ({"column": "topic", "value": "Ärger"}, lambda n, row: n % 3 == 2),
    ({"column": "id", "value": "17"}, lambda n, row: n == 17),
    ({"column": "meta.source", "value": "s1"}, lambda n, row: n % 2 == 1),
    ({"column": "topic", "value": "billing", "system": "with", "text": "straSSe"}, lambda n, row: n % 105 == 0),
    ({"column": "topic", "value": "returns", "text": "ISTANBUL-7"}, lambda n, row: n % 3 == 1 and n % 11 == 7),
    ({"max_turns": 3, "text": "ISTANBUL-7"}, lambda n, row: n % 7 > 0 and n % 11 == 7),
    ({"state": "usable"}, lambda n, row: True),
    ({"state": "set_aside"}, lambda n, row: False),
]  # fmt: skip


@pytest.mark.parametrize(("filters", "fits"), FILTERS)
def test_filters_leave_the_rows_that_fit(
    ask: Ask, monkeypatch: pytest.MonkeyPatch, filters: dict[str, Any], fits: Callable[[int, dict[str, Any]], bool]
) -> None:
    monkeypatch.setattr(row_table, "GROUP_ROWS", 50)
    rows = rows_of(320)
    assert lines(ask(jsonl(rows), filters)) == [n + 1 for n, row in enumerate(rows) if fits(n, row)]


@pytest.mark.parametrize("order", ["line", "longest", "shortest"])
def test_pages_by_cursor_give_every_row_once_and_the_same_backwards(
    ask: Ask, monkeypatch: pytest.MonkeyPatch, order: str
) -> None:
    monkeypatch.setattr(row_table, "GROUP_ROWS", 32)
    content = jsonl(rows_of(203))
    whole = ask(content, {"text": "straße"}, order=order)
    sign = {"line": 0, "longest": -1, "shortest": 1}[order]
    assert lines(whole) == [
        row["line"] for row in sorted(whole["rows"], key=lambda row: (sign * row["num_characters"], row["line"]))
    ]
    pages: list[list[int]] = []
    cursor: dict[str, Any] = {}
    while True:
        found = ask(content, {"text": "straße"}, order=order, limit=4, **cursor)
        pages.append(lines(found))
        assert found["has_before"] == (len(pages) > 1)
        if not found["has_after"]:
            break
        cursor = {"after": [found["rows"][-1]["key"], found["rows"][-1]["line"]]}
    assert list(chain.from_iterable(pages)) == lines(whole)

    def before(row: dict[str, Any]) -> dict[str, Any]:
        return ask(content, {"text": "straße"}, order=order, limit=4, before=[row["key"], row["line"]])

    back = before(found["rows"][0])
    assert (lines(back), back["has_after"], back["has_before"]) == (pages[-2], True, len(pages) > 2)
    assert lines(before(whole["rows"][0])) == []


def test_rows_that_are_set_aside_are_found_with_what_is_wrong_and_as_the_file_has_them(ask: Ask) -> None:
    good = rows_of(12)
    broken = b'{"messages": [{"role": "user", "content": "Where is the ' + "Schlüssel".encode() + b'"}'
    empty = chat(("user", "Only a QUESTION"))
    content = jsonl([good[0], broken, *good[1:], empty, good[3]])
    found = ask(content, {"state": "set_aside"})
    assert lines(found) == [2, 14]
    assert found["rows"][0]["rules"] == ["F002"]
    assert all(rule.startswith("C") for rule in found["rows"][1]["rules"])
    assert found["rows"][0]["example"] is None
    assert lines(ask(content, {"text": "schlüssel"})) == [2]
    assert lines(ask(content, {"text": "only a question"})) == [14]
    assert lines(ask(content, {"rule": found["rows"][0]["rules"][0]})) == [2]
    assert lines(ask(content, {"rule": "Q501"})) == [15]  # line 5 says the same
    one = ask(content, line=2)
    assert one["row"]["raw"] == broken.decode()
    assert (one["previous"], one["next"]) == (1, 3)
    assert ask(content, {"state": "set_aside"}, line=5)["previous"] == 2
    assert ask(content, {"state": "set_aside"}, line=5)["next"] == 14
    assert ask(content, line=99) == ask(content, line=99) | {"row": None, "previous": None, "next": None}


def test_the_first_row_that_fits_at_a_line_or_behind_it_is_found(ask: Ask) -> None:
    content = jsonl([*rows_of(12), b"{broken", *rows_of(3), b"{broken"])

    def at(line: int) -> tuple[Any, ...]:
        found = ask(content, {"state": "usable"}, line=line, or_next=True)
        return found["row"] and found["row"]["line"], found["previous"], found["next"]

    assert [at(line) for line in (1, 13, 14, 16, 17, 99)] == [
        (1, None, 2), (14, 12, 15), (14, 12, 15), (16, 15, None), (None, 16, None), (None, 16, None),
    ]  # fmt: skip


def test_what_is_too_long_to_show_is_cut_and_the_row_itself_is_whole(ask: Ask) -> None:
    long = [("user" if n % 2 == 0 else "assistant", f"turn {n} " + "x" * 3000) for n in range(300)]
    rows = [chat(*long), chat(("user", "y" * 20_000), ("assistant", "z" * 20_000)), *rows_of(10)]
    first, second = ask(jsonl(rows))["rows"][:2]
    assert len(first["example"]["messages"]) == 14
    assert first["num_turns"] == 300
    assert [len(message["content"]) for message in second["example"]["messages"]] == [8000, 8000]
    whole = ask(jsonl(rows), line=1)["row"]
    assert len(whole["example"]["messages"]) == 100
    assert json.loads(whole["raw"]) == rows[0]


def test_a_damaged_file_is_said_to_be_one(ask: Ask, tmp_path: Path) -> None:
    known = ask(jsonl(rows_of(300)))
    content = bytearray(Path(known["path"]).read_bytes())
    content[100:-6000] = b"x" * (len(content) - 6100)
    (tmp_path / "damaged").write_bytes(content)
    request = {"path": str(tmp_path / "damaged"), "names": [], "format": "messages", "columns": {}, "order": "line",
               "limit": 2, "filters": {}}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "workers.row_search"],
        input=orjson.dumps(request) + b"\n",
        capture_output=True,
        check=True,
    )
    assert "damaged" in orjson.loads(done.stdout)["message"]


def parquet_of(rows: list[dict[str, Any]], path: Path) -> bytes:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path.read_bytes()


@pytest.mark.parametrize(
    "kind", ["jsonl", "jsonl.gz", "json", "parquet", "csv", "text", "preference", "kto", "alpaca", "sharegpt"]
)
def test_every_carrier_and_type_is_written_row_for_row_as_it_is_read(ask: Ask, tmp_path: Path, kind: str) -> None:
    pairs = [{"prompt": f"Ask {n}?", "completion": f"Say NEEDLE {n}."} for n in range(30)]
    content = {
        "jsonl": jsonl(rows_of(30)),
        "jsonl.gz": gzip.compress(jsonl(rows_of(30))),
        "json": json.dumps(pairs, indent=1).encode(),
        "parquet": parquet_of(rows_of(30), tmp_path / "x"),
        "csv": b"prompt,completion\n" + b"".join(f'"Ask\n{n}",Say NEEDLE {n}\n'.encode() for n in range(30)),
        "text": "\n\n".join(f"A passage.\nNEEDLE {n}" for n in range(30)).encode(),
        "preference": jsonl([{"prompt": f"Q {n}", "chosen": f"NEEDLE {n}", "rejected": "No."} for n in range(30)]),
        "kto": jsonl([{"prompt": f"Q {n}", "completion": f"NEEDLE {n}", "label": n % 2 == 0} for n in range(30)]),
        "alpaca": jsonl([{"instruction": f"Do {n}", "input": "", "output": f"NEEDLE {n}"} for n in range(30)]),
        "sharegpt": jsonl(
            [
                {"conversations": [{"from": "human", "value": f"Q {n}"}, {"from": "gpt", "value": f"NEEDLE {n}"}]}
                for n in range(30)
            ]
        ),
    }[kind]  # fmt: skip
    found = ask(content)
    recognised = recognise(found["source"])
    assert recognised is not None
    read = [
        example
        for example, _ in read_rows(found["source"], recognised.format, recognised.columns)
        if example is not None
    ]
    assert lines(found) == [example.line for example in read]
    assert len(read) == 30
    assert [row["example"]["messages"] for row in found["rows"]] == [
        [json.loads(orjson.dumps(message)) for message in example.messages] for example in read
    ]
    if kind not in {"jsonl", "jsonl.gz", "parquet"}:
        needle = ask(content, {"text": "needle 17"})
        assert needle["num_matches"] == 1
        assert "NEEDLE 17" in ask(content, line=lines(needle)[0])["row"]["raw"]


def test_the_quick_way_of_large_files_writes_what_the_full_way_writes(
    ask: Ask, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rows: list[Any] = [
        *rows_of(300),
        b'{"broken',
        rows_of(5)[3],
        chat(("user", "mail me@example.org"), ("assistant", "Done.")),
    ]
    slow = pq.read_table(ask(jsonl(rows))["path"])
    monkeypatch.setattr(row_table, "FAST_FROM_BYTES", 1)
    quick = pq.read_table(ask(jsonl(rows) + b"\n")["path"])
    assert slow.equals(quick)
    assert slow.column("rules").to_pylist()[-2] == ",Q501,"


def test_columns_of_short_values_are_counted_and_others_are_none(ask: Ask) -> None:
    rows = [
        chat(("user", "a"), ("assistant", "b"), long="x" * 300, score=n / 4, ok=n % 2 == 0, gone=None) for n in range(8)
    ]
    done = ask(jsonl(rows))["done"]
    columns = {one["name"]: one for one in done["columns"]}
    assert "long" not in columns
    assert columns["ok"]["values"] == [["true", 4], ["false", 4]]
    assert columns["gone"]["num_missing"] == 8
    assert lines(ask(jsonl(rows), {"column": "score", "value": "0.25"})) == [2]
    with pytest.raises(DatasetError, match='column "long"'):
        ask(jsonl(rows), {"column": "long", "value": "x"})


def test_hostile_text_and_odd_values_are_written_and_found(ask: Ask) -> None:
    rows = [
        b'{"messages":[{"role":"user","content":"lone \\ud800 half"},{"role":"assistant","content":"a"}],'
        b'"n":123456789012345678901234567890}',
        chat(("user", "\u202egnp.exe \x1b[31m red"), ("assistant", "<script>alert(1)</script>{{ 7*7 }}")),
        *rows_of(10),
    ]
    content = jsonl(rows)
    assert ask(content)["num_rows"] == 12
    assert lines(ask(content, {"text": "<SCRIPT>"})) == [2]
    assert lines(ask(content, {"text": "%_.*'\" OR 1=1 --"})) == []
    assert lines(ask(content, {"text": "half"})) == [1]


def test_a_search_that_takes_too_long_gives_what_it_found_and_says_so(
    ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_table, "GROUP_ROWS", 10)
    content = jsonl(rows_of(100))
    ask(content)
    row_search._remembered.clear()
    found = answer(
        {"path": ask(content)["path"], "names": [], "format": "messages", "columns": {}, "order": "line", "limit": 5,
         "filters": {"text": "plus"}},
        time.monotonic() - 1,
    )  # fmt: skip
    assert (found["is_whole"], found["num_matches"], found["rows"]) == (False, 0, [])
    assert ask(content, {"text": "plus"})["num_matches"] == 100  # nothing of that is remembered


def test_nobody_is_answered_from_what_was_read_for_others(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quick answer would tell one team that another has the same rows."""
    known = ask(jsonl(rows_of(200)))
    request = {
        "path": known["path"], "names": [one["name"] for one in known["done"]["columns"]], "format": "messages",
        "columns": {}, "order": "longest", "limit": 5,
        "filters": {"text": "plus", "column": "topic", "value": "returns"},
    }  # fmt: skip
    row_search.open_rows_file.cache_clear()
    row_search._remembered.clear()
    read: list[str] = []
    column = row_search.RowFile.column

    def counted(file: row_search.RowFile, groups: Any, name: str) -> Any:
        read.append(name)
        return column(file, groups, name)

    monkeypatch.setattr(row_search.RowFile, "column", counted)

    def read_for(team: str) -> list[str]:
        read.clear()
        assert answer(request | {"asked_by": team}, time.monotonic() + 60)["num_matches"] > 0
        return list(read)

    first = read_for("a")
    assert "characters" in first
    assert "characters" not in read_for("a")
    assert read_for("b") == first


def test_pieces_of_text_rule_out_passages_that_cannot_hold_a_needle() -> None:
    import numpy as np

    passages = [f"passage {n} with words {n * 7919}" for n in range(200)]
    bits = np.frombuffer(b"".join(grams(text.encode()) for text in passages), np.uint8).reshape(200, -1)
    may = may_hold(bits, b"words 79190").tolist()
    assert may[10]
    assert sum(may) < 5
    assert may_hold(bits, b"abc").all()


def test_the_process_answers_line_by_line_and_refuses_in_sentences(ask: Ask) -> None:
    known = ask(jsonl(rows_of(20)))
    request = {
        "path": known["path"],
        "names": ["topic"],
        "format": "messages",
        "columns": {},
        "order": "line",
        "limit": 2,
    }
    asked = [
        {**request, "filters": {"text": "plus 1"}},
        {**request, "filters": {"column": "nope", "value": "1"}},
        {**request, "filters": {}, "path": "/nowhere"},
    ]
    done = subprocess.run(
        [sys.executable, "-m", "workers.row_search"], input=b"".join(orjson.dumps(one) + b"\n" for one in asked),
        capture_output=True, check=True,
    )  # fmt: skip
    found, refused, gone = (orjson.loads(line) for line in done.stdout.splitlines())
    assert found["num_matches"] == 11
    assert (refused["kind"], refused["message"]) == ("refused", 'The rows cannot be filtered by the column "nope".')
    assert gone["kind"] == "refused"


def test_a_full_disk_is_said_and_memory_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(jsonl(rows_of(3000)))
    script = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096));"
        "from workers.row_table import main; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(path), "--format", "messages", "--out", str(tmp_path / "out")],
        capture_output=True, check=True,
    )  # fmt: skip
    said = orjson.loads(done.stdout.splitlines()[-1])
    assert (said["kind"], said["code"]) == ("refused", "disk_full")
    # In a process of its own: it limits the memory of the one that it runs in.
    unknown = subprocess.run(
        [sys.executable, "-m", "workers.row_table", str(path), "--format", "nope", "--out", str(tmp_path / "out")],
        capture_output=True, check=True,
    )  # fmt: skip
    assert b"refused" in unknown.stdout

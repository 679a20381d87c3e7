"""The fast ways through ordinary conversations say of every file what the full way says."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.workers.rule_files import FILES, GOOD, LINE, good_row
from workers import fast_rows, inspection
from workers.fast_rows import ordinary_rows, spelling_of
from workers.line_marks import LineMarks
from workers.plain_rows import find_plain
from workers.strict_json import MAX_ROW_BYTES

Capture = pytest.CaptureFixture[bytes]


def answers(path: Path, format_name: str, capture: Capture, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """Every event of the fast way and of the full way."""
    found = []
    for fast in (inspection.FAST_FORMATS, frozenset()):
        with monkeypatch.context() as patch:
            patch.setattr(inspection, "FAST_FORMATS", fast)
            patch.setattr(inspection, "FAST_FROM_BYTES", 0)
            inspection.inspect_rows(path, format_name, {})
        events = [orjson.loads(line) for line in capture.readouterr().out.splitlines()]
        found.append([one for one in events if one["kind"] != "progress"])
    return found[0], found[1]


texts = st.one_of(
    st.text(max_size=30),
    st.sampled_from([
        "hello", "Note : this", "a<b", "<|im_end|>", "</s>", "[INST] x", "task-force sk-abcdefghijklmnopqrstuvwxyz",
        "sk-abcdefghijklmnopqrstuvwxyz", "hf_abcdefghijklmnopqrstuvwxyz0123456789", "AKIAABCDEFGHIJKLMNOP",
        "AIza" + "x" * 35, "ghp_" + "a" * 36, "github_pat_" + "a" * 40, "xoxb-" + "1" * 24,
        "-----BEGIN RSA PRIVATE KEY-----", "a@b.org",
        "caf\u00c3\u00a9", "lost \ufffd", "red \x1b[31m", "del \x7f", "\u202eabc", " spaced",
        "spaced\n", "two\nlines", "\t", "", "key:\nsk-abcdefghijklmnopqrstuvwxyz", "[/INST] x", "\tspaced", "end\\",
        'a "quote"', "\\nothing", "\u00a0wide", "wide\u3000", "\u2003em", "line\u2028", "“quoted”", "naïve château",
        "Ã©", "Â\u00a0", "c1 \x85", "hear\u2066", "€", "a\u1680",
        'say "x": 1', "back\\slash", "<start_of_turn>user", "<<SYS>>", "日本語", "🙂", "x" * 5000,
    ]),
)  # fmt: skip
SEPARATORS = [(",", ":"), (", ", ": "), (" , ", " : ")]
FIELDS = {"messages": ("messages", ("role", "content"), ("user", "assistant")),
          "sharegpt": ("conversations", ("from", "value"), ("human", "gpt"))}  # fmt: skip


def opening(name: str, separators: tuple[str, str], beside: dict[str, Any], *, text_first: bool) -> bytes:
    """A row that shows how a file is spelt."""
    field, (role, text), (asks, says) = FIELDS[name]
    turns = [{role: asks, text: "a"}, {role: says, text: "b, c"}]
    row = {**beside, field: [dict(reversed(one.items())) if text_first else one for one in turns], **beside}
    return json.dumps(row, separators=separators).encode()


names = st.sampled_from(sorted(FIELDS))
roles = st.sampled_from(
    ["system", "user", "user", "assistant", "assistant", "human", "gpt", "User", "tool", "x", 1, None]
)


@st.composite
def turn(draw: st.DrawFn, keys: tuple[str, str]) -> Any:
    made: dict[str, Any] = {keys[0]: draw(roles), keys[1]: draw(texts)}
    more = draw(st.sampled_from([None] * 6 + ["weight", "name", "content", "images"]))
    if more:
        made[more] = draw(st.sampled_from([0, 1, "x", None, []]))
    return draw(st.sampled_from([made] * 8 + ["x", None, {}]))


@st.composite
def raw_row(draw: st.DrawFn) -> bytes:
    sharegpt = draw(st.booleans())
    field, keys = ("conversations", ("from", "value")) if sharegpt else ("messages", ("role", "content"))
    if draw(st.booleans()):
        names = ("human", "gpt") if sharegpt else ("user", "assistant")
        turns: Any = [
            {keys[0]: names[number % 2], keys[1]: draw(texts)} for number in range(draw(st.sampled_from([2, 2, 4, 3])))
        ]
    else:
        turns = draw(st.lists(turn(keys), max_size=4))
    row: dict[str, Any] = {field: turns}
    if draw(st.booleans()) and isinstance(turns, list):
        row[field] = [dict(reversed(one.items())) if isinstance(one, dict) else one for one in turns]
    beside = draw(st.sampled_from([None] * 5 + ["id", "id", "system", "tools", "score", "label", "images", "meta", ""]))
    if beside is not None:
        value = draw(st.sampled_from(["x", "y, {", 'say "x": 1', "é", 1, -2.5e3, None, [], {"a": 1}, True, "a : b"]))
        row = {**row, beside: value} if draw(st.booleans()) else {beside: value, **row}
    separators = draw(st.sampled_from(SEPARATORS))
    raw = json.dumps(row, ensure_ascii=draw(st.booleans()), separators=separators).encode("utf-8", "surrogatepass")
    damage = draw(
        st.sampled_from([None] * 8 + ["cut", "twice", "byte", "blank", "cr", "list", "key", "slash", "brace", "id"])
    )
    if damage == "cut":
        raw = raw[: draw(st.integers(0, len(raw)))]
    elif damage == "twice":
        raw = raw.replace(b'"role"', b'"role":"user","role"', 1)
    elif damage == "key":
        raw = raw[:-1] + b',"messages":[]}'
    elif damage == "slash":
        raw = raw.replace(b"/", b"\\/")
    elif damage == "brace":
        raw += draw(st.sampled_from([b"}", b",{", b'{"":0}', b' ,"a":1']))
    elif damage == "id":
        raw = raw.replace(b'"id"', b'"id":3,"id"', 1)
    elif damage == "byte":
        raw = raw.replace(b"e", b"\xe9", 1)
    elif damage == "blank":
        raw = b"  "
    elif damage == "cr":
        raw += b"\r"
    elif damage == "list":
        raw = b"[" + raw + b"]"
    return raw.replace(b"\n", b" ")


@settings(
    max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    rows=st.lists(raw_row(), min_size=1, max_size=8), name=names, bom=st.booleans(), end=st.sampled_from(["", "\n"]),
    separators=st.sampled_from(SEPARATORS), text_first=st.booleans(),
    beside=st.sampled_from([{}, {}, {"id": 7}, {"id": "x"}, {"id": 1, "topic": "y"}]),
)  # fmt: skip
def test_all_ways_say_the_same(
    tmp_path: Path, capfdbinary: Capture, monkeypatch: pytest.MonkeyPatch, rows: list[bytes], name: str, bom: bool,
    end: str, separators: tuple[str, str], text_first: bool, beside: dict[str, Any],
) -> None:  # fmt: skip
    path = tmp_path / "file"
    first = opening(name, separators, beside, text_first=text_first)
    # More of them than of the others: a file of which most is not UTF-8 is refused as a whole.
    path.write_bytes(b"\xef\xbb\xbf" * bom + b"\n".join([*[first] * 9, *rows]) + end.encode())
    fast, full = answers(path, name, capfdbinary, monkeypatch)
    assert fast == full


@pytest.mark.parametrize("code", [code for code, file in FILES.items() if file.format == "messages"])
def test_both_ways_say_the_same_of_the_file_of_each_rule(
    tmp_path: Path, capfdbinary: Capture, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    path = tmp_path / "file"
    path.write_bytes(FILES[code].content)
    fast, full = answers(path, "messages", capfdbinary, monkeypatch)
    assert fast == full


def test_places_stay_right_over_blocks_and_lines_that_are_too_long(
    tmp_path: Path, capfdbinary: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = [json.dumps(good_row(number)).encode() for number in range(4000)]
    bad = FILES["F001"].content.splitlines()[LINE - 1]
    long, longer = (b'{"messages": "' + b"x" * num + b'"}' for num in (MAX_ROW_BYTES - 20, MAX_ROW_BYTES + 3_000_000))
    rows = [*good, bad, long, *good[:50], longer, bad, *good[50:90], b"", bad, longer, longer, bad]
    path = tmp_path / "file"
    path.write_bytes(b"\n".join(rows))
    fast, full = answers(path, "messages", capfdbinary, monkeypatch)
    assert fast == full
    errors = {one["line"] for one in fast if one["kind"] == "problem" and one["level"] == "error"}
    assert errors == {number for number, row in enumerate(rows, start=1) if row and row not in good}


@pytest.mark.parametrize("more", [-2, -1, 0, 1, 3, 4, 2_000_000])
def test_a_first_line_that_is_too_long_is_one_line_behind_a_byte_order_mark_too(
    tmp_path: Path, capfdbinary: Capture, monkeypatch: pytest.MonkeyPatch, more: int
) -> None:
    long = b'{"messages": "' + b"x" * (MAX_ROW_BYTES - 17 + more) + b'"}\n'
    path = tmp_path / "file"
    path.write_bytes(b"\xef\xbb\xbf" + long + b'{"messages": 1}\n')
    fast, full = answers(path, "messages", capfdbinary, monkeypatch)
    assert fast == full
    places = [(one["line"], one["rule"]) for one in full if one["kind"] == "problem"]
    assert places == [(1, "F009" if len(long) > MAX_ROW_BYTES else "C102"), (2, "C102")]


def test_ordinary_rows_do_take_the_fast_way(tmp_path: Path) -> None:
    path = tmp_path / "file"
    rows = [good_row(number) for number in range(20)] + [{"messages": GOOD, "id": "7", "score": 0.5}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    counted: list[int] = []
    assert list(ordinary_rows(path, "messages", lambda line, *_: counted.append(line))) == []
    assert counted == list(range(1, 22))


@pytest.mark.parametrize("name", sorted(FIELDS))
@pytest.mark.parametrize("text_first", [False, True])
@pytest.mark.parametrize("separators", SEPARATORS[:2])
@pytest.mark.parametrize("beside", [{}, {"id": "row 1", "score": 0.5}])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_rows_as_libraries_write_them_are_not_parsed(
    tmp_path: Path, name: str, text_first: bool, separators: tuple[str, str], beside: dict[str, Any], end: bytes
) -> None:
    path = tmp_path / "file"
    field, (role, text), (asks, says) = FIELDS[name]
    exchange = [{role: asks, text: 'naïve "quotes" … and\nlines'}, {role: says, text: "\\frac日本"}]
    rows = []
    for num in range(1, 5):
        turns = [{role: "system", text: "Be brief."}] * (num % 2) + exchange * num
        turns = [dict(reversed(one.items())) if text_first else one for one in turns]
        rows.append(json.dumps({**beside, field: turns}, ensure_ascii=False, separators=separators).encode())
    path.write_bytes(end.join([*rows, b""]))
    way = spelling_of(path, name)
    assert way is not None
    marks = LineMarks(path.read_bytes())
    is_plain, found = find_plain(marks, way, frozenset(), MAX_ROW_BYTES)
    assert is_plain.all()
    length = len(exchange[0][text]) + len(exchange[1][text])
    assert found.turns.tolist() == [3, 4, 7, 8]
    assert found.characters.tolist() == [9 + length, 2 * length, 9 + 3 * length, 4 * length]
    assert found.answers.tolist() == [len(exchange[1][text])] * 10
    assert found.prints[1] == way.print_of([one[text] for one in exchange * 2])


def test_equal_rows_are_found_whichever_way_they_take(
    tmp_path: Path, capfdbinary: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = {"messages": [{"role": "user", "content": "Où ?\n"}, {"role": "assistant", "content": 'Ici: "là".'}]}
    said["messages"][0]["content"] = "Où\n?"
    plain = json.dumps(said, ensure_ascii=False)
    parsed = [json.dumps(said), plain.replace(" ", "  ", 1), json.dumps({**said, "id": 3}), plain]
    full = plain.replace("{", '{"meta": {"a": 1}, ', 1)
    path = tmp_path / "file"
    path.write_text("\n".join([plain, *parsed, full, plain, json.dumps(good_row(1))]) + "\n")
    fast, slow = answers(path, "messages", capfdbinary, monkeypatch)
    assert fast == slow
    assert [one["line"] for one in fast if one.get("rule") == "Q501"] == [2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("beside", ['"id" :1,"id"', '"id"  :1,"id"', '"":1,"id"', '"id":1,"id"', '"\\u0069d":1,"id"'])
@pytest.mark.parametrize("end", [",", ', "topic": "a : b", '])
def test_a_key_beside_the_turns_that_is_there_twice_is_found(
    tmp_path: Path, capfdbinary: Capture, monkeypatch: pytest.MonkeyPatch, beside: str, end: str
) -> None:
    more = {"topic": "x"} if "topic" in end else {}
    turns = json.dumps({"messages": [GOOD[0], {"role": "assistant", "content": "This."}]})[1:]
    path = tmp_path / "file"
    first = json.dumps({"id": 1, "number": 2, **more})[:-1] + ", " + turns
    path.write_text(f"{first}\n{first}\n{{{beside}: 2{end}{turns}\n")
    assert spelling_of(path, "messages") is not None
    fast, full = answers(path, "messages", capfdbinary, monkeypatch)
    assert fast == full
    rules = {one["rule"] for one in fast if one.get("line") == 3}
    assert ("F004" in rules) == ('""' not in beside)


@pytest.mark.parametrize("asked", ['",', '","', '"', ",", ',"', '\\",', '\\"', "\\", 'say "a","b",', '",",'])
@pytest.mark.parametrize("said", ["yes", ",", '",', ',"no', "\\"])
def test_equal_rows_are_found_whatever_quotes_and_commas_they_end_with(
    tmp_path: Path, capfdbinary: Capture, monkeypatch: pytest.MonkeyPatch, asked: str, said: str
) -> None:
    said = f"{said} and so forth, to the end{said}"
    row = {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}] * 2}
    plain, parsed = json.dumps(row), json.dumps(row, indent=0).replace("\n", " ")
    path = tmp_path / "file"
    path.write_text("\n".join([plain, parsed, plain]) + "\n")
    assert spelling_of(path, "messages") is not None
    fast, full = answers(path, "messages", capfdbinary, monkeypatch)
    assert fast == full
    assert [one["line"] for one in fast if one.get("rule") == "Q501"] == [2, 3]


PIECES = [
    b'"', b"\\", b",", b":", b" :", b"{", b"}", b"[", b"]", b" ", b"\\u0000", b"\\ud800", b"\\ud83d\\ude00", b"\\u0041",
    b"\\n", b"\\/", b"\\b", b"\\x", b"\0", b"\r", b"\t", b"\xe9", b"\xc2\xa0", b"\xe2\x80\xa8", b"\xef\xbb\xbf",
    b"\xff", b"\x7f", b"0", b"null", b'""', b'"role":"user",', b', "content": "x"', b"{}", b"},{", b"}, {",
    b'"messages": [], ', b'"id": 3, ', b'"id" : 3, ', b',"id" :1', b"\xed\xa0\x80", b"[]", b'"system": "x", ',
    b'{"a": [', b"[" * 40, b"1" * 320, b"1e999", b"NaN", b"//", b"<s>", b"a@b.org", b'\\",', b'","',
]  # fmt: skip


def damaged(raw: bytes, chance: random.Random) -> bytes:
    """A row with none, one or a few pieces put in, left out, doubled or put in the place of others."""
    for _ in range(chance.choice([0, 0, 1, 1, 1, 2, 3])):
        at = chance.randrange(len(raw) + 1)
        if chance.random() < 0.5:  # where one thing ends and another begins
            marks = [place for place, byte in enumerate(raw) if byte in b'":,{}[]']
            at = chance.choice(marks or [0]) + chance.randrange(2)
        end = min(at + chance.choice([0, 1, 1, 2, 5, chance.randrange(len(raw) + 1)]), len(raw))
        middle = chance.choice([chance.choice(PIECES), chance.choice(PIECES), b"", raw[at:end] * 2])
        raw = raw[:at] + middle + raw[chance.choice([at, end]) :]
    return raw.replace(b"\n", b" ")


@pytest.mark.parametrize("seed", range(6))
def test_all_ways_say_the_same_of_rows_that_are_damaged_anywhere(
    tmp_path: Path, capfdbinary: Capture, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    chance = random.Random(seed)  # the same rows each time
    says = ["hello", 'say "x": 1', '",', ",", "\\", '"', "a\\n", "x\ny", "é", "日本語", "🙂", '"}]}',
            '{"role": "user"}', "a : b", "x" * 300]  # fmt: skip
    path = tmp_path / "file"
    for number in range(10):
        name, separators = chance.choice(sorted(FIELDS)), chance.choice(SEPARATORS[:2])
        beside = chance.choice([{}, {"id": 7}, {"id": "x"}, {"id": 1, "topic": "y"}])
        field, (role, text), by = FIELDS[name]
        is_ascii, text_first = chance.random() < 0.3, chance.random() < 0.4
        rows = [opening(name, separators, beside, text_first=text_first)]
        for _ in range(60):
            turns: Any = [{role: by[place % 2], text: chance.choice(says)} for place in range(chance.choice([2, 2, 4]))]
            turns = [dict(reversed(one.items())) for one in turns] if text_first else turns
            row = {**beside, field: turns} if chance.random() < 0.7 else {field: turns, **beside}
            raw = json.dumps(row, ensure_ascii=is_ascii, separators=separators).encode()
            rows.append(damaged(raw, chance))
        end = chance.choice([b"\n", b"\r\n"])
        path.write_bytes(b"\xef\xbb\xbf" * (number % 2) + end.join([*rows, *rows[5:9]]))
        monkeypatch.setattr(fast_rows, "_BLOCK_BYTES", chance.choice([200, 3000, 512 * 1024]))
        fast, full = answers(path, name, capfdbinary, monkeypatch)
        assert fast == full

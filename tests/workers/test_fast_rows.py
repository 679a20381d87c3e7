"""The fast way through ordinary conversations says of every file what the full way says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.workers.rule_files import FILES, GOOD, LINE, good_row
from workers import inspection
from workers.fast_rows import ordinary_rows
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
        "spaced\n", "two\nlines", "\t", "",
        'say "x": 1', "back\\slash", "<start_of_turn>user", "<<SYS>>", "日本語", "🙂", "x" * 5000,
    ]),
)  # fmt: skip
OPENING = {
    "messages": b'{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}]}',
    "sharegpt": b'{"conversations":[{"from":"human","value":"a"},{"from":"gpt","value":"b"}]}',
}
names = st.sampled_from(sorted(OPENING))
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
    beside = draw(st.sampled_from([None] * 5 + ["id", "system", "tools", "score", "label", "images", "meta"]))
    if beside:
        row[beside] = draw(st.sampled_from(["x", 1, None, [], {"a": 1}, True]))
    separators = draw(st.sampled_from([(",", ":"), (", ", ": "), (" , ", " : ")]))
    raw = json.dumps(row, ensure_ascii=draw(st.booleans()), separators=separators).encode("utf-8", "surrogatepass")
    damage = draw(st.sampled_from([None] * 8 + ["cut", "twice", "byte", "blank", "cr", "list", "key"]))
    if damage == "cut":
        raw = raw[: draw(st.integers(0, len(raw)))]
    elif damage == "twice":
        raw = raw.replace(b'"role"', b'"role":"user","role"', 1)
    elif damage == "key":
        raw = raw[:-1] + b',"messages":[]}'
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
@given(rows=st.lists(raw_row(), min_size=1, max_size=8), name=names, bom=st.booleans(), last=st.booleans())
def test_both_ways_say_the_same(
    tmp_path: Path, capfdbinary: Capture, monkeypatch: pytest.MonkeyPatch, rows: list[bytes], name: str, bom: bool,
    last: bool,
) -> None:  # fmt: skip
    path = tmp_path / "file"
    content = b"\n".join([OPENING[name], OPENING[name], *rows]) + (b"\n" if last else b"")
    path.write_bytes(b"\xef\xbb\xbf" * bom + content)
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


def test_ordinary_rows_do_take_the_fast_way(tmp_path: Path) -> None:
    path = tmp_path / "file"
    rows = [good_row(number) for number in range(20)] + [{"messages": GOOD, "id": "7", "score": 0.5}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    counted: list[int] = []
    assert list(ordinary_rows(path, "messages", lambda line, *_: counted.append(line))) == []
    assert counted == list(range(1, 22))

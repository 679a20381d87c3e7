"""A file for every rule of the catalogue: code -> (format, its bytes, where the rule must be reported).

A place is (line, field); both are None for a remark on the whole file. Files that are about a row hold ten good rows
first, so that they are not too small.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

GOOD = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "It is this."}]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
CALL = {"id": "a", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
LINE = 11
"""Where the bad row stands."""


@dataclass(frozen=True)
class RuleFile:
    """A file that breaks one rule at known places."""

    format: str
    content: bytes
    places: tuple[tuple[int | None, str | None], ...]


def good_row(number: int) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": f"What is {number}?"}, GOOD[1]]}


def lines(*rows: Any) -> bytes:
    """JSON Lines of rows; bytes stand for themselves."""
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)


def chat(row: Any, *fields: str | None) -> RuleFile:
    """Ten good conversations and then a row, reported once in each field."""
    return RuleFile(
        "messages", lines(*map(good_row, range(10)), row), tuple((LINE, field) for field in fields or [None])
    )


def turns(*messages: Any, **beside: Any) -> dict[str, Any]:
    return {"messages": list(messages), **beside}


def said(text: str) -> dict[str, Any]:
    """A conversation whose answer is this text."""
    return turns(GOOD[0], {"role": "assistant", "content": text})


def pairs(row: dict[str, Any], field: str) -> RuleFile:
    """Ten good pairs and then a row."""
    good = [{"prompt": f"ask {n}", "chosen": f"yes {n}", "rejected": f"certainly not {n}"} for n in range(10)]
    return RuleFile("preference", lines(*good, row), ((LINE, field),))


def verdicts(*rows: dict[str, Any]) -> bytes:
    return lines(*({"prompt": f"ask {n}", "completion": f"say {n}", "label": n % 2 == 0} for n in range(10)), *rows)


def table(*records: bytes) -> bytes:
    return b"\n".join([b"prompt,completion", *(b"ask %d,say %d" % (n, n) for n in range(10)), *records]) + b"\n"


FILES: dict[str, RuleFile] = {
    "F001": chat(b'{"messages": "caf\xe9"}'),
    "F002": chat(b'{"messages": [}'),
    "F003": chat(b"[1, 2]"),
    "F004": chat(b'{"messages": [], "messages": []}', "messages"),
    "F005": chat(json.dumps(said("a\0b")).encode(), "messages[1].content"),
    "F006": chat(b'{"messages": [], "score": NaN}'),
    "F007": chat(b'{"messages": ' + b"[" * 40 + b"]" * 40 + b"}"),
    "F008": chat(b'{"messages": [], "id": ' + b"9" * 400 + b"}"),
    "F009": chat(b'{"messages": "' + b"x" * (8 * 1024**2) + b'"}'),
    "F010": chat({"other": 1}, "messages"),
    "F011": chat({"instruction": "Add.", "output": "3"}),
    "F013": chat(said("It is a caf\u00c3\u00a9."), "messages[1].content"),
    "F014": chat(said("It is a caf\ufffd."), "messages[1].content"),
    "F015": chat(said("It is \x1b[31mred."), "messages[1].content"),
    "F016": chat({"messages": json.dumps(GOOD)}, "messages"),
    "F020": RuleFile("prompt_completion", table(b"only one"), ((12, None),)),
    "F021": RuleFile("prompt_completion", table(b'"a" x,b'), ((12, None),)),
    "F022": RuleFile("prompt_completion", table(b"x" * 5_000_000 + b",b"), ((12, None),)),
    "C101": chat(turns({"role": "humann", "content": "x"}, GOOD[1]), "messages[0].role"),
    "C102": chat(turns(GOOD[0], {"role": "assistant", "content": ""}), "messages[1].content"),
    "C103": chat(turns(GOOD[0]), "messages"),
    "C104": chat(turns(GOOD[0], GOOD[0], GOOD[1]), "messages"),
    "C105": chat(turns(GOOD[0], {"role": "system", "content": "Be brief."}, GOOD[1]), "messages"),
    "C106": chat(turns(GOOD[0], {**GOOD[1], "weight": "1"}), "messages[1].weight"),
    "C107": chat(
        turns(GOOD[0], {"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}), "messages[1].tool_calls"
    ),
    "C108": chat(said("It is this. "), "messages[1].content"),
    "C109": chat(turns({"role": "human", "content": "x"}, GOOD[1]), "messages[0].role"),
    "C110": chat(
        turns(GOOD[0], {"role": "tool", "tool_call_id": "z", "content": "x"}, GOOD[1]), "messages[1]"
    ),
    "C111": chat(
        turns(
            GOOD[0], {"role": "assistant", "tool_calls": [{"function": {"name": "news", "arguments": {}}}]},
            tools=TOOLS,
        ), "messages[1].tool_calls",
    ),
    "C112": chat(
        turns(GOOD[0], {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{a}"}}]}),
        "messages[1].tool_calls[0].arguments",
    ),
    "C113": chat(turns(*GOOD, tools=[{"type": "function"}]), "tools[0]"),
    "C114": chat(
        turns(GOOD[0], {"role": "assistant", "tool_calls": [CALL]}, GOOD[0], GOOD[1], tools=TOOLS),
        "messages[1].tool_calls",
    ),
    "C115": chat(turns({"role": "user", "content": [{"type": "audio"}]}, GOOD[1]), "messages[0].content[0]"),
    "C116": chat(turns(*GOOD, images=["a.png"]), "images"),
    "P201": pairs({"prompt": "a", "chosen": "b"}, "rejected"),
    "P202": pairs({"prompt": "a", "chosen": "b", "rejected": "b"}, "rejected"),
    "P203": pairs({"chosen": "Yes.", "rejected": "No."}, "rejected"),
    "P204": RuleFile(
        "preference",
        lines(*({"prompt": f"ask {n}", "chosen": f"yes, indeed {n}", "rejected": "no"} for n in range(30))),
        ((None, None),),
    ),
    "P205": pairs({"prompt": "a", "answers": [{"answer": "x", "rank": 1}, {"answer": "y", "rank": 1}]}, "answers"),
    "P206": pairs({"chosen": [*GOOD, GOOD[0]], "rejected": [*GOOD]}, "chosen"),
    "K301": RuleFile("kto", verdicts({"prompt": "a", "completion": "b", "label": "true"}), ((LINE, "label"),)),
    "K302": RuleFile(
        "kto", lines(*({"prompt": f"ask {n}", "completion": f"say {n}", "label": True} for n in range(10))),
        ((None, None),),
    ),
    "T405": chat(said("It is this.<|im_end|>"), "messages[1].content"),
    "Q501": chat(good_row(3)),
    "Q503": chat(said("Use AKIAABCDEFGHIJKLMNOP."), "messages[1].content"),
    "Q504": chat(said("Ask ann@example.org."), "messages[1].content"),
    "Q506": chat(turns(GOOD[0], {"role": "assistant", "content": GOOD[0]["content"]})),
    "S601": RuleFile("messages", lines(*map(good_row, range(9))), ((None, None),)),
}  # fmt: skip

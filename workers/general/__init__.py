"""The general set: a small fixed set of questions and texts that shows what an adapter has forgotten (README.md)."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from workers.examples import Example, Message

FILE = Path(__file__).with_name("rows.jsonl")
SHA256 = "94b207f89f0858ba7a96863ec192b448575d077579fd8ece0c262ce2efbe6c05"
"""Of the file. Scores on it are comparable only while it stays the same."""
MAX_LENGTH = 512
"""Tokens at which its rows are cut: none is, unless a tokenizer makes a token of each byte."""


@cache
def general_rows() -> tuple[Example, ...]:
    """The rows as examples, in the order of the file."""
    found = []
    for line, text in enumerate(FILE.read_text("utf-8").splitlines(), start=1):
        row = json.loads(text)
        found.append(Example(line, (Message("user", row["prompt"]), Message("assistant", row["answer"]))))
    return tuple(found)

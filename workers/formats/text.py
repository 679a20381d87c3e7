"""Plain text for continued pre-training: {"text": "..."} rows, or the passages of a text file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from workers.examples import AnyExample, ExampleType, Problem, TextExample
from workers.formats import Format
from workers.formats._beside import media_beside
from workers.formats._rules import check_text, row_of_other

_BESIDE = frozenset(
    {"id", "url", "source", "title", "meta", "metadata", "date", "timestamp", "added", "created", "lang", "language",
     "author", "license", "licence", "file", "path", "split", "tokens", "num_tokens", "token_count", "dump", "score"}
)  # fmt: skip
"""What corpora keep beside a text."""


class Text(Format):
    name = "text"
    label = "Plain text"
    help = 'Rows like {"text": "..."}, or a text file whose passages are parted by blank lines.'
    example_type: ExampleType = "text"

    def recognise(self, head: Sequence[dict[str, Any]]) -> tuple[float, dict[str, str]]:
        """Sure when a text and what corpora keep beside it is all there is."""
        alone = sum("text" in row and row.keys() - {"text"} <= _BESIDE for row in head)
        return 0.95 * alone / len(head), {}

    def parse(self, row: dict[str, Any], line: int, columns: dict[str, str]) -> tuple[AnyExample | None, list[Problem]]:
        """The text."""
        if "text" not in row:
            return None, [row_of_other(row, ("text",), line, self.name, self.label)]
        text, problem = check_text(row, "text", line)
        problems = [*([problem] if problem else []), *media_beside(row, line)]
        return (None if problems else TextExample(line, text)), problems


PLUGIN = Text()

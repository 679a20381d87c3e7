"""Regular expression: whether an answer has the form, or the part, that a pattern of the team's own asks for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field, field_validator

from workers.evaluations import MeanEvaluation, MetricSettings, Question, RowValue, ScoredRow
from workers.patterns import MAX_CHARACTERS, captured, compile_pattern, storable

_WORDS = {"search": "found", "full_match": "whole answer", "same_group": "as the reference"}


class RegexSettings(MetricSettings):
    """The pattern, and when an answer counts."""

    pattern: str = Field(
        "",
        max_length=MAX_CHARACTERS,
        title="Pattern",
        description="A regular expression in RE2's syntax, which has no looking around and no back-references, so that "
        "no pattern can take for ever. (?i) in front ignores case; (?s) lets a dot match line ends.",
        json_schema_extra={"source": "none: every task has its own"},
    )
    mode: Literal["search", "full_match", "same_group"] = Field(
        "search",
        title="An answer counts when",
        description="search: the pattern is found anywhere in it. full match: it is the whole answer, spaces around it "
        "aside. same group: what the first brackets capture in it is what they capture in the reference (the whole "
        "match without brackets, the first match of several); rows whose reference has no match are left out.",
        json_schema_extra={"source": "search asks for the least"},
    )

    @field_validator("pattern")
    @classmethod
    def _is_pattern(cls, pattern: str) -> str:
        compile_pattern(pattern)
        return pattern


class Regex(MeanEvaluation):
    name = "regex"
    label = "Regular expression"
    help = (
        "Share of generated answers that a regular expression of yours accepts: found in them, the whole of them, or "
        "with the same captured part as in the reference, as in #### (\\S+). The syntax is RE2's."
    )
    higher_is_better = True
    needs = "answer"
    smallest_effect = 0.05
    bounds = (0.0, 1.0)
    Settings = RegexSettings

    def described(self) -> str:
        """When an answer counts, and the pattern."""
        return f"{_WORDS[self.settings.mode]} {self.settings.pattern}"

    def why_left_out(self, rows: Sequence[Question]) -> list[str]:
        """Rows whose reference has not the part that is compared."""
        if self.settings.mode != "same_group":
            return super().why_left_out(rows)
        pattern = compile_pattern(self.settings.pattern)
        why = "The pattern is not found in the right answer, so there is nothing to compare."
        return ["" if pattern.search(storable(row.reference)) else why for row in rows]

    def row_value(self, row: ScoredRow) -> RowValue:
        """1 for an answer that counts, else 0; no weight for a reference without the part that is compared."""
        pattern, answer = compile_pattern(self.settings.pattern), storable(row.answer or "")
        if self.settings.mode == "search":
            return RowValue(float(pattern.search(answer) is not None))
        if self.settings.mode == "full_match":
            return RowValue(float(pattern.fullmatch(answer.strip()) is not None))
        expected = pattern.search(storable(row.reference))
        if expected is None:
            return RowValue(0.0, 0.0)
        found = pattern.search(answer)
        return RowValue(float(found is not None and captured(found) == captured(expected)))


PLUGIN = Regex()

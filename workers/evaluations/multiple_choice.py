"""Multiple choice: whether the model finds the right option the likeliest, without writing anything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from workers.evaluations import MeanEvaluation, MetricSettings, Question, RowValue, ScoredRow
from workers.patterns import MAX_CHARACTERS, captured, compile_pattern, storable

MAX_OPTIONS = 26
"""Options of a row: each is one more row for the model to read."""
MAX_LISTED = 6
"""Options that a sentence names."""
MAX_REFERENCES = 20
"""Distinct references that still make options; more are free answers."""


class MultipleChoiceSettings(MetricSettings):
    """Where the options of a row come from, and how their likelihoods compare."""

    options_from: Literal["prompt", "list", "references"] = Field(
        "prompt",
        title="Options from",
        description="prompt: what the pattern finds in the question, as (A), (B), (C). list: the options below, the "
        f"same for every row. references: the different right answers of all scored rows, at most {MAX_REFERENCES}.",
        json_schema_extra={"source": "how BIG-Bench Hard and most test sheets are written"},
    )
    pattern: str = Field(
        r"\([A-Z]\)",
        max_length=MAX_CHARACTERS,
        title="Pattern of an option",
        description="A regular expression in RE2's syntax that is looked for in the question; each different match is "
        "an option, or what its first brackets capture. Counts only where options come from the prompt.",
        json_schema_extra={"source": "a capital letter in brackets, as in BIG-Bench Hard"},
    )
    options: tuple[str, ...] = Field(
        (),
        max_length=MAX_OPTIONS,
        title="Options",
        description="As the right answers are written, separated by commas: yes, no; one with a comma in quotes. "
        "Counts only where options come from the list.",
        json_schema_extra={"source": "none: every task has its own", "separator": ","},
    )
    per_character: bool = Field(
        False,
        title="Per character",
        description="Divide each option's log-likelihood by its number of characters (acc_norm of the evaluation "
        "harness), so that long options are not at a disadvantage.",
        json_schema_extra={"source": "off: acc of the evaluation harness (Gao et al. 2021)"},
    )

    @field_validator("pattern")
    @classmethod
    def _is_pattern(cls, pattern: str) -> str:
        compile_pattern(pattern)
        return pattern

    @field_validator("options")
    @classmethod
    def _are_options(cls, options: tuple[str, ...]) -> tuple[str, ...]:
        if any(not one.strip() for one in options):
            raise ValueError("An option is empty. Remove it")
        return tuple(dict.fromkeys(one.strip() for one in options))

    @model_validator(mode="after")
    def _has_a_choice(self) -> Self:
        if self.options_from == "list" and len(self.options) < 2:
            raise ValueError("Write two options or more, as in: yes, no")
        return self


class MultipleChoice(MeanEvaluation):
    """An option's likelihood is that of its text alone, without the end of the turn.

    Of options whose likelihoods are equal to the last bit the first counts as chosen, as in the evaluation harness:
    a model that knows nothing and gives all the same is right where the first option is.
    """

    name = "multiple_choice"
    label = "Multiple choice"
    help = (
        "Share of rows whose right option the model gives the highest log-likelihood (Gao et al. 2021, the evaluation "
        "harness's acc, or acc_norm per character). Of exactly equal ones the first counts. Rows whose reference is "
        "none of their options are left out. Uses every held-out row; nothing is written."
    )
    higher_is_better = True
    needs = "choices"
    smallest_effect = 0.05
    bounds = (0.0, 1.0)
    Settings = MultipleChoiceSettings

    def described(self) -> str:
        """Where the options come from."""
        settings = self.settings
        where = {
            "list": ", ".join(settings.options),
            "prompt": f"{settings.pattern} in the prompt",
            "references": "all references",
        }[settings.options_from]
        return f"{where}, per character" if settings.per_character else where

    def options(self, rows: Sequence[Question]) -> list[tuple[str, ...]]:
        """Each row's options in their order; none for a row with fewer than two or more than MAX_OPTIONS."""
        settings = self.settings
        if settings.options_from == "list":
            return [settings.options for _ in rows]
        if settings.options_from == "references":
            distinct = sorted({row.reference.strip() for row in rows} - {""})
            return [tuple(distinct) if 2 <= len(distinct) <= MAX_REFERENCES else () for _ in rows]
        found = (_matches(settings.pattern, row) for row in rows)
        return [options if 2 <= len(options) <= MAX_OPTIONS else () for options in found]

    def why_left_out(self, rows: Sequence[Question]) -> list[str]:
        """Rows without options, and those whose right answer is none of theirs."""
        return [self._why(row, options, rows) for row, options in zip(rows, self.options(rows), strict=True)]

    def _why(self, row: Question, options: tuple[str, ...], rows: Sequence[Question]) -> str:
        right = row.reference.strip()
        if options:
            listed = ", ".join(_quoted(one) for one in options[:MAX_LISTED])
            more = f" and {len(options) - MAX_LISTED} more" if len(options) > MAX_LISTED else ""
            why = f"The right answer {_quoted(right)} is none of the options {listed}{more}."
            return "" if right in options else why
        if self.settings.options_from == "references":
            found = len({one.reference.strip() for one in rows} - {""})
            if found < 2:
                return "All scored rows have the same right answer, so there is nothing to choose from."
            return (
                f"The scored rows have {found:,} different right answers, and {MAX_REFERENCES} at most make options. "
                "Take the options from the prompt or from a list."
            )
        found = len(_matches(self.settings.pattern, row))
        if found > MAX_OPTIONS:
            return f"The pattern finds {found:,} options in the question; {MAX_OPTIONS} are taken at most."
        return f"The pattern finds {'only one option' if found else 'no option'} in the question; it takes two or more."

    def row_value(self, row: ScoredRow) -> RowValue:
        """1 where the reference is the likeliest option, else 0; no weight where it is no option."""
        values, right = row.options.get(self.key, {}), row.reference.strip()
        if right not in values:
            return RowValue(0.0, 0.0)
        chosen = max(values, key=lambda option: values[option] / (len(option) if self.settings.per_character else 1))
        return RowValue(float(chosen == right))


def _matches(pattern: str, row: Question) -> tuple[str, ...]:
    """What a pattern finds in the question, each once."""
    matches = (captured(match) for match in compile_pattern(pattern).finditer(storable(row.prompt)))
    return tuple(dict.fromkeys(one for one in matches if one))


def _quoted(text: str) -> str:
    return f'"{text[:60]}..."' if len(text) > 60 else f'"{text}"'


PLUGIN = MultipleChoice()

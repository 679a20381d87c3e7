"""What a comparison says in a word: better, worse, no difference, or too few rows to tell."""

from __future__ import annotations

import math
from enum import StrEnum
from typing import Protocol

from workers.statistics import Comparison

# Of the paired test, two-sided: half of the usual 5 %, so that "an equal model is told to be equal in 95 of 100 cases"
# holds with room and not on average.
SIGNIFICANCE = 0.025
# Standard normal quantiles: of that test, and of finding in nine cases of ten a difference that is there.
_Z_OF_TEST, _Z_OF_POWER = 2.241403, 1.281552


class Verdict(StrEnum):
    """How an adapter stands beside the base, or beside another adapter."""

    BETTER = "better"
    WORSE = "worse"
    NO_DIFFERENCE = "no difference"
    TOO_FEW_ROWS = "too few rows to tell"


class Compared(Protocol):
    """A figure's difference between two models over the same rows: a ScoreRecord, or the row of a table."""

    @property
    def num_rows(self) -> int: ...

    @property
    def higher_is_better(self) -> bool: ...

    @property
    def difference(self) -> float: ...

    @property
    def difference_low(self) -> float: ...

    @property
    def difference_high(self) -> float: ...

    @property
    def p_value(self) -> float | None: ...

    @property
    def smallest_effect(self) -> float | None: ...

    @property
    def rows_needed(self) -> int | None: ...


def verdict(compared: Compared, *, p_value: float | None = None) -> Verdict:
    """Better or worse where both the 95 % interval and the paired test leave no doubt; "no difference" only where the
    rows would have shown the smallest difference worth telling, else "too few rows to tell".

    A difference that is certain and smaller than any worth telling is none: where all rows move by a thousandth, the
    test finds that, too. So neither word is used where the whole interval lies within the smallest effect to either
    side, which is what the two one-sided tests of Schuirmann 1987 call equivalent.

    Args:
        p_value: instead of the comparison's own, one that was adjusted for several comparisons.
    """
    p_value = compared.p_value if p_value is None else p_value
    covers_zero = compared.difference_low <= 0 <= compared.difference_high
    most = max(abs(compared.difference_low), abs(compared.difference_high))
    is_worth_telling = compared.smallest_effect is None or most >= compared.smallest_effect
    if is_worth_telling and not covers_zero and (p_value is None or p_value < SIGNIFICANCE):
        return Verdict.BETTER if (compared.difference > 0) == compared.higher_is_better else Verdict.WORSE
    return Verdict.TOO_FEW_ROWS if compared.num_rows < (compared.rows_needed or 0) else Verdict.NO_DIFFERENCE


def rows_needed(found: Comparison, smallest_effect: float) -> int:
    """How many rows like these show a difference of this size nine times in ten.

    The usual normal approximation, ((z of the test + z of the power) * deviation / difference)^2 (Cohen 1988,
    chapter 2).
    """
    return _rows(found.deviation, found.is_all_or_nothing, smallest_effect)


def rows_recommended(found: Comparison, smallest_effect: float) -> int:
    """`rows_needed` on the safe side, since the rows so far only estimate how far rows spread; two digits."""
    # One row tells nothing of the spread of others.
    deviation = found.deviation_high if math.isfinite(found.deviation_high) else 10 * max(found.deviation, 1.0)
    needed = _rows(deviation, found.is_all_or_nothing, smallest_effect)
    digits = 10 ** max(0, len(str(needed)) - 2)
    return math.ceil(needed / digits) * digits


def _rows(deviation: float, is_all_or_nothing: bool, effect: float) -> int:
    # Where a row is right or wrong, a difference of that size is itself that many rows turned.
    variance = deviation**2 + (effect if is_all_or_nothing else 0.0)
    return max(2, math.ceil((_Z_OF_TEST + _Z_OF_POWER) ** 2 * variance / effect**2))

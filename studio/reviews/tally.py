"""How blind verdicts add up: counts, and the exact interval of the adapter's share of the decided ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

CONFIDENCE = 0.95
_STEPS = 60


@dataclass(frozen=True)
class Tally:
    """Verdicts by winner. `share` is the adapter's part of those that one side won, `low` and `high` its interval.

    All three are None where no side has won yet.
    """

    num_items: int
    num_judged: int
    adapter: int
    base: int
    same: int
    bad: int
    share: float | None
    low: float | None
    high: float | None


def tally(counts: Mapping[str, int], *, num_items: int) -> Tally:
    """The tally of {winner: verdicts}, winners being "adapter", "base", "same" and "bad"."""
    won, lost = counts.get("adapter", 0), counts.get("base", 0)
    share = low = high = None
    if won + lost:
        share = won / (won + lost)
        low, high = exact_interval(won, won + lost)
    return Tally(
        num_items=num_items, num_judged=sum(counts.values()), adapter=won, base=lost, same=counts.get("same", 0),
        bad=counts.get("bad", 0), share=share, low=low, high=high,
    )  # fmt: skip


def exact_interval(num_won: int, num_all: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The exact interval of a share of wins (Clopper and Pearson 1934, "The use of confidence or fiducial limits
    illustrated in the case of the binomial").

    Both ends are found by halving: the web process has no package for the quantiles of the beta distribution.
    """
    tail = (1 - confidence) / 2
    low = 0.0 if num_won == 0 else _solve(lambda share: _at_least(num_won, num_all, share), tail)
    # P(at most k wins) falls as the share rises: it is one minus what rises.
    high = 1.0 if num_won == num_all else _solve(lambda share: _at_least(num_won + 1, num_all, share), 1 - tail)
    return low, high


def _at_least(num_won: int, num_all: int, share: float) -> float:
    """Probability of at least so many wins; rises with the share."""
    if not 0 < share < 1:
        return float(share >= 1)
    logs = (
        math.lgamma(num_all + 1) - math.lgamma(won + 1) - math.lgamma(num_all - won + 1)
        + won * math.log(share) + (num_all - won) * math.log1p(-share)
        for won in range(num_won, num_all + 1)
    )  # fmt: skip
    return math.fsum(math.exp(one) for one in logs)


def _solve(rising: Callable[[float], float], target: float) -> float:
    low, high = 0.0, 1.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < target else (low, middle)
    return (low + high) / 2

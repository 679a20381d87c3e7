"""How blind verdicts add up: counts, and the exact interval of the adapter's share of the decided ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from workers.proportions import clopper_pearson


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
        low, high = clopper_pearson(won, won + lost)
    return Tally(
        num_items=num_items, num_judged=sum(counts.values()), adapter=won, base=lost, same=counts.get("same", 0),
        bad=counts.get("bad", 0), share=share, low=low, high=high,
    )  # fmt: skip

"""Rows with two models' answers, as pages list them: searched, the worst first, a page at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from django.db.models import FloatField, Q, QuerySet, Value
from django.db.models.expressions import Combinable
from django.db.models.functions import Coalesce

from studio.query_values import whole_number

PAGE_SIZE = 20
MAX_SEARCH = 200
# Further from zero than any figure's change: rows without a figure come last.
_NO_CHANGE = 1e300
_TEXTS = ("prompt", "reference", "base_answer", "adapter_answer")


@dataclass(frozen=True)
class Tab:
    """One choice of what is shown, with how many there are."""

    value: str
    label: str
    count: int
    query: str


def search_of(query: Mapping[str, Any]) -> str:
    """The text that a URL searches for."""
    return str(query.get("q", "")).replace("\0", "")[:MAX_SEARCH].strip()


def place_of(query: Mapping[str, Any]) -> tuple[float, int] | None:
    """Change, as ordered, and key of the row before the page that a URL asks for; None for the first page."""
    change, _, key = str(query.get("after", "")).partition("_")
    number = whole_number(key)
    try:
        return (float(change), number) if number is not None else None
    except ValueError:
        return None


def word_of(change: float | None) -> str:
    """How a row went, in a word, of a change that is above 0 where the adapter is better; empty without one."""
    if change is None:
        return ""
    return "regression" if change < 0 else "improvement" if change > 0 else "tie"


def worst_first(
    rows: QuerySet[Any], change: Combinable, *, best_first: bool, search: str, after: tuple[float, int] | None
) -> QuerySet[Any]:
    """Rows that hold a text, by their change, equal ones as they were stored; those without a change come last.

    Each has its place as `order`, by which `after` goes on.
    """
    order = Coalesce(-change if best_first else change, Value(_NO_CHANGE), output_field=FloatField())
    ordered: QuerySet[Any] = rows.annotate(order=order)
    if search:
        anywhere = Q()
        for name in _TEXTS:
            anywhere |= Q(**{f"{name}__icontains": search})
        ordered = ordered.filter(anywhere)
    if after is not None:
        place, key = after
        ordered = ordered.filter(Q(order__gt=place) | Q(order=place, pk__gt=key))
    return ordered.order_by("order", "pk")

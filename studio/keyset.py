"""Pages of a long list by the values of their last row, not by counting rows: as fast at the end as at the beginning.

Rows that come or go meanwhile neither repeat nor skip others.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from typing import Any, Generic, TypeVar

from django.db.models import F, Model, Q, QuerySet
from django.http import QueryDict

T = TypeVar("T", bound=Model)
MAX_CURSOR = 400


@dataclass(frozen=True)
class Key:
    """One column of an order. The last key of an order must tell any two rows apart.

    Only the first may be nullable; rows without a value of it come last.
    """

    name: str
    is_descending: bool = False
    is_nullable: bool = False
    joined_key: str = ""
    """Of a nullable column of a joined row, the column that joins it: a database finds what has no such row by it."""


@dataclass(frozen=True)
class KeysetPage(Generic[T]):
    """Rows, and the cursors of the pages before and after; empty where there are none."""

    rows: list[T]
    before: str
    after: str


def read_page(
    rows: QuerySet[T], keys: Sequence[Key], query: QueryDict | Mapping[str, str], *, size: int
) -> KeysetPage[T]:
    """The page that `after` or `before` of a URL asks for; the first one where they say nothing that can be read."""
    backwards = read_cursor(query.get("before", ""), keys)
    forwards = read_cursor(query.get("after", ""), keys) if backwards is None else None
    is_backwards = backwards is not None
    cursor = backwards or forwards
    found: list[T] = []
    for part in _parts(rows, keys, cursor, is_backwards=is_backwards):
        found += part[: size + 1 - len(found)]
        if len(found) > size:
            break
    has_more = len(found) > size
    shown = found[:size]
    if is_backwards:
        shown.reverse()
    has_before = has_more if is_backwards else cursor is not None
    has_after = is_backwards or has_more
    if not shown:
        return KeysetPage([], "", "")
    return KeysetPage(
        shown,
        write_cursor(shown[0], keys) if has_before else "",
        write_cursor(shown[-1], keys) if has_after else "",
    )


def write_cursor(row: Model, keys: Sequence[Key]) -> str:
    """A row's place in the order, for a URL."""
    values = [getattr(row, key.name) for key in keys]
    return pack([value.isoformat() if isinstance(value, date) else value for value in values])


def pack(values: Sequence[Any]) -> str:
    """Plain values as text that a URL may hold."""
    return base64.urlsafe_b64encode(json.dumps(values).encode()).decode().rstrip("=")


def unpack(text: str) -> Any:
    """What `pack` was given; raises ValueError for text that it did not make."""
    return json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))


def read_cursor(text: str, keys: Sequence[Key]) -> list[Any] | None:
    """The values of a cursor; None for what is none of this order."""
    if not text or len(text) > MAX_CURSOR:
        return None
    try:
        values = unpack(text)
        if not isinstance(values, list) or len(values) != len(keys):
            return None
        return [_read(value, key) for value, key in zip(values, keys, strict=True)]
    except (ValueError, TypeError):
        return None


def _read(value: Any, key: Key) -> Any:
    if value is None and not key.is_nullable:
        raise ValueError("a missing value")
    if isinstance(value, str) and key.name.endswith("_at"):
        return datetime.fromisoformat(value)
    if isinstance(value, str) and key.name.endswith("_on"):
        return date.fromisoformat(value)
    # No column holds an integer beyond its range, and no text a zero character.
    is_usable = (
        value is None
        or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**31)
        or (isinstance(value, float) and value == value and abs(value) != float("inf"))
        or (isinstance(value, str) and "\0" not in value and not key.name.endswith("pk"))
    )
    if not is_usable:
        raise ValueError("not a value of this column")
    return value


def _parts(
    rows: QuerySet[T], keys: Sequence[Key], values: Sequence[Any] | None, *, is_backwards: bool
) -> list[QuerySet[T]]:
    """The rows beyond a cursor's values, in the order in which they are read; the second part follows the first.

    Rows without a value of the first key are a part of their own: with them among the others, a database would have to
    sort all rows to find the first few, which an index gives it otherwise.
    """
    first, rest = keys[0], keys[1:]
    if not first.is_nullable:
        return [_part(rows, keys, values, is_backwards=is_backwards)]
    with_value = rows.filter(**{f"{first.name}__isnull": False})
    without = rows.filter(**{f"{first.joined_key or first.name}__isnull": True})
    if values is not None and (values[0] is None) != is_backwards:
        # The cursor is in the part that is read last.
        own, own_keys, own_values = (with_value, keys, values) if is_backwards else (without, rest, values[1:])
        return [_part(own, own_keys, own_values, is_backwards=is_backwards)]
    if is_backwards:
        assert values is not None
        begun = _part(without, rest, values[1:], is_backwards=True)
        return [begun, _part(with_value, keys, None, is_backwards=True)]
    begun = _part(with_value, keys, values, is_backwards=False)
    return [begun, _part(without, rest, None, is_backwards=False)]


def _part(rows: QuerySet[T], keys: Sequence[Key], values: Sequence[Any] | None, *, is_backwards: bool) -> QuerySet[T]:
    """Rows beyond these values, in order; none of them misses a value."""
    if values is not None:
        rows = rows.filter(_beyond(keys, values, is_backwards=is_backwards))
    return rows.order_by(*(_order(key, is_backwards=is_backwards) for key in keys))


def _beyond(keys: Sequence[Key], values: Sequence[Any], *, is_backwards: bool) -> Q:
    """Rows that come after these values in the order, or before them."""
    found = Q(pk__in=[])
    same = Q()
    for key, value in zip(keys, values, strict=True):
        found |= same & Q(**{f"{key.name}__{_comparison(key, is_backwards=is_backwards)}": value})
        same &= Q(**{key.name: value})
    # Says nothing new, but where in an index of the first key to begin.
    return Q(**{f"{keys[0].name}__{_comparison(keys[0], is_backwards=is_backwards)}e": values[0]}) & found


def _comparison(key: Key, *, is_backwards: bool) -> str:
    return "lt" if key.is_descending != is_backwards else "gt"


def _order(key: Key, *, is_backwards: bool) -> Any:
    return F(key.name).desc() if key.is_descending != is_backwards else F(key.name).asc()

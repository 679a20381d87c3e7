"""Lists in pages by key, never by offset: page 2,000 costs what page 1 costs, and no row is shown twice."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Generic, TypeVar

from django.db import models
from django.db.models import Q, QuerySet
from ninja import Schema
from pydantic import Field

from studio.api.errors import ApiError
from studio.api.schemas import QueryFields
from studio.keyset import Key, pack, read_cursor, unpack

MAX_LIMIT = 200

Item = TypeVar("Item")
Row = TypeVar("Row", bound=models.Model)


class PageQuery(QueryFields):
    """What every list takes. `after` is the `next` of the page before."""

    limit: int = Field(50, ge=1, le=MAX_LIMIT, description="Most items in one page.")
    after: str = Field("", max_length=400, description="`next` of the page before; empty for the first page.")


class Page(Schema, Generic[Item]):
    """A page of a list; `next` is null on the last one."""

    items: list[Item]
    next: str | None


def page_of(rows: QuerySet[Row], query: PageQuery, *, newest_by: str = "created_at") -> dict[str, Any]:
    """A page of rows, the newest first, in the form of `Page`; ties are broken by primary key.

    Raises:
        ApiError: `after` is not a cursor of this list.
    """
    rows = rows.order_by(f"-{newest_by}", "-pk")
    if query.after:
        moment, key = _read_cursor(rows, query.after)
        rows = rows.filter(Q(**{f"{newest_by}__lt": moment}) | Q(**{newest_by: moment, "pk__lt": key}))
    found = list(rows[: query.limit + 1])
    items = found[: query.limit]
    more = len(found) > query.limit
    return {"items": items, "next": _cursor(getattr(items[-1], newest_by), items[-1].pk) if more else None}


def _cursor(moment: datetime, key: Any) -> str:
    return pack([moment.isoformat(), str(key)])


def _read_cursor(rows: QuerySet[Row], cursor: str) -> tuple[datetime, Any]:
    try:
        moment, key = unpack(cursor)
        return datetime.fromisoformat(moment), rows.model._meta.pk.to_python(key)
    # ValueError covers broken base64, JSON and dates; Django says ValidationError for a key of the wrong type.
    except Exception as error:
        raise _no_cursor() from error


def require_cursor(cursor: str, keys: Sequence[Key]) -> None:
    """Raises ApiError for an `after` that is no cursor of a list in this order; an empty one is the first page's."""
    if cursor and read_cursor(cursor, keys) is None:
        raise _no_cursor()


def _no_cursor() -> ApiError:
    return ApiError(
        400,
        "invalid_cursor",
        '"after" is not a cursor of this list.',
        field="after",
        help='Send the "next" of the page before, unchanged.',
    )

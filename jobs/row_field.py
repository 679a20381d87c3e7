"""A form field that chooses among rows of the database."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from django import forms


class RowField(forms.Field):
    """A choice among rows that were read once, so that showing the list and validating cost one query."""

    def __init__(self, *, required: str = "", unknown: str, **kwargs: Any) -> None:
        messages = {"required": required, "invalid_choice": unknown}
        super().__init__(required=bool(required), error_messages=messages, **kwargs)
        self.rows: dict[str, Any] = {}
        self.left_out: dict[str, str] = {}

    def offer(self, rows: Iterable[Any], *, why_not: Callable[[Any], str] = lambda _row: "") -> None:
        """Set what can be chosen; `why_not` says of a row why it cannot."""
        self.left_out, self.rows = {}, {}
        for row in rows:
            if reason := why_not(row):
                self.left_out[str(row.pk)] = reason
            else:
                self.rows[str(row.pk)] = row

    def to_python(self, value: Any) -> Any:
        if value in self.empty_values:
            return None
        if str(value) in self.left_out:
            raise forms.ValidationError(self.left_out[str(value)], code="invalid_choice")
        if str(value) not in self.rows:
            raise forms.ValidationError(self.error_messages["invalid_choice"], code="invalid_choice")
        return self.rows[str(value)]

"""Figures of rows for display."""

from __future__ import annotations

from django import template

register = template.Library()


@register.filter
def percent(part: float, whole: float) -> str:
    """A share as people read it: 0 %, 0.4 %, 12 %."""
    share = 100 * part / whole if whole else 0.0
    return f"{share:.1f} %" if 0 < share < 10 else f"{share:.0f} %"

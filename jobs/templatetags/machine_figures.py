"""Figures of the page of machines."""

from __future__ import annotations

from datetime import datetime

from django import template
from django.utils import timezone

from studio.templatetags.components import duration

register = template.Library()

COLOURS = {
    "running": "badge-info", "idle": "badge-success", "draining": "badge-warning", "quarantined": "badge-error",
    "stopped": "", "gone": "badge-error",
}  # fmt: skip
# A heartbeat comes every few seconds; younger than this it is simply there.
FRESH_SECONDS = 20


@register.filter
def worker_colour(status: str) -> str:
    """The badge class of a worker's status; the word always stands in it."""
    return COLOURS[status]


@register.filter
def gib(num_bytes: int | None) -> str:
    """Bytes as GiB: two digits after the point below 10, one above; a dash for None."""
    if num_bytes is None:
        return "\N{EN DASH}"
    size = num_bytes / 1024**3
    return "0" if not num_bytes else f"{size:.2f}" if size < 10 else f"{size:.1f}"


@register.filter
def share_of(part: int | None, whole: int) -> str:
    """A part in percent of a whole, for the width of a bar."""
    return f"{100 * min((part or 0) / whole, 1):.2f}" if whole else "0"


@register.filter
def seen_ago(moment: datetime) -> str:
    """How long ago a heartbeat came; "just now" while it is as it should be."""
    seconds = (timezone.now() - moment).total_seconds()
    return "just now" if seconds < FRESH_SECONDS else f"{duration(seconds)} ago"

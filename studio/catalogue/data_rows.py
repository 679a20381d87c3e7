"""Rows of the datasets that an adapter was trained on, as links: which dataset, and which line of its file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any

from django.contrib.humanize.templatetags.humanize import intcomma
from django.urls import reverse

from studio.datasets.models import DatasetVersion
from workers.results import OverlapRecord


@dataclass(frozen=True)
class RowLink:
    """A row of a dataset version. `is_mixed` where others were trained on beside it, so that it is to be named."""

    version: DatasetVersion
    line: int
    is_mixed: bool

    @property
    def url(self) -> str:
        return reverse("datasets:row", args=[self.version.dataset_id, self.version.number, self.line])

    @property
    def label(self) -> str:
        """ "Line 7", or "faq v2, line 7"."""
        line = intcomma(self.line)
        return f"{self.version}, line {line}" if self.is_mixed else f"Line {line}"

    @property
    def short_label(self) -> str:
        """ "7", or "faq v2: 7"."""
        return f"{self.version}: {self.line}" if self.is_mixed else str(self.line)


@dataclass(frozen=True)
class SuspiciousRow:
    """A training row that may be wrong, with links to it and to those that it contradicts."""

    link: RowLink
    reason: str
    others: list[RowLink]
    loss: float
    base_loss: float | None
    score: float


def row_link(versions: Sequence[DatasetVersion], source: int, line: int) -> RowLink:
    """The link to a line of one of an adapter's datasets (`Adapter.versions_of_data`)."""
    return RowLink(versions[source], line, is_mixed=len(versions) > 1)


def suspicious_row(versions: Sequence[DatasetVersion], record: dict[str, Any]) -> SuspiciousRow:
    """A stored workers.results.SuspiciousRecord with its links."""
    lines = record.get("other_lines", ())
    sources = record.get("other_sources") or repeat(0, len(lines))
    return SuspiciousRow(
        link=row_link(versions, record.get("source", 0), record["line"]),
        reason=record["reason"],
        others=[row_link(versions, source, line) for source, line in zip(sources, lines, strict=True)],
        loss=record["loss"],
        base_loss=record.get("base_loss"),
        score=record["score"],
    )


def overlap_links(
    versions: Sequence[DatasetVersion], overlap: OverlapRecord, most: int
) -> list[tuple[RowLink, RowLink, float]]:
    """The first pairs of an overlap as links to the held-out row and to the training row."""
    sources = overlap.pair_sources or repeat((0, 0), len(overlap.pairs))
    return [
        (row_link(versions, one, held_out), row_link(versions, other, trained), share)
        for (held_out, trained, share), (one, other) in zip(overlap.pairs[:most], sources, strict=False)
    ]

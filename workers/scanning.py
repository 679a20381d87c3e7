"""Runs one scan over a dataset file in a process of its own: `python -m workers.scanning NAME FILE ...`.

As in an inspection there is a limit on memory, no database and no network. It writes one JSON object per line to
standard output and ends with "done" or "refused".
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

from workers.examples import AnyExample
from workers.limited import PROGRESS_SECONDS, add_file, emit, limited, refusals_emitted
from workers.reading import read_rows
from workers.scans import Finding, Note, Rows, get_scan
from workers.scans._texts import beginning

MAX_FINDINGS = 100_000
"""Findings that are kept with their lines; all are counted."""
ALIVE_SECONDS = 10.0


class _Reader:
    """Reads the rows again and again, and says how far it is."""

    def __init__(self, path: Path, format_name: str, columns: dict[str, str]) -> None:
        self._source = (path, format_name, columns)
        self._shown_at = time.monotonic()
        self.num_read = 0

    def rows(self) -> Iterator[AnyExample]:
        for example, _problems in read_rows(*self._source):
            if example is not None:
                self.num_read += 1
                if not self.num_read & 63:
                    self.show(PROGRESS_SECONDS)
                yield example

    def show(self, seconds: float) -> None:
        """Say how many rows were read in all passes, unless that was said less than so many seconds ago."""
        if time.monotonic() - self._shown_at > seconds:
            self._shown_at = time.monotonic()
            emit("progress", num_read=self.num_read)


def run_scan(name: str, path: Path, format_name: str, columns: dict[str, str]) -> None:
    """Emit the findings of a scan, the lines in ascending order, and then its counts by kind."""
    reader = _Reader(path, format_name, columns)
    rows = Rows(reader.rows, lambda: reader.show(ALIVE_SECONDS))
    kinds: Counter[str] = Counter()
    notes: list[str] = []
    counts: dict[str, int] = {}
    kept: list[Finding] = []
    lines: set[int] = set()
    for found in get_scan(name).find(rows):
        if isinstance(found, Note):
            notes.append(found.text)
            counts |= found.counts
            continue
        kinds[found.kind] += 1
        lines.add(found.line)
        if len(kept) < MAX_FINDINGS:
            kept.append(found)
    kept.sort(key=lambda finding: finding.line)
    for finding in _with_excerpts(kept, rows):
        emit("finding", finding=asdict(finding))
    emit("done", num_findings=kinds.total(), num_rows=len(lines), kinds=dict(kinds), notes=notes, counts=counts)


def _with_excerpts(findings: list[Finding], rows: Rows) -> Iterator[Finding]:
    """The findings in order; those without an excerpt get the beginning of their row, for which it is read again."""
    lacking = {finding.line for finding in findings if not finding.excerpt}
    excerpts: dict[int, str] = {}
    if lacking:
        last = max(lacking)
        for example in rows:
            if example.line in lacking:
                excerpts[example.line] = beginning(example)
            if example.line >= last:
                break
    for finding in findings:
        yield finding if finding.excerpt else replace(finding, excerpt=excerpts.get(finding.line, ""))


def main(arguments: list[str] | None = None) -> int:
    """0 after "done" or "refused"; anything else is a fault of ours, or a limit that struck."""
    parser = argparse.ArgumentParser(prog="python -m workers.scanning")
    parser.add_argument("scan", help="name of the scan plug-in")
    add_file(parser)
    chosen = limited(parser, arguments)
    with refusals_emitted():
        run_scan(chosen.scan, chosen.file, chosen.format, chosen.columns)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Tables for spreadsheets. Every one is written here, so that no cell of any is a formula."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence

from django.http import HttpRequest, StreamingHttpResponse
from django.utils.http import content_disposition_header

from studio.streaming import stream
from workers.csv_cells import guard_cell


class _Echo:
    """csv writes into it and gets the line back."""

    def write(self, line: str) -> str:
        return line


_writer = csv.writer(_Echo())


def csv_line(values: Iterable[object]) -> str:
    """A line of CSV; a list is a cell with spaces between."""
    line: str = _writer.writerow([guard_cell(value) for value in values])
    return line


def csv_response(
    request: HttpRequest, file_name: str, columns: Sequence[str], rows: Iterable[Sequence[object]]
) -> StreamingHttpResponse:
    """A file of comma-separated values to download, its rows read while they are sent."""

    def lines() -> Iterator[str]:
        yield csv_line(columns)
        for row in rows:
            yield csv_line(row)

    response = stream(request, lines(), content_type="text/csv; charset=utf-8")
    response["Content-Disposition"] = content_disposition_header(True, file_name) or "attachment"
    return response

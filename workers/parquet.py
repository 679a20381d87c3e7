"""Rows of a Parquet file, one at a time, with limits that its own footer cannot talk us out of."""

from __future__ import annotations

import math
from collections.abc import Iterator
from datetime import date, datetime, time
from decimal import Decimal
from pathlib import Path
from typing import Any

from workers.compression import refuse_expansion
from workers.errors import DatasetError
from workers.examples import Problem
from workers.limited import use_system_allocator
from workers.strict_json import MAX_ROW_BYTES, excerpt_of

MAX_ROWS = 1_000_000_000
MAX_COLUMNS = 1000
_BATCH_ROWS = 256
# What pyarrow reads, and what our own code may raise while it does, on a file that somebody made to break it.
_DAMAGED = (OSError, ValueError, NotImplementedError, KeyError)


def parquet_rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | Problem]]:
    """(number from 1, row or its Problem) of every row.

    Dates become ISO text, decimals text, NaN becomes null: what JSON would hold.

    Raises:
        DatasetError: damaged_file, unsupported_column_type (binary data and types that need code of others),
            expands_too_much (by the footer, or by what comes out), no_rows, too_many_columns.
    """
    use_system_allocator()
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path, memory_map=False, pre_buffer=False, buffer_size=1024**2)
        schema = file.schema_arrow
    except _DAMAGED as error:
        raise _damaged(error) from error
    with file:
        _check_schema(schema, pa)
        _check_footer(file.metadata, path)
        # Repeated texts stay one text until their row is read.
        is_text = (pa.types.is_string, pa.types.is_large_string)
        texts = [field.name for field in schema if any(kind(field.type) for kind in is_text)]
    try:
        file = pq.ParquetFile(
            path, memory_map=False, pre_buffer=False, buffer_size=1024**2, read_dictionary=texts
        )  # fmt: skip
    except _DAMAGED as error:
        raise _damaged(error) from error
    with file:
        yield from _rows(file, path.stat().st_size)


def _rows(file: Any, packed_bytes: int) -> Iterator[tuple[int, dict[str, Any] | Problem]]:
    number = num_bytes = 0
    batches = file.iter_batches(batch_size=_BATCH_ROWS, use_threads=False)
    while True:
        try:
            batch = next(batches, None)
        except _DAMAGED as error:
            raise _damaged(error) from error
        if batch is None:
            break
        names = batch.schema.names
        columns = batch.columns
        for index in range(batch.num_rows):
            number += 1
            try:
                row = {
                    name: _plain(column[index].as_py()) for name, column in zip(names, columns, strict=True)
                }  # fmt: skip
            except UnicodeDecodeError as error:
                yield number, _not_utf8(number, error)
                continue
            except _DAMAGED as error:
                raise _damaged(error) from error
            size = _size(row)
            num_bytes += size
            refuse_expansion(num_bytes, packed_bytes)
            yield number, _check_row(row, number, size)
    if number == 0:
        raise _refusal("no_rows", "The Parquet file has no rows.", "Check that the export finished.")


def _plain(value: Any) -> Any:
    """A value as JSON would hold it."""
    if isinstance(value, str) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _plain(child) for key, child in value.items()}
    if isinstance(value, list):
        return [_plain(child) for child in value]
    if isinstance(value, tuple):  # an entry of a map
        return [_plain(child) for child in value]
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, bool | int):
        return value
    if isinstance(value, Decimal):
        return str(value)
    return str(value)


def _size(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(_size(child) for child in value.values())
    if isinstance(value, list):
        return sum(_size(child) for child in value)
    return 8


def _check_row(row: dict[str, Any], number: int, size: int) -> dict[str, Any] | Problem:
    if size > MAX_ROW_BYTES:
        return Problem(
            "F009",
            f"Row {number} is longer than {MAX_ROW_BYTES // 1024**2} MB.",
            "Split texts that are longer than any context.",
            line=number,
        )
    for name, value in row.items():
        if (isinstance(value, str) and "\0" in value) or (isinstance(value, list | dict) and "\0" in str(value)):
            return Problem(
                "F005",
                f'Row {number}: "{excerpt_of(name)}" holds a NUL character, which databases and tokenizers refuse.',
                "Remove it from the text.",
                line=number,
                field=name[:120],
                excerpt=excerpt_of(value),
            )
    return row


def _check_schema(schema: Any, pa: Any) -> None:
    if len(schema) > MAX_COLUMNS:
        raise _refusal(
            "too_many_columns", f"The file has {len(schema):,} columns; {MAX_COLUMNS:,} are read at most.",
            "Keep the columns that hold the prompt and the answer.",
        )  # fmt: skip
    if len(set(schema.names)) < len(schema):
        raise _refusal("damaged_file", "Two columns have the same name.", "Give each column its own name.")
    for field in schema:
        what = _unsupported(field, pa, 0)
        if what:
            raise _refusal(
                "unsupported_column_type", f'The column "{excerpt_of(field.name)}" holds {what}.',
                "Leave the column out of the export, or write it as text.",
            )  # fmt: skip


def _unsupported(field: Any, pa: Any, depth: int) -> str:
    """What a column holds that no text can; empty when there is nothing."""
    kind = field.type
    extension = (field.metadata or {}).get(b"ARROW:extension:name") or getattr(kind, "extension_name", None)
    if extension:
        name = extension.decode("utf-8", "replace") if isinstance(extension, bytes) else str(extension)
        if name not in {"arrow.json", "arrow.bool8"}:
            return f'the type "{excerpt_of(name)}", which needs code of its own'
    if depth > 16:
        return "lists and objects nested too deeply"
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind):
        return "binary data"
    if pa.types.is_dictionary(kind):
        return _unsupported(pa.field(field.name, kind.value_type), pa, depth + 1)
    if pa.types.is_nested(kind):
        children = (kind.field(index) for index in range(kind.num_fields))
        return next((what for child in children if (what := _unsupported(child, pa, depth + 1))), "")
    return ""


def _check_footer(footer: Any, path: Path) -> None:
    unpacked = sum(footer.row_group(index).total_byte_size for index in range(footer.num_row_groups))
    refuse_expansion(unpacked, path.stat().st_size)
    if footer.num_rows > MAX_ROWS:
        raise _refusal(
            "expands_too_much", f"The file says that it has {footer.num_rows:,} rows; {MAX_ROWS:,} are read at most.",
            "Split it into several files.",
        )  # fmt: skip


def _not_utf8(number: int, error: UnicodeDecodeError) -> Problem:
    return Problem(
        "F001",
        f"Row {number} holds text that is not UTF-8: byte 0x{error.object[error.start]:02x}.",
        "Write the column as UTF-8.",
        line=number,
        excerpt=excerpt_of(bytes(error.object[max(0, error.start - 40) :])),
    )


def _damaged(error: Exception) -> DatasetError:
    first = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
    return _refusal("damaged_file", f"The Parquet file is damaged or cut off: {first}", "Export and upload it again.")


def _refusal(code: str, message: str, next_step: str) -> DatasetError:
    error = DatasetError(message, next_step=next_step)
    error.code = code
    return error

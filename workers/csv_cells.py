"""Cells of tables that spreadsheets open."""

from __future__ import annotations

_BEGINS_A_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\uff1d", "\uff0b", "\uff0d", "\uff20")


def guard_cell(value: object) -> object:
    """A value as a cell that no spreadsheet takes for a formula; numbers stay numbers, None is an empty cell.

    Text that begins like a formula, after whatever spaces, gets an apostrophe in front (OWASP, CSV injection). A list
    is a cell with spaces between.
    """
    if value is None or isinstance(value, int | float):
        return "" if value is None else value
    cell = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    # A tab or carriage return counts itself, so spaces and line feeds only are looked past.
    return f"'{cell}" if cell.lstrip(" \n\xa0").startswith(_BEGINS_A_FORMULA) else cell

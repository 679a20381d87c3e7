"""Cells of tables that spreadsheets open."""

from __future__ import annotations


def guard_cell(text: object) -> str:
    """A cell that no spreadsheet takes for a formula."""
    cell = "" if text is None else str(text)
    return f"'{cell}" if cell.lstrip(" ")[:1] in {"=", "+", "-", "@", "\t", "\r"} else cell

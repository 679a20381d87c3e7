"""The catalogue of rules that dataset rows are held to: a stable code and a title for people.

F: the file and its rows; C: conversations; S: the dataset as a whole.
"""

from __future__ import annotations

RULES: dict[str, str] = {
    "F001": "Not UTF-8",
    "F002": "Broken JSON",
    "F003": "Not an object",
    "F004": "The same key twice",
    "F005": "Characters that cannot be stored",
    "F006": "NaN or Infinity",
    "F007": "Nested too deeply",
    "F008": "Number too long",
    "F009": "Row too long",
    "F010": "Fields are missing",
    "F020": "Wrong number of cells",
    "F021": "Broken quotes",
    "F022": "Cell too long",
    "C101": "Unknown role",
    "C102": "Missing, empty or non-text content",
    "C103": "No reply to learn from",
    "C104": "Unusual order of turns",
    "C105": "System message is not first",
    "C106": "Unusable weight",
    "C107": "Tool calls",
}


def rule_title(code: str) -> str:
    """What a rule is about, for people; raises KeyError for a code that is not in the catalogue."""
    return RULES[code]

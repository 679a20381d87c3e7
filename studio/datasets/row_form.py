"""Which rows a page shows, by the query of its URL: search, filters, order, and as a table or as chats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

from django import forms

from studio.datasets.models import DatasetVersion
from workers.row_table import MAX_VALUE, ROLES
from workers.rules import RULES

MAX_NUMBER = 10**9
MAX_SEARCH = 200
SHAPES = (("table", "Table"), ("chat", "Chat"))
STATES = (("", "All rows"), ("usable", "Usable"), ("set_aside", "Set aside"))
SYSTEM = (("", "With and without"), ("with", "With one"), ("without", "Without one"))
ORDERS = (("line", "Line"), ("longest", "Longest first"), ("shortest", "Shortest first"))
_NUMBERS = ("min_turns", "max_turns", "min_characters", "max_characters")
_SPEAKERS = [(role, role.capitalize()) for role in ROLES]
_KEYS = ("q", "state", "rule", "role", "system", *_NUMBERS, "column", "value", "order", "show")


def _number(label: str) -> forms.IntegerField:
    sentence = f"Give a whole number from 0 to {MAX_NUMBER:,}."
    return forms.IntegerField(
        label=label, required=False, min_value=0, max_value=MAX_NUMBER,
        error_messages=dict.fromkeys(("invalid", "min_value", "max_value"), sentence),
    )  # fmt: skip


class RowsForm(forms.Form):
    """Search and filters; what is empty asks for nothing."""

    q = forms.CharField(label="Search", required=False, max_length=MAX_SEARCH, strip=False)
    state = forms.ChoiceField(label="Rows", required=False, choices=STATES)
    rule = forms.ChoiceField(label="Problem", required=False)
    role = forms.ChoiceField(label="Speaks in it", required=False, choices=[("", "Anybody"), *_SPEAKERS])
    system = forms.ChoiceField(label="System prompt", required=False, choices=SYSTEM)
    min_turns = _number("Turns, at least")
    max_turns = _number("Turns, at most")
    min_characters = _number("Characters, at least")
    max_characters = _number("Characters, at most")
    column = forms.ChoiceField(label="Column", required=False)
    value = forms.CharField(label="Value", required=False, max_length=MAX_VALUE, strip=False)
    order = forms.ChoiceField(label="Order", required=False, choices=ORDERS)
    show = forms.ChoiceField(label="Show as", required=False, choices=SHAPES)

    def __init__(self, query: Mapping[str, Any], *, version: DatasetVersion, columns: Sequence[str]) -> None:
        super().__init__({name: query[name] for name in self.base_fields if name in query})
        rules = [(rule, f"{rule} {RULES.get(rule, '')}".strip()) for rule in sorted(version.problem_counts)]
        self.fields["rule"].choices = [("", "Any or none"), *rules]  # type: ignore[attr-defined]
        self.fields["column"].choices = [("", "None"), *((name, name) for name in columns)]  # type: ignore[attr-defined]
        unknown = {"invalid_choice": "There is no such choice. Choose one of the list."}
        for name in ("state", "rule", "role", "system", "column", "order", "show"):
            self.fields[name].error_messages |= unknown

    @property
    def has_more(self) -> bool:
        """Whether a filter is set that stands behind "More filters"."""
        return any(self.data.get(name) for name in ("rule", "role", "system", *_NUMBERS, "column", "value"))

    @classmethod
    def nothing(cls) -> dict[str, Any]:
        """What is cleaned of an empty query."""
        return {name: None if name in _NUMBERS else "" for name in cls.base_fields}

    def clean(self) -> dict[str, Any]:
        found: dict[str, Any] = super().clean() or {}
        for least, most in (("min_turns", "max_turns"), ("min_characters", "max_characters")):
            low, high = found.get(least), found.get(most)
            if low is not None and high is not None and low > high:
                self.add_error(most, f"{high:,} is less than {low:,}: no row has both.")
        if found.get("value") and not found.get("column"):
            self.add_error("column", "Choose the column that has this value.")
        return found


@dataclass(frozen=True)
class Asked:
    """A valid query."""

    values: dict[str, Any]

    @property
    def filters(self) -> dict[str, Any]:
        """As workers.row_search.Filters takes them."""
        names = ("state", "rule", "role", "system", *_NUMBERS, "column", "value")
        return {"text": self.text, **{name: self.values[name] for name in names}}

    @property
    def text(self) -> str:
        return str(self.values["q"])

    @property
    def order(self) -> str:
        return self.values["order"] or ORDERS[0][0]

    @property
    def show(self) -> str:
        return self.values["show"] or SHAPES[0][0]

    def query(self, **changed: Any) -> str:
        """The URL's query, with some values changed; what asks for nothing, or for what is so anyway, is left out."""
        values = {name: self.values.get(name) for name in _KEYS} | changed
        usual = {"order": ORDERS[0][0], "show": SHAPES[0][0]}
        said = {name: value for name, value in values.items() if value not in (None, "", usual.get(name))}
        return urlencode(said)

    def narrowing(self) -> list[dict[str, str]]:
        """The filters that are set, for people: {label, query without it}."""
        found: list[dict[str, str]] = []
        for name, label in self._labels().items():
            if self.values.get(name) not in (None, ""):
                without: dict[str, Any] = {name: ""}
                if name == "column":
                    without["value"] = ""
                found.append({"label": label, "query": self.query(**without)})
        return found

    def _labels(self) -> dict[str, str]:
        values = self.values
        return {
            "q": f"“{self.text}”",
            "state": dict(STATES).get(values["state"], ""),
            "rule": f"{values['rule']} {RULES.get(values['rule'], '')}".strip(),
            "role": f"{values['role'].capitalize()} speaks",
            "system": "With a system prompt" if values["system"] == "with" else "Without a system prompt",
            "min_turns": f"At least {values['min_turns']} turns",
            "max_turns": f"At most {values['max_turns']} turns",
            "min_characters": f"At least {values['min_characters'] or 0:,} characters",
            "max_characters": f"At most {values['max_characters'] or 0:,} characters",
            "column": f"{values['column']} = {values['value'] or 'nothing'}",
        }

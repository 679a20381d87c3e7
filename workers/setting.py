"""What a person may set, read from the settings models: label, help, unit, bounds, default and source in one place.

The form, the API's schema and the command line (`python -m workers describe`) all show what stands in the models.
"""

from __future__ import annotations

import csv
import math
import re
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

from pydantic import BaseModel

Kind = Literal["number", "integer", "boolean", "choice", "many", "text"]

_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_MAX_CHARACTERS = 4000
_MAX_LONG_CHARACTERS = 20_000


@dataclass(frozen=True)
class Setting:
    """One field of a settings model as a form needs it. `name` is its recipe field, dotted."""

    name: str
    label: str
    help: str
    unit: str
    source: str
    kind: Kind
    default: Any
    takes_auto: bool = False
    takes_nothing: bool = False
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    excludes_minimum: bool = False
    excludes_maximum: bool = False
    words: tuple[str, ...] = ()
    separator: str = ""
    """What alone separates several values, where they may have spaces in them."""
    is_long: bool = False
    """Whether a text may have several lines."""
    value_type: str = field(default="", repr=False)

    def range_sentence(self) -> str:
        """The allowed range for people: "above 0, at most 1"; empty without bounds."""
        parts = []
        if self.minimum is not None:
            parts.append(f"{'above' if self.excludes_minimum else 'at least'} {format_number(self.minimum)}")
        if self.maximum is not None:
            parts.append(f"{'below' if self.excludes_maximum else 'at most'} {format_number(self.maximum)}")
        return ", ".join(parts)

    def default_text(self) -> str:
        """The default as it stands in the input."""
        return to_text(self.default)

    def options(self) -> list[tuple[str, str]]:
        """What a select offers, for the kinds that are chosen from a list."""
        found = [("auto", "auto")] if self.takes_auto else []
        if self.kind == "boolean":
            return [*found, ("true", "on"), ("false", "off")]
        return [*found, *((choice, choice.replace("_", " ")) for choice in self.choices)]

    def parse(self, text: str) -> Any:
        """The value that a person wrote.

        Raises:
            ValueError: with a sentence that says what was found and what is expected.
        """
        text = text.strip()
        most = _MAX_LONG_CHARACTERS if self.is_long else _MAX_CHARACTERS
        if len(text) > most:
            raise ValueError(f"{self.label} has {len(text):,} characters. Write {most:,} at most.")
        if self.takes_auto and text.lower() in {"auto", ""} and not (text == "" and self.takes_nothing):
            return "auto"
        if text == "" and self.takes_nothing:
            return None
        if self.kind in {"number", "integer"}:
            return self._parse_number(text)
        if self.kind == "boolean":
            if text not in {"true", "false"}:
                raise ValueError(f"{self.label} is on or off; {quoted(text)} is neither.")
            return text == "true"
        if self.kind == "choice":
            if text not in self.choices:
                raise ValueError(f"{self.label}: there is no choice {quoted(text)}. Use {' or '.join(self.choices)}.")
            return int(text) if self.value_type == "integer" else text
        if self.kind == "many":
            if text in self.words:
                return text
            if self.separator:
                # As in a CSV file: a part that holds the separator stands in quotes.
                parts = next(csv.reader([text.replace("\n", " ")], delimiter=self.separator, skipinitialspace=True), [])
                return tuple(part.strip() for part in parts if part.strip())
            return tuple(part for part in re.split(r"[,\s]+", text) if part)
        return text

    def _parse_number(self, text: str) -> int | float:
        expected = self._expected()
        if text == "":
            raise ValueError(f"{self.label} is empty. Write {expected}.")
        if not _NUMBER.fullmatch(text):
            hint = (
                f" Decimals are written with a point: {text.replace(',', '.')}."
                if re.fullmatch(r"\d+,\d+", text, re.ASCII)
                else ""
            )
            raise ValueError(f"{quoted(text)} is not a number in plain digits. Write {expected}.{hint}")
        value = float(text)
        if self._is_outside(value):
            raise ValueError(
                f"{self.label} must be {self.range_sentence() or 'a finite number'}; found {_shown(text)}."
            )
        if self.kind == "number":
            return value
        if value != int(value):
            raise ValueError(f"{self.label} must be a whole number; found {_shown(text)}.")
        return int(text) if re.fullmatch(r"[+-]?\d+", text, re.ASCII) else int(value)

    def _expected(self) -> str:
        noun = "a whole number" if self.kind == "integer" else "a number"
        bounds = self.range_sentence()
        auto = ', or "auto"' if self.takes_auto else ""
        return f"{noun} {bounds}{auto}" if bounds else f"{noun}{auto}"

    def _is_outside(self, value: float) -> bool:
        if not math.isfinite(value):
            return True
        if self.minimum is not None and (value < self.minimum or (self.excludes_minimum and value == self.minimum)):
            return True
        return self.maximum is not None and (value > self.maximum or (self.excludes_maximum and value == self.maximum))


@cache
def settings_of(model: type[BaseModel], prefix: str) -> tuple[Setting, ...]:
    """Every field of a flat settings model, in its own order, named `prefix.field`.

    Raises:
        TypeError: a field's schema is of a kind that no form field stands for.
    """
    schema = model.model_json_schema()
    definitions = schema.get("$defs", {})
    return tuple(
        _setting(f"{prefix}.{name}", one, definitions, model.model_fields[name].get_default(call_default_factory=True))
        for name, one in schema.get("properties", {}).items()
    )


def _setting(name: str, schema: dict[str, Any], definitions: dict[str, Any], default: Any) -> Setting:
    branches = [_resolve(one, definitions) for one in schema.get("anyOf", [schema])]
    takes_auto = any(one.get("const") == "auto" for one in branches)
    takes_nothing = any(one.get("type") == "null" for one in branches)
    values = [one for one in branches if one.get("const") != "auto" and one.get("type") != "null"]
    if not values:
        raise TypeError(f"{name} accepts nothing that a form could ask for")
    lists = [one for one in values if one.get("type") == "array"]
    # "all-linear" or a list of names: the words stand beside what the list may hold.
    words = tuple(one["const"] for one in values if "const" in one) if lists else ()
    value, values = (lists[0], lists) if lists else (values[0], values)
    choices = [choice for one in values for choice in one.get("enum", [one["const"]] if "const" in one else [])]
    if "auto" in choices:
        takes_auto = True
        choices.remove("auto")
    # A method may name the usual values of an open field for the form to offer.
    many = value.get("type") == "array"
    if many:
        item = _resolve(value.get("items", {}), definitions)
        choices = list(item.get("enum", schema.get("choices", ())))
    minimum, excludes_minimum = _bound(value, schema, "minimum", "exclusiveMinimum")
    maximum, excludes_maximum = _bound(value, schema, "maximum", "exclusiveMaximum")
    return Setting(
        name=name,
        label=schema.get("title", name),
        help=schema.get("description", ""),
        unit=schema.get("unit", ""),
        source=schema.get("source", ""),
        kind=_kind(name, value, choices=choices, many=many),
        default=default,
        takes_auto=takes_auto,
        takes_nothing=takes_nothing,
        choices=tuple(str(choice) for choice in choices),
        words=words,
        separator=schema.get("separator", ""),
        is_long=bool(schema.get("is_long", False)),
        minimum=minimum,
        maximum=maximum,
        excludes_minimum=excludes_minimum,
        excludes_maximum=excludes_maximum,
        value_type="integer"
        if choices and all(isinstance(one, int) for one in choices)
        else str(value.get("type", "")),
    )


def _kind(name: str, value: dict[str, Any], *, choices: list[Any], many: bool) -> Kind:
    if many:
        return "many"
    if choices:
        return "choice"
    kinds: dict[str, Kind] = {"number": "number", "integer": "integer", "boolean": "boolean", "string": "text"}
    if value.get("type") not in kinds:
        raise TypeError(f"{name} has a schema that no form field stands for: {value}")
    return kinds[value["type"]]


def _resolve(schema: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    reference = schema.get("$ref")
    return definitions[reference.rsplit("/", 1)[-1]] if reference else schema


def _bound(value: dict[str, Any], whole: dict[str, Any], inclusive: str, exclusive: str) -> tuple[float | None, bool]:
    for schema in (value, whole):
        if exclusive in schema:
            return schema[exclusive], True
        if inclusive in schema:
            return schema[inclusive], False
    return None, False


def format_number(value: float) -> str:
    """A number for people: 1,024 and 0.0002 rather than 1024.0 and 2e-04."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        value = int(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if value == 0 or abs(value) >= 1e-4 else f"{value:.3g}"


def to_text(value: Any) -> str:
    """A setting's value as the text of its input; `Setting.parse` gives it back."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        return ", ".join(_part(str(one)) for one in value)
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)
    return str(value)


def _part(text: str) -> str:
    """One of several values, in quotes where it could be read as several."""
    return '"' + text.replace('"', '""') + '"' if "," in text or '"' in text else text


def quoted(text: str) -> str:
    return f'"{text[:40]}..."' if len(text) > 40 else f'"{text}"'


def _shown(text: str) -> str:
    return text if len(text) <= 20 else f"{text[:20]}..."

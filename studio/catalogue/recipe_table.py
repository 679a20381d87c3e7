"""A recipe as rows for people: label, value, unit, and whether it was changed from its default."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from workers.errors import UnknownPluginError
from workers.methods import get_method
from workers.recipe import EvaluationSettings, Recipe, SplitSettings, TrainingSettings


@dataclass(frozen=True)
class RecipeRow:
    """One setting. `is_changed` is None where there is no default to compare with."""

    label: str
    value: str
    unit: str = ""
    help: str = ""
    is_changed: bool = False
    was_auto: bool = False


@dataclass(frozen=True)
class RecipeSection:
    """One group of settings; `chosen` are those that somebody, a person or the studio, decided for this run."""

    title: str
    rows: list[RecipeRow]

    @property
    def chosen(self) -> list[RecipeRow]:
        return [row for row in self.rows if row.is_changed or row.was_auto]


def recipe_sections(recipe: dict[str, Any], asked: dict[str, Any] | None = None) -> list[RecipeSection]:
    """A stored recipe in sections, with the names that the form used.

    `asked` is the recipe before "auto" was resolved: a value that a person left to the studio is no change.
    """
    asked = asked or recipe
    sections = [
        RecipeSection("Method", list(_method_rows(recipe, asked))),
        RecipeSection("Training", list(_rows(TrainingSettings, recipe.get("training", {}), asked.get("training", {})))),
        RecipeSection("Held-out rows", list(_rows(SplitSettings, recipe.get("split", {}), asked.get("split", {})))),
        RecipeSection(
            "Evaluation", list(_rows(EvaluationSettings, recipe.get("evaluation", {}), asked.get("evaluation", {})))
        ),
    ]
    return [section for section in sections if section.rows]


def _method_rows(recipe: dict[str, Any], asked: dict[str, Any]) -> Iterator[RecipeRow]:
    values, asked_values = recipe.get("settings", {}), asked.get("settings", {})
    fields = Recipe.model_fields
    try:
        method = get_method(str(recipe.get("method", "")))
    except UnknownPluginError:
        # The plug-in was removed since; what was asked stays readable.
        yield RecipeRow("Method", str(recipe.get("method", "")))
        yield from (RecipeRow(name, _text(value)) for name, value in values.items())
        return
    yield RecipeRow("Method", method.label)
    yield _row("precision", fields["precision"], recipe.get("precision"), asked.get("precision"))
    yield from _rows(method.Settings, values, asked_values)


def _rows(model: type[BaseModel], values: dict[str, Any], asked: dict[str, Any]) -> Iterator[RecipeRow]:
    for name, field in model.model_fields.items():
        if name in values:
            yield _row(name, field, values[name], asked.get(name, _default(field)))


def _row(name: str, field: FieldInfo, value: Any, asked: Any) -> RecipeRow:
    extra = field.json_schema_extra
    unit = str(extra.get("unit", "")) if isinstance(extra, dict) else ""
    default = _default(field)
    return RecipeRow(
        label=field.title or name.replace("_", " ").capitalize(),
        value=_text(value),
        unit=unit if value not in (None, "auto") else "",
        help=field.description or "",
        is_changed=default is not PydanticUndefined and _plain(asked) != _plain(default) and asked != "auto",
        was_auto=asked == "auto" and value != "auto",
    )


def _default(field: FieldInfo) -> Any:
    return field.get_default(call_default_factory=True)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _text(value: Any) -> str:
    if value is None:
        return "\N{EN DASH}"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return ", ".join(_text(one) for one in value)
    return str(value)

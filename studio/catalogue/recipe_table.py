"""A recipe as rows for people: label, value, unit, and whether it was changed from its default."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from workers.errors import RecipeError, UnknownPluginError
from workers.evaluations import evaluations, get_evaluation
from workers.methods import get_method
from workers.recipe import EvaluationSettings, MetricChoice, Recipe, SplitSettings, TrainingSettings


@dataclass(frozen=True)
class RecipeRow:
    """One setting. `is_changed` is None where there is no default to compare with."""

    label: str
    value: str
    unit: str = ""
    help: str = ""
    is_changed: bool = False
    was_auto: bool = False
    is_told: bool = False
    """Whether it belongs to what is shown of a recipe in short, though nothing has changed it."""


@dataclass(frozen=True)
class RecipeSection:
    """One group of settings; `chosen` are those that somebody, a person or the studio, decided for this run."""

    title: str
    rows: list[RecipeRow]

    @property
    def chosen(self) -> list[RecipeRow]:
        return [row for row in self.rows if row.is_changed or row.was_auto or row.is_told]


def recipe_sections(recipe: dict[str, Any], asked: dict[str, Any] | None = None) -> list[RecipeSection]:
    """A stored recipe in sections, with the names that the form used.

    `asked` is the recipe before "auto" was resolved: a value that a person left to the studio is no change.
    """
    asked = asked or recipe
    sections = [
        RecipeSection("Method", list(_method_rows(recipe, asked))),
        RecipeSection("Mixture", list(_mixture_rows(recipe))),
        RecipeSection("Training", list(_rows(TrainingSettings, recipe.get("training", {}), asked.get("training", {})))),
        RecipeSection("Held-out rows", list(_split_rows(recipe, asked))),
        RecipeSection(
            "Evaluation", list(_rows(EvaluationSettings, recipe.get("evaluation", {}), asked.get("evaluation", {})))
        ),
    ]
    return [section for section in sections if section.rows]


def _mixture_rows(recipe: dict[str, Any]) -> Iterator[RecipeRow]:
    """The datasets of a recipe of several, with their weights and how rows of each are held out."""
    mix = recipe.get("mix", ())
    if not mix:
        return
    main = recipe.get("dataset", {})
    value = f"{main.get('name', '')}, weight 1, {_held_out(main)}"
    yield RecipeRow("Dataset 1", value, help="An epoch is one pass over it.", is_told=True)
    for number, one in enumerate(mix, start=2):
        value = f"{one.get('name', '')}, weight {_text(one.get('weight', 1.0))}, {_held_out(one)}"
        yield RecipeRow(f"Dataset {number}", value, help="Rows for each row of dataset 1.", is_told=True)
        # That of dataset 1 is among the held-out rows.
        if frozen := one.get("split"):
            yield RecipeRow(f"Dataset {number} split's sha256", frozen["sha256"])


def _held_out(source: dict[str, Any]) -> str:
    """How rows of one of several datasets are held out."""
    frozen = source.get("split")
    return f"split “{_split_name(frozen)}”" if frozen else "held-out share"


def _split_name(frozen: dict[str, Any]) -> str:
    return str(frozen["name"] or frozen["sha256"][:12])


def _split_rows(recipe: dict[str, Any], asked: dict[str, Any]) -> Iterator[RecipeRow]:
    """The frozen split of the main dataset, and how rows are held out of every dataset that has none."""
    splits = [one.get("split") for one in (recipe.get("dataset", {}), *recipe.get("mix", ()))]
    if frozen := splits[0]:
        yield RecipeRow("Split", _split_name(frozen), is_changed=True)
        yield RecipeRow("Split's sha256", frozen["sha256"])
        for part in ("train", "validation", "test"):
            yield RecipeRow(f"Rows of {part}", f"{frozen[f'num_{part}']:,}", "rows")
    if not all(splits):
        yield from _rows(SplitSettings, recipe.get("split", {}), asked.get("split", {}))


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
        if name in values and model is EvaluationSettings and name == "metrics":
            yield from _metric_rows(field, values[name], asked.get(name, _default(field)))
        elif name in values:
            yield _row(name, field, values[name], asked.get(name, _default(field)))


def _metric_rows(field: FieldInfo, metrics: Sequence[Any], asked: Any) -> Iterator[RecipeRow]:
    """The metrics by their labels, then the settings of each that has some of its own."""
    row = _row("metrics", field, [_metric_label(one) for one in metrics], asked)
    yield replace(row, value="; ".join(_metric_label(one) for one in metrics) or _text(None))
    num_of: Counter[str] = Counter()
    for one in metrics:
        if isinstance(one, str):
            continue
        name = str(one["name"])
        num_of[name] += 1
        plugin = evaluations().get(name)
        label = f"{plugin.label if plugin else name}{f' {num_of[name]}' if num_of[name] > 1 else ''}"
        fields = plugin.Settings.model_fields if plugin and plugin.Settings else {}
        for key, value in one.get("settings", {}).items():
            known = fields.get(key)
            title = (known.title if known else None) or key
            # Only settings that are not the defaults stand in a recipe.
            yield RecipeRow(
                f"{label}: {title}", _text(value), help=(known.description if known else None) or "", is_changed=True
            )


def _metric_label(metric: Any) -> str:
    """What people call a metric of a stored recipe; its name where it is not installed or cannot be used any more."""
    name = metric if isinstance(metric, str) else str(metric["name"])
    settings = {} if isinstance(metric, str) else metric.get("settings", {})
    try:
        return get_evaluation(MetricChoice(name=name, settings=settings)).label
    except RecipeError:
        return name


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

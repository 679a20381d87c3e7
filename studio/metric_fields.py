"""Metrics as form fields: a check box for each, with the settings of those that have some, several times over.

Under a field name such as "evaluation.metrics" the boxes have the values "loss", "regex", "regex.2", and the settings
stand in fields named "evaluation.metrics.regex.pattern", "evaluation.metrics.regex.2.pattern".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from django import forms
from django.http import QueryDict

from studio.setting_fields import SettingManyField, SettingRow, form_name, make_field, setting_row
from workers.evaluations import Evaluation, evaluations
from workers.recipe import EvaluationSettings, MetricChoice
from workers.setting import Setting, settings_of

NUM_OFFERED = 3
"""Choices of one metric that a new form has room for, each with settings of its own."""
MAX_OFFERED = 50


@dataclass(frozen=True)
class MetricPlace:
    """Room for one choice of an evaluation: its only one, or the nth with settings of its own."""

    evaluation: Evaluation
    number: int = 1

    @property
    def value(self) -> str:
        """What the check box sends."""
        return self.evaluation.name if self.number == 1 else f"{self.evaluation.name}.{self.number}"

    def settings(self, field_name: str) -> tuple[Setting, ...]:
        """The settings of this choice, named as their form fields; none for most evaluations."""
        return settings_of(self.evaluation.Settings, f"{field_name}.{self.value}") if self.evaluation.Settings else ()


@dataclass(frozen=True)
class MetricBox:
    """A choice as the template shows it: a check box, and settings that show while it is checked."""

    value: str
    label: str
    help: str
    html_id: str
    is_chosen: bool
    rows: list[SettingRow]


@dataclass(frozen=True)
class MetricBoxes:
    """All choices: evaluations without settings, and for each other one the places of its choices."""

    html_name: str
    html_id: str
    label: str
    help: str
    errors: list[str]
    is_changed: bool
    plain: list[MetricBox]
    with_settings: list[list[MetricBox]]

    @property
    def num_changed(self) -> int:
        """One for another choice than the default."""
        return int(self.is_changed)

    @property
    def has_errors(self) -> bool:
        return bool(self.errors) or any(row.errors for boxes in self.with_settings for box in boxes for row in box.rows)


def metrics_setting(field_name: str) -> Setting:
    """What a recipe says of its metrics, under the name of a form's field."""
    found = next(one for one in settings_of(EvaluationSettings, "evaluation") if one.name == "evaluation.metrics")
    return replace(found, name=field_name, choices=tuple(evaluations()))


class MetricsField(SettingManyField):
    """The chosen places, in the order of the form."""

    def __init__(self, setting: Setting, places: Sequence[MetricPlace]) -> None:
        super().__init__(setting)
        self.places = {place.value: place for place in places}
        self.widget = forms.CheckboxSelectMultiple(choices=[(one.value, one.evaluation.label) for one in places])

    def to_python(self, value: Any) -> Any:
        names = tuple(one for one in value or () if one not in self.places)
        super().to_python(names)  # says of the first unknown one what there is
        return tuple(one for one in self.places if one in set(value or ()))


def offer_metrics(form: forms.Form, field_name: str, chosen: Iterable[str] = ()) -> None:
    """Give a form the fields of every evaluation: as many places of each as are `chosen`, and one more."""
    if form.is_bound:
        chosen = form.data.getlist(field_name) if isinstance(form.data, QueryDict) else form.data.get(field_name, ())
    most: Counter[str] = Counter()
    for value in chosen:
        name, _, number = value.partition(".")
        if number.isdecimal() and number.isascii() and len(number) < 4:
            most[name] = max(most[name], min(int(number), MAX_OFFERED - 1))
    places = [
        MetricPlace(evaluation, number + 1)
        for evaluation in evaluations().values()
        for number in range(max(NUM_OFFERED, most[evaluation.name] + 1) if evaluation.Settings else 1)
    ]
    fields: dict[str, forms.Field] = form.fields
    fields[field_name] = MetricsField(metrics_setting(field_name), places)
    for place in places:
        for setting in place.settings(field_name):
            fields[setting.name] = make_field(setting)
            # The id that the template gives it, for what links to it.
            fields[setting.name].widget.attrs["id"] = f"id_{form_name(setting.name)}"


def chosen_metrics(form: forms.Form, field_name: str) -> list[str | dict[str, Any]]:
    """The metrics that a form chooses as a recipe names them: with those settings that are not the defaults."""
    return [_as_asked(place, form.cleaned_data, field_name) for place in _chosen(form, field_name)]


def _as_asked(place: MetricPlace, values: Mapping[str, Any], field_name: str) -> str | dict[str, Any]:
    changed = {
        setting.name.rsplit(".", 1)[1]: values[setting.name]
        for setting in place.settings(field_name)
        if values[setting.name] != setting.default
    }
    return {"name": place.evaluation.name, "settings": changed} if changed else place.evaluation.name


def metric_values(metrics: Iterable[str | MetricChoice], field_name: str) -> dict[str, Any]:
    """A recipe's metrics and their settings by form field, as initial values."""
    values: list[str] = []
    found: dict[str, Any] = {}
    num_of: Counter[str] = Counter()
    for one in metrics:
        name, settings = (one, {}) if isinstance(one, str) else (one.name, one.settings)
        num_of[name] += 1
        value = name if num_of[name] == 1 else f"{name}.{num_of[name]}"
        if num_of[name] > 1 and not (name in evaluations() and evaluations()[name].Settings):
            continue  # the same without settings, once more
        values.append(value)
        found |= {f"{field_name}.{value}.{key}": setting for key, setting in settings.items()}
    return found | {field_name: tuple(values)}


def metric_field(form: forms.Form, field_name: str, rest: str) -> str:
    """The form field of "2.settings.pattern", which is the second chosen metric's: its setting's, else the choice's."""
    at, _, setting = rest.partition(".settings")
    places = _chosen(form, field_name)
    if not (at.isdecimal() and int(at) < len(places)):
        return field_name
    own = [one.name for one in places[int(at)].settings(field_name)]
    wanted = f"{field_name}.{places[int(at)].value}{setting}"
    return wanted if wanted in own else own[0] if own else field_name


def _chosen(form: forms.Form, field_name: str) -> list[MetricPlace]:
    places = form.fields[field_name].places  # type: ignore[attr-defined]
    return [places[value] for value in form.cleaned_data.get(field_name) or ()]


def metric_boxes(form: forms.Form, field_name: str) -> MetricBoxes:
    """The choices as the page shows them."""
    field: MetricsField = form.fields[field_name]  # type: ignore[assignment]
    row = setting_row(form, field.setting)
    boxes = {
        place: MetricBox(
            value=place.value,
            label=place.evaluation.label,
            help=place.evaluation.help,
            html_id=f"{row.html_id}-{form_name(place.value)}",
            is_chosen=place.value in row.chosen,
            rows=[setting_row(form, setting) for setting in place.settings(field_name)],
        )
        for place in field.places.values()
    }
    names = dict.fromkeys(place.evaluation.name for place in boxes if place.evaluation.Settings)
    return MetricBoxes(
        html_name=row.html_name,
        html_id=row.html_id,
        label=field.setting.label,
        help=field.setting.help,
        errors=row.errors,
        is_changed=row.is_changed,
        plain=[box for place, box in boxes.items() if place.evaluation.Settings is None],
        with_settings=[[box for place, box in boxes.items() if place.evaluation.name == name] for name in names],
    )

"""Form fields that parse what a person wrote by a Setting."""

from __future__ import annotations

import json
from typing import Any

from django import forms

from workers.recipe import MetricChoice
from workers.setting import Setting, quoted


class SettingField(forms.Field):
    """A form field that parses text by a Setting; an absent field means its default."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(required=False, label=setting.label, help_text=setting.help, initial=setting.default_text())
        self.setting = setting

    def to_python(self, value: Any) -> Any:
        if value is None:
            return self.setting.default
        try:
            return self.setting.parse(str(value))
        except ValueError as error:
            raise forms.ValidationError(str(error)) from error

    def has_changed(self, initial: Any, data: Any) -> bool:
        """Whether the parsed value differs from the default; text that cannot be parsed differs."""
        if data is None:
            return False
        try:
            return bool(self.setting.parse(str(data)) != self.setting.default)
        except ValueError:
            return True


class SettingManyField(SettingField):
    """A setting that takes several of a closed list, as check boxes."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.widget = forms.CheckboxSelectMultiple(choices=setting.options())

    def to_python(self, value: Any) -> Any:
        chosen = tuple(value or ())
        unknown = [one for one in chosen if one not in self.setting.choices]
        if unknown:
            raise forms.ValidationError(
                f"{self.setting.label}: there is no {quoted(unknown[0])}. Use {', '.join(self.setting.choices)}."
            )
        return tuple(one for one in self.setting.choices if one in chosen)

    def has_changed(self, initial: Any, data: Any) -> bool:
        return set(data or ()) != set(self.setting.default)


class MetricsField(SettingManyField):
    """Metrics by name; besides, those of an earlier job's recipe that have no fields of their own, as JSON."""

    def to_python(self, value: Any) -> Any:
        texts = [one for one in value or () if not one.startswith("{")]
        return (*super().to_python(texts), *(self._read(one) for one in value or () if one.startswith("{")))

    def _read(self, text: str) -> dict[str, Any]:
        try:
            return MetricChoice.model_validate_json(text).model_dump(mode="json")
        except ValueError as error:
            raise forms.ValidationError(f"{self.setting.label}: {quoted(text)} is no metric with settings.") from error


def metric_text(choice: MetricChoice) -> str:
    """A metric with its settings as the value of a check box."""
    return json.dumps(choice.model_dump(mode="json"), sort_keys=True)


def make_field(setting: Setting) -> SettingField:
    """The form field for a setting."""
    if setting.kind == "many" and setting.choices:
        return SettingManyField(setting)
    return SettingField(setting)


def form_name(name: str) -> str:
    """An HTML id for a dotted field name."""
    return name.replace(".", "-")

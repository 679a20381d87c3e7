"""Form fields that parse what a person wrote by a Setting, and how a page shows them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from django import forms
from django.http import QueryDict

from workers.setting import Setting, quoted, to_text


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


def make_field(setting: Setting) -> SettingField:
    """The form field for a setting."""
    if setting.kind == "many" and setting.choices:
        return SettingManyField(setting)
    return SettingField(setting)


def form_name(name: str) -> str:
    """An HTML id for a dotted field name."""
    return name.replace(".", "-")


@dataclass(frozen=True)
class SettingRow:
    """One setting as the template shows it."""

    setting: Setting
    html_name: str
    html_id: str
    text: str
    chosen: tuple[str, ...]
    errors: list[str]
    is_changed: bool
    resolved: str = ""


def setting_row(form: forms.Form, setting: Setting, resolved: Mapping[str, Any] | None = None) -> SettingRow:
    """A setting's field as it stands; `resolved` has, by field name, what an "auto" comes to."""
    value: Any
    data = form.data
    if form.is_bound and setting.kind == "many" and setting.choices and isinstance(data, QueryDict):
        # Boxes that are all empty send nothing, so only a form that shows them can say "none".
        value = data.getlist(setting.name)
    elif form.is_bound:
        value = data.get(setting.name, setting.default_text())
    else:
        value = form.initial.get(setting.name, setting.default)
    text, chosen = to_text(value), tuple(value) if isinstance(value, (list, tuple)) else None
    return SettingRow(
        setting=setting,
        html_name=setting.name,
        html_id=f"id_{form_name(setting.name)}",
        text=text,
        chosen=chosen if chosen is not None else (text,),
        errors=[str(one) for one in form.errors.get(setting.name, [])] if form.is_bound else [],
        is_changed=bool(form.fields[setting.name].has_changed(None, list(chosen) if chosen is not None else text)),
        resolved=_resolved_text(setting, text, (resolved or {}).get(setting.name)),
    )


def _resolved_text(setting: Setting, text: str, goes_to: Any) -> str:
    """What an auto comes to, in the words of its input; empty for what the person chose."""
    if not setting.takes_auto or text not in {"auto", ""} or goes_to is None:
        return ""
    return dict(setting.options()).get(to_text(goes_to), to_text(goes_to))

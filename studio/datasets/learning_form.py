"""Which row is shown, for which base model and with which of a recipe's settings."""

from __future__ import annotations

from typing import Any

from django import forms

from workers.recipe import TrainingSettings

_FIELDS = TrainingSettings.model_json_schema()["properties"]
MIN_LENGTH, MAX_LENGTH = _FIELDS["max_length"]["minimum"], _FIELDS["max_length"]["maximum"]
DEFAULT_LENGTH: int = _FIELDS["max_length"]["default"]
LOSS_ON: tuple[str, ...] = tuple(_FIELDS["loss_on"]["enum"])
DEFAULT_LOSS_ON: str = _FIELDS["loss_on"]["default"]
OFFERED_LENGTHS = (256, 512, 1024, 2048, 4096)
LARGEST_LINE = 10**12
_LOSS_LABELS = {"assistant": "the assistant's turns", "all": "every token"}


def _whole(least: int, most: int) -> dict[str, str]:
    sentence = f"Give a whole number from {least:,} to {most:,}."
    return dict.fromkeys(("invalid", "min_value", "max_value"), sentence)


class LearningForm(forms.Form):
    """The choices above a row; a field that is not in the query has the recipe's own default."""

    base = forms.TypedChoiceField(
        label="Base model", coerce=int, error_messages={"invalid_choice": "There is no such base model. Choose one."}
    )
    length = forms.IntegerField(
        label="Maximum length", min_value=MIN_LENGTH, max_value=MAX_LENGTH,
        widget=forms.NumberInput(attrs={"list": "offered-lengths"}), error_messages=_whole(MIN_LENGTH, MAX_LENGTH),
    )  # fmt: skip
    loss_on = forms.ChoiceField(label="Loss on", choices=[(one, _LOSS_LABELS.get(one, one)) for one in LOSS_ON])
    line = forms.IntegerField(
        label="Line", min_value=1, max_value=LARGEST_LINE, error_messages=_whole(1, LARGEST_LINE)
    )  # fmt: skip

    def __init__(self, query: Any, *, bases: list[Any]) -> None:
        given = {name: query[name] for name in self.base_fields if query.get(name)}
        defaults = {"base": bases[0].pk if bases else "", "length": DEFAULT_LENGTH, "loss_on": DEFAULT_LOSS_ON,
                    "line": 1}  # fmt: skip
        super().__init__({**defaults, **given})
        self.fields["base"].choices = [(one.pk, one.name) for one in bases]  # type: ignore[attr-defined]

"""The further datasets of the New job form: rows of a dataset and a weight, as many as the person adds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from django import forms
from django.http import QueryDict

from studio.datasets.models import DatasetVersion
from workers.recipe import MAX_MIXED, MixSettings
from workers.setting import settings_of, to_text

if TYPE_CHECKING:
    from jobs.estimating import Plan, PlannedSource
    from jobs.forms import RowField

VERSION, WEIGHT, ADD, REMOVE = "mix_version", "mix_weight", "mix_add", "mix_remove"
(WEIGHT_SETTING,) = settings_of(MixSettings, "mix")
Pair = tuple[str, str]
"""A dataset version's key and a weight, both as they stand in the form."""


class MixWidget(forms.Widget):
    """Reads the rows of a form: two inputs of the same names for each."""

    def value_from_datadict(self, data: Mapping[str, Any], files: object, name: str) -> list[Pair]:
        """Every row, those without a dataset too."""
        if not isinstance(data, QueryDict):
            return []
        keys, weights = data.getlist(VERSION), data.getlist(WEIGHT)
        weights += [WEIGHT_SETTING.default_text()] * (len(keys) - len(weights))
        return list(zip(keys, weights, strict=False))

    def value_omitted_from_data(self, data: Mapping[str, Any], files: object, name: str) -> bool:
        return VERSION not in data


@dataclass(frozen=True)
class Choice:
    """A further dataset as it was chosen; `row` counts the form's rows from 0, empty ones too."""

    row: int
    version: DatasetVersion
    weight: float


class MixField(forms.Field):
    """Further datasets with their weights, among the versions that another field offers."""

    widget = MixWidget

    def __init__(self, versions: RowField) -> None:
        super().__init__(required=False, label="Further datasets")
        self.versions = versions

    def clean(self, value: Any) -> list[Choice]:
        """The rows that have a dataset; raises ValidationError with a sentence for each that is wrong."""
        chosen, errors = [], []
        for row, (key, weight) in enumerate(value or ()):
            if not key:
                continue
            try:
                version = self.versions.to_python(key)
                chosen.append(Choice(row, version, float(WEIGHT_SETTING.parse(weight))))
            except (forms.ValidationError, ValueError) as error:
                said = " ".join(error.messages) if isinstance(error, forms.ValidationError) else str(error)
                errors.append(forms.ValidationError(f"Dataset {row + 2}: {said}", code=f"row_{row}"))
        if len(chosen) + len(errors) > MAX_MIXED:
            errors.append(forms.ValidationError(f"{MAX_MIXED} further datasets at most; remove some.", code="too_many"))
        if errors:
            raise forms.ValidationError(errors)
        return chosen


@dataclass(frozen=True)
class MixRow:
    """A row as the page shows it; `planned` is what it comes to, once all is chosen."""

    index: int
    key: str
    weight: str
    planned: PlannedSource | None

    @property
    def number(self) -> int:
        """Its number among all datasets of the job, the main one being 1."""
        return self.index + 2


def mix_rows(pairs: Sequence[Pair], chosen: Sequence[Choice], plan: Plan | None) -> Iterator[MixRow]:
    """The form's rows with what their datasets come to in a plan."""
    planned = {}
    if plan is not None and len(plan.sources) == len(chosen) + 1:
        planned = dict(zip((one.row for one in chosen), plan.sources[1:], strict=True))
    for index, (key, weight) in enumerate(pairs):
        yield MixRow(index, key, weight, planned.get(index))


def as_text(versions: Sequence[tuple[int, float]]) -> list[Pair]:
    """Keys and weights as the form has them."""
    return [(str(key), to_text(weight)) for key, weight in versions]


def with_rows_changed(data: QueryDict) -> QueryDict | None:
    """The form with a row more or less, as its button asked; None when no such button was pressed."""
    if ADD not in data and REMOVE not in data:
        return None
    changed = data.copy()
    pairs = MixWidget().value_from_datadict(data, None, "mix")
    if ADD in data and len(pairs) < MAX_MIXED:
        pairs.append(("", WEIGHT_SETTING.default_text()))
    if (removed := data.get(REMOVE, "")).isascii() and removed.isdigit() and int(removed) < len(pairs):
        del pairs[int(removed)]
    set_pairs(changed, pairs)
    del changed[ADD if ADD in changed else REMOVE]
    return changed


def set_pairs(data: QueryDict, pairs: Sequence[Pair]) -> None:
    """Put rows into a form's data."""
    data.setlist(VERSION, [key for key, _ in pairs])
    data.setlist(WEIGHT, [weight for _, weight in pairs])

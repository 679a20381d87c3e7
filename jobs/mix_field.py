"""The further datasets of the New job form: rows of a dataset and a weight, as many as the person adds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from django import forms
from django.http import QueryDict

from jobs.row_field import RowField
from studio.accounts.models import Team
from studio.datasets.models import DatasetSplit, DatasetVersion
from studio.reviews.scan_limits import Standing, blocking
from workers.recipe import MAX_MIXED, MixedDataset, MixSettings
from workers.setting import settings_of, to_text

if TYPE_CHECKING:
    from jobs.estimating import Plan, PlannedSource

VERSION, WEIGHT, SPLIT, ADD, REMOVE = "mix_version", "mix_weight", "mix_split", "mix_add", "mix_remove"
SHOWN = "mix_shown"
"""The version whose splits a row showed: what was chosen of them is not meant for another one."""
SHARE = "share"
"""Instead of a split's key: a share of the rows is held out, as the recipe's settings say."""
(WEIGHT_SETTING,) = settings_of(MixSettings, "mix")


class Pair(NamedTuple):
    """A row as it stands in the form: a dataset version's key, a weight, and a split's key; empty: its default one."""

    key: str
    weight: str
    split: str = ""


class MixWidget(forms.Widget):
    """Reads the rows of a form: four inputs of the same names for each."""

    def value_from_datadict(self, data: Mapping[str, Any], files: object, name: str) -> list[Pair]:
        """Every row, those without a dataset too."""
        if not isinstance(data, QueryDict):
            return []
        keys, weights = data.getlist(VERSION), data.getlist(WEIGHT)
        weights += [WEIGHT_SETTING.default_text()] * (len(keys) - len(weights))
        splits = data.getlist(SPLIT) + [""] * len(keys)
        shown = data.getlist(SHOWN) + [""] * len(keys) if SHOWN in data else keys
        return [
            Pair(key, weight, split if key == version else "")
            for key, weight, split, version in zip(keys, weights, splits, shown, strict=False)
        ]

    def value_omitted_from_data(self, data: Mapping[str, Any], files: object, name: str) -> bool:
        return VERSION not in data


@dataclass(frozen=True)
class Choice:
    """A further dataset as it was chosen; `row` counts the form's rows from 0, empty ones too."""

    row: int
    version: DatasetVersion
    weight: float
    split: DatasetSplit | None


class MixField(forms.Field):
    """Further datasets with their weights, among the versions that another field offers."""

    widget = MixWidget

    def __init__(self, versions: RowField) -> None:
        super().__init__(required=False, label="Further datasets")
        self.versions = versions

    def clean(self, value: Any) -> list[Choice]:
        """The rows that have a dataset; raises ValidationError with a sentence for each that is wrong."""
        chosen, errors = [], []
        for row, (key, weight, split) in enumerate(value or ()):
            if not key:
                continue
            try:
                version = self.versions.to_python(key)
                chosen.append(Choice(row, version, float(WEIGHT_SETTING.parse(weight)), split_of(version, split)))
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
    splits: list[DatasetSplit]
    split: DatasetSplit | None
    version: DatasetVersion | None
    blocks: list[Standing]
    """The scans of its dataset that keep the job from being queued."""

    @property
    def number(self) -> int:
        """Its number among all datasets of the job, the main one being 1."""
        return self.index + 2


def splits_of(version: DatasetVersion | None) -> list[DatasetSplit]:
    """The splits of a version that a form offers, which read them with it."""
    return [DatasetSplit(**values) for values in getattr(version, "done_splits", ())]


def split_of(version: DatasetVersion, key: str) -> DatasetSplit | None:
    """The split that a row asks for: the version's own of that key, its default one, or none for a share.

    Raises ValidationError where the version has no such split.
    """
    if key == SHARE:
        return None
    if not key:
        return _default_split(version)
    found = next((one for one in splits_of(version) if str(one.pk) == key), None)
    if found is None:
        raise forms.ValidationError(f"{version} has no such split. Choose one from the list.", code="invalid_choice")
    return found


def _default_split(version: DatasetVersion) -> DatasetSplit | None:
    return next((one for one in splits_of(version) if one.is_default), None)


def _shown_split(version: DatasetVersion | None, key: str) -> DatasetSplit | None:
    """The split that a row shows as chosen; for one that the version has not, its default one."""
    if version is None:
        return None
    try:
        return split_of(version, key)
    except forms.ValidationError:
        return _default_split(version)


def mix_rows(
    pairs: Sequence[Pair],
    chosen: Sequence[Choice],
    plan: Plan | None,
    versions: Mapping[str, DatasetVersion],
    team: Team,
) -> Iterator[MixRow]:
    """The form's rows with what their datasets come to in a plan, the splits of each and what its team's policy says
    of it."""
    planned = {}
    if plan is not None and len(plan.sources) == len(chosen) + 1:
        planned = dict(zip((one.row for one in chosen), plan.sources[1:], strict=True))
    blocks: dict[str, list[Standing]] = {}
    for index, (key, weight, split) in enumerate(pairs):
        version = versions.get(key)
        # No job has more, so that no form needs a look at the scans of more.
        if version is not None and key not in blocks and len(blocks) < MAX_MIXED:
            blocks[key] = blocking(version, team)
        yield MixRow(
            index, key, weight, planned.get(index), splits_of(version), _shown_split(version, split), version,
            blocks.get(key, []),
        )  # fmt: skip


def as_text(
    pairs: Sequence[tuple[int, float]], mix: Sequence[MixedDataset], versions: Mapping[str, DatasetVersion]
) -> list[Pair]:
    """The further datasets of a recipe as the form has them; `pairs` are their versions and weights."""
    found = []
    for (key, weight), one in zip(pairs, mix, strict=True):
        named = one.split.sha256 if one.split is not None else None
        same = (split for split in splits_of(versions.get(str(key))) if split.sha256 == named)
        found.append(Pair(str(key), to_text(weight), next((str(split.pk) for split in same), SHARE)))
    return found


def with_rows_changed(data: QueryDict) -> QueryDict | None:
    """The form with a row more or less, as its button asked; None when no such button was pressed."""
    if ADD not in data and REMOVE not in data:
        return None
    changed = data.copy()
    pairs = MixWidget().value_from_datadict(data, None, "mix")
    if ADD in data and len(pairs) < MAX_MIXED:
        pairs.append(Pair("", WEIGHT_SETTING.default_text()))
    if (removed := data.get(REMOVE, "")).isascii() and removed.isdigit() and int(removed) < len(pairs):
        del pairs[int(removed)]
    set_pairs(changed, pairs)
    del changed[ADD if ADD in changed else REMOVE]
    return changed


def set_pairs(data: QueryDict, pairs: Sequence[Pair]) -> None:
    """Put rows into a form's data."""
    data.setlist(VERSION, [one.key for one in pairs])
    data.setlist(WEIGHT, [one.weight for one in pairs])
    data.setlist(SPLIT, [one.split for one in pairs])
    data.setlist(SHOWN, [one.key for one in pairs])

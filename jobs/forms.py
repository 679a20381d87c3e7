"""The New job form: everything in it comes from the recipe, the methods and the team's rows."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from django import forms
from django.contrib.postgres.expressions import ArraySubquery
from django.db.models import OuterRef
from django.db.models.functions import JSONObject
from django.http import QueryDict
from pydantic import BaseModel as BaseModelSettings
from pydantic import ValidationError

from jobs.experience import with_experience
from jobs.mix_field import MixField, MixWidget, Pair, as_text, set_pairs
from jobs.mixes import dataset_ref, mix_problems, pairs_of
from jobs.models import Job
from jobs.row_field import RowField
from studio.accounts.models import Team
from studio.catalogue.models import BaseModel
from studio.datasets.models import DatasetSplit, DatasetVersion, SplitState, VersionState
from studio.metric_fields import MetricBoxes, chosen_metrics, metric_boxes, metric_field, metric_values, offer_metrics
from studio.query_values import whole_number
from studio.reviews.scan_limits import with_scan_facts
from studio.setting_fields import SettingField, SettingManyField, SettingRow, form_name, make_field, setting_row
from workers.errors import ExplainedError
from workers.evaluations import choose_evaluations, evaluations
from workers.fitting import Suggestion
from workers.methods import Method, methods
from workers.recipe import (
    MAX_MIXED,
    EvaluationSettings,
    MetricChoice,
    Recipe,
    SplitSettings,
    TrainingSettings,
    problems_by_field,
)
from workers.resolving import read_settings
from workers.setting import Setting, settings_of, to_text

GROUPS: dict[str, tuple[str, type[BaseModelSettings]]] = {
    "training": ("Training", TrainingSettings),
    "split": ("Held-out rows", SplitSettings),
    "evaluation": ("Evaluation", EvaluationSettings),
}
PRECISION = Setting(
    name="precision",
    label=Recipe.model_fields["precision"].title or "Precision",
    help=Recipe.model_fields["precision"].description or "",
    unit="",
    source="",
    kind="choice",
    default="auto",
    takes_auto=True,
    choices=("float32", "bfloat16", "nf4", "int8"),
)
# What a recipe calls a thing, and the form field that stands for it.
FIELD_OF = {"dataset": "dataset_version", "base_model": "base_model", "objective": "dataset_version", "mix": "mix"}
SPLIT_FIELD = "dataset.split"


# With the versions, so that the form needs no query of its own for them.
_DONE_SPLITS = ArraySubquery(
    DatasetSplit.objects.filter(version=OuterRef("pk"), state=SplitState.DONE)
    .order_by("-pk")
    .values(
        json=JSONObject(
            **{name: name for name in
               ("id", "name", "sha256", "num_train", "num_validation", "num_test", "is_default", "version_id")}
        )
    )
)  # fmt: skip


@dataclass(frozen=True)
class Goal:
    """A preset: settings that it changes from their defaults, unless the person changed them already."""

    name: str
    label: str
    help: str
    values: Mapping[str, Any]


GOALS = {
    goal.name: goal
    for goal in (
        Goal(
            "quick",
            "Quick check",
            "A few dozen steps, to see that data and settings work together.",
            {"training.max_steps": 30, "split.max_held_out": 40, "evaluation.num_generated": 8},
        ),
        Goal("balanced", "Balanced", "One pass over the rows with the method's defaults.", {}),
    )
}


@dataclass(frozen=True)
class Section:
    """A titled group of setting fields for the template; `changed` counts those that differ from their default."""

    key: str
    title: str
    rows: list[SettingRow]
    metrics: MetricBoxes | None = None

    @property
    def num_changed(self) -> int:
        return sum(row.is_changed for row in self.rows) + (self.metrics.num_changed if self.metrics else 0)

    @property
    def has_errors(self) -> bool:
        return any(row.errors for row in self.rows) or (self.metrics is not None and self.metrics.has_errors)


class JobForm(forms.Form):
    """Base model, dataset, method, goal and name; and below them every setting of the recipe and of each method."""

    base_model = RowField(
        required="Choose a base model.",
        unknown="This base model is not registered here. Choose one from the list.",
    )
    dataset_version = RowField(
        label="Dataset",
        required="Choose a dataset.",
        unknown="Your team has no such dataset, or it is not ready. Choose one from the list.",
    )
    dataset_split = RowField(
        label="Split",
        unknown="This dataset has no such split. Choose one from the list.",
    )
    method = forms.ChoiceField(
        error_messages={
            "required": "Choose a method.",
            "invalid_choice": 'There is no method called "%(value)s". Choose one of those shown.',
        }
    )
    goal = forms.ChoiceField(
        choices=[(goal.name, goal.label) for goal in GOALS.values()],
        required=False,
        error_messages={"invalid_choice": 'There is no goal called "%(value)s". Choose one of those shown.'},
    )
    name = forms.CharField(
        max_length=120,
        error_messages={"required": "Give the job a name.", "max_length": "Shorten the name to 120 characters."},
    )
    parent = forms.UUIDField(required=False, widget=forms.HiddenInput)
    idempotency_key = forms.CharField(max_length=80, required=False, widget=forms.HiddenInput)
    shown_method = forms.CharField(max_length=40, required=False, widget=forms.HiddenInput)
    shown_dataset = forms.CharField(max_length=40, required=False, widget=forms.HiddenInput)

    def __init__(
        self, data: QueryDict | None = None, *, team: Team, rows_of: JobForm | None = None,
        dataset_versions: Sequence[str] = (), **kwargs: Any,
    ) -> None:  # fmt: skip
        """A form for a team; `dataset_versions` are the keys of those that are chosen before anything was sent."""
        super().__init__(data, **kwargs)
        self.team = team
        self.suggestions: Sequence[Suggestion] = ()
        """What would make the job fit."""
        self.methods = methods()
        if rows_of is not None:
            self.base_models.rows, self.dataset_versions.rows = rows_of.base_models.rows, rows_of.dataset_versions.rows
            self.dataset_versions.left_out = rows_of.dataset_versions.left_out
        else:
            self.base_models.offer(BaseModel.objects.defer("files").order_by("name"))
            self.dataset_versions.offer(
                with_scan_facts(
                    with_experience(DatasetVersion.objects.filter(dataset__team=team, state=VersionState.READY))
                    .annotate(done_splits=_DONE_SPLITS)
                    .order_by("dataset__name", "-number"),
                    team,
                    only=_known_keys(dataset_versions if data is None else _chosen_keys(data)),
                ),
                why_not=DatasetVersion.why_not_trainable,
            )
        self._offer_splits(rows_of)
        self.fields["method"].choices = [(m.name, m.label) for m in self.methods.values()]  # type: ignore[attr-defined]
        self.fields["mix"] = MixField(self.dataset_versions)
        self.fields["precision"] = SettingField(PRECISION)
        for setting in self._all_settings():
            self.fields[setting.name] = make_field(setting)
        self.offer_metrics(())

    def offer_metrics(self, metrics: Sequence[str | MetricChoice]) -> None:
        """Fill in the metrics of a recipe, with room for the settings of each."""
        values = metric_values(metrics, METRICS)
        offer_metrics(self, METRICS, values[METRICS])
        if metrics:
            self.initial.update(values)
        for name, form_field in self.fields.items():
            form_field.widget.attrs["id"] = f"id_{form_name(name)}"

    def _offer_splits(self, rows_of: JobForm | None) -> None:
        """The splits of the chosen version. Another version than the one shown brings its default split along."""
        if rows_of is not None:
            self.splits.rows = rows_of.splits.rows
        if not self.is_bound:
            return
        if rows_of is None:
            self.offer_splits_of(self.text_of("dataset_version"))
        if "shown_dataset" in self.data and self.data["shown_dataset"] != self.text_of("dataset_version"):
            assert isinstance(self.data, QueryDict)
            data = self.data.copy()
            data["dataset_split"] = self.default_split()
            self.data = data

    def offer_splits_of(self, version: str) -> None:
        """Set which splits can be chosen: those of one of the versions offered."""
        chosen = self.dataset_versions.rows.get(version)
        self.splits.offer(DatasetSplit(**values) for values in (chosen.done_splits if chosen is not None else ()))

    def default_split(self) -> str:
        """The key of the chosen version's default split; empty without one."""
        return next((key for key, split in self.splits.rows.items() if split.is_default), "")

    @property
    def splits(self) -> RowField:
        """The field of the splits, with those of the chosen version."""
        return self.fields["dataset_split"]  # type: ignore[return-value]

    @property
    def base_models(self) -> RowField:
        """The field of the base models, with its rows."""
        return self.fields["base_model"]  # type: ignore[return-value]

    @property
    def dataset_versions(self) -> RowField:
        """The field of the team's ready dataset versions, with its rows."""
        return self.fields["dataset_version"]  # type: ignore[return-value]

    def _all_settings(self) -> Iterator[Setting]:
        for key, (_title, model) in GROUPS.items():
            for setting in settings_of(model, key):
                if setting.name != METRICS:
                    yield _with_evaluations(setting)
        for method in self.methods.values():
            yield from method_settings(method)

    # -- what was asked --

    def clean(self) -> dict[str, Any]:
        """Validate the recipe as a whole, so that the page and the worker refuse the same things."""
        values = super().clean() or {}
        if not self.errors:
            mixed = [one.version for one in values["mix"]]
            for field, sentence in mix_problems(values["dataset_version"], mixed).items():
                self.add_problem(field, sentence)
        if not self.errors:
            self._recipe = self._make_recipe(values)
        return values

    def to_recipe(self) -> Recipe:
        """The recipe that a valid form asks for, its autos unresolved."""
        assert self.is_valid(), "ask is_valid() first"
        assert self._recipe is not None
        return self._recipe

    def suggested_changes(self) -> list[tuple[Suggestion, dict[str, str]]]:
        """`suggestions`, each with the fields that it fills in otherwise."""
        if not self.suggestions:
            return []
        assert self._recipe is not None, "only a recipe has suggestions"
        return [(one, changed_fields(self._recipe, one.asked)) for one in self.suggestions]

    def _make_recipe(self, values: dict[str, Any]) -> Recipe | None:
        base_model: BaseModel = values["base_model"]
        version: DatasetVersion = values["dataset_version"]
        split: DatasetSplit | None = values["dataset_split"]
        method = self.methods[values["method"]]
        goal = GOALS.get(values.get("goal") or "")
        asked: dict[str, Any] = {
            "name": values["name"],
            "base_model": {"name": base_model.name, "revision": base_model.revision},
            "dataset": dataset_ref(version) | ({"split": split.reference()} if split is not None else {}),
            "mix": [
                dataset_ref(one.version)
                | ({"split": one.split.reference()} if one.split is not None else {})
                | {"weight": one.weight}
                for one in values["mix"]
            ],
            "method": method.name,
            "precision": values["precision"],
            "settings": {setting.name.rsplit(".", 1)[1]: values[setting.name] for setting in method_settings(method)},
        }
        for key, (_title, model) in GROUPS.items():
            asked[key] = {}
            for setting in settings_of(model, key):
                if setting.name == METRICS:
                    continue
                value = values[setting.name]
                if goal and setting.name in goal.values and value == setting.default:
                    value = goal.values[setting.name]
                asked[key][setting.name.rsplit(".", 1)[1]] = value
        asked["evaluation"]["metrics"] = chosen_metrics(self, METRICS)
        try:
            recipe = Recipe.model_validate(asked)
        except ValidationError as error:
            for recipe_field, message in problems_by_field(error).items():
                self.add_problem(recipe_field, message)
            return None
        try:
            read_settings(method, recipe.settings)
            choose_evaluations(recipe.evaluation.metrics)
        except ExplainedError as error:
            self.add_explained(error)
            return None
        return recipe

    # -- problems beside their fields --

    def form_field_of(self, recipe_field: str | None) -> str | None:
        """The form field that stands for a recipe's dotted field; None when there is none."""
        if not recipe_field:
            return None
        if recipe_field.startswith(SPLIT_FIELD):
            return "dataset_split"
        top, _, rest = recipe_field.partition(".")
        if recipe_field.startswith(f"{METRICS}."):
            return metric_field(self, METRICS, recipe_field.removeprefix(f"{METRICS}."))
        own = f"settings.{self.method_name()}.{rest}" if top == "settings" and rest else recipe_field
        name = FIELD_OF.get(top, own)
        return name if name in self.fields else None

    def add_problem(self, recipe_field: str | None, message: str) -> None:
        """Put a sentence beside the field that it belongs to, or on top of the form."""
        self.add_error(self.form_field_of(recipe_field), message)

    def add_explained(self, error: ExplainedError) -> None:
        """Put an explained error, with what to do, beside its field. A dataset that is too small says so itself."""
        about_rows = error.code in {"too_small", "unreadable_dataset"}
        for field, sentence in error.by_field():
            is_own = field == SPLIT_FIELD or (field or "").startswith("mix.")
            self.add_problem("dataset" if about_rows and not is_own else field, sentence)

    # -- what the template shows --

    def method_name(self) -> str:
        """The chosen method, or the first when none or an unknown one is chosen."""
        name = (self.data.get("method") if self.is_bound else self.initial.get("method")) or ""
        return name if name in self.methods else next(iter(self.methods), "")

    def chosen_method(self) -> Method | None:
        return self.methods.get(self.method_name())

    def missing(self) -> str:
        """The next thing to choose before the job can start, as the button says it; empty when nothing is missing."""
        for name, sentence in (
            ("base_model", "Choose a base model"),
            ("dataset_version", "Choose a dataset"),
            ("method", "Choose a method"),
            ("name", "Give it a name"),
        ):
            if not self.text_of(name):
                return sentence
        return ""

    def text_of(self, name: str) -> str:
        """What stands in a field now, as text."""
        value = self.data.get(name) if self.is_bound else self.initial.get(name)
        return to_text(getattr(value, "pk", value))

    def mix_pairs(self) -> list[Pair]:
        """The further datasets and their weights as they stand in the form, rows without a dataset too."""
        if self.is_bound:
            return MixWidget().value_from_datadict(self.data, self.files, "mix")
        return list(self.initial.get("mix", ()))

    def mixed_versions(self) -> list[DatasetVersion]:
        """The further datasets of a valid form."""
        return [one.version for one in self.cleaned_data["mix"]]

    def section(self, key: str, title: str, settings: tuple[Setting, ...], resolved: Mapping[str, Any]) -> Section:
        rows = [setting_row(self, setting, resolved) for setting in settings if setting.name != METRICS]
        metrics = metric_boxes(self, METRICS) if len(rows) < len(settings) else None
        return Section(key, title, rows, metrics)

    def sections(self, resolved: Recipe | None = None) -> list[Section]:
        """The Advanced groups, with the resolved value beside every auto."""
        values = resolved_values(resolved, self.method_name())
        shared = [
            self.section(
                key,
                title,
                tuple(_with_evaluations(one) for one in settings_of(model, key)),
                values,
            )
            for key, (title, model) in GROUPS.items()
        ]
        shared[0].rows.insert(0, setting_row(self, PRECISION, values))
        return shared

    def method_section(self, resolved: Recipe | None = None) -> Section | None:
        """The chosen method's own settings."""
        method = self.chosen_method()
        if method is None:
            return None
        values = resolved_values(resolved, method.name)
        return self.section("settings", method.label, method_settings(method), values)


def _chosen_keys(data: QueryDict) -> list[str]:
    """The dataset versions that a sent form chooses, the main one first."""
    return [data.get("dataset_version", ""), *(one.key for one in MixWidget().value_from_datadict(data, None, "mix"))]


def _known_keys(texts: Sequence[str]) -> list[int]:
    """Those of some keys that can be a row's, as many as a job may have."""
    return list(dict.fromkeys(key for text in texts if (key := whole_number(text)) is not None))[: 1 + MAX_MIXED]


def method_settings(method: Method) -> tuple[Setting, ...]:
    """A method's own settings, named `settings.<method>.<field>` so that methods do not share inputs."""
    return settings_of(method.Settings, f"settings.{method.name}")


METRICS = "evaluation.metrics"


def _with_evaluations(setting: Setting) -> Setting:
    """The setting, with the evaluations to choose from where it names some."""
    if setting.name == "training.best_by":
        return replace(setting, choices=tuple(evaluations()), kind="choice")
    return setting


def resolved_values(recipe: Recipe | None, method: str) -> dict[str, Any]:
    """A resolved recipe's values by form field name."""
    if recipe is None:
        return {}
    found: dict[str, Any] = {"precision": recipe.precision}
    for key in GROUPS:
        found |= {f"{key}.{name}": value for name, value in getattr(recipe, key).model_dump().items()}
    found |= {f"settings.{method}.{name}": value for name, value in recipe.settings.items()}
    return found


def fresh_form(
    team: Team,
    *,
    dataset_version: str = "",
    split: str | None = None,
    base_model: str = "",
    parent: Job | None = None,
    num_again: int = 0,
) -> JobForm:
    """A form to begin with: an earlier job's recipe, or the given dataset and the only base model.

    Without a split of the dataset that is asked for it begins with the default one.
    `num_again` is how often `parent` was run again already; the new name counts on from there.
    """
    mixed = pairs_of(parent) if parent is not None else []
    chosen = str(parent.dataset_version_id or "") if parent is not None else dataset_version
    form = JobForm(team=team, dataset_versions=[chosen, *(str(key) for key, _weight in mixed)])
    form.initial.update(idempotency_key=secrets.token_urlsafe(16), goal="balanced")
    if parent is not None:
        recipe = Recipe.from_dict(parent.asked_recipe)
        form.initial.update(
            {
                "base_model": parent.base_model_id,
                "dataset_version": parent.dataset_version_id,
                "mix": as_text(mixed, recipe.mix, form.dataset_versions.rows),
                "method": recipe.method,
                "goal": "",
                "name": name_again(recipe.name, num_again),
                "parent": parent.pk,
                **resolved_values(recipe, recipe.method),
            }
        )
        form.offer_splits_of(str(parent.dataset_version_id))
        named = recipe.dataset.split.sha256 if recipe.dataset.split is not None else None
        form.initial["dataset_split"] = next(
            (key for key, split in form.splits.rows.items() if split.sha256 == named), ""
        )
        form.offer_metrics(recipe.evaluation.metrics)
    else:
        method = "lora" if "lora" in form.methods else next(iter(form.methods), "")
        form.initial["method"] = method
        if base_model in form.base_models.rows or len(form.base_models.rows) == 1:
            form.initial["base_model"] = base_model or next(iter(form.base_models.rows))
        version = form.dataset_versions.rows.get(dataset_version)
        if version is not None:
            form.initial["dataset_version"] = version.pk
            form.offer_splits_of(dataset_version)
            form.initial["dataset_split"] = split if split in form.splits.rows else form.default_split()
            form.initial["name"] = next_name(team, f"{version.dataset.name[:90]}-{method}")
    form.initial["shown_method"] = form.initial["method"]
    form.initial["shown_dataset"] = to_text(form.initial.get("dataset_version"))
    return form


def changed_fields(asked: Recipe, wanted: Recipe) -> dict[str, str]:
    """The fields of the form, as text, that a recipe with a few settings changed fills in otherwise."""
    before = resolved_values(asked, asked.method) | {"method": asked.method}
    after = resolved_values(wanted, wanted.method) | {"method": wanted.method}
    return {name: to_text(value) for name, value in after.items() if name not in before or value != before[name]}


def with_changes(form: JobForm, changes: object) -> JobForm:
    """The form as it was sent, with what `changed_fields` gave; raises ValueError for what it cannot have given."""
    if not isinstance(changes, dict) or not all(isinstance(one, str) for one in changes.values()):
        raise ValueError("Changes are texts by the names of fields.")
    if unknown := sorted(set(changes) - set(form.fields)):
        raise ValueError(f"The form has no field {unknown[0]!r}.")
    assert isinstance(form.data, QueryDict), "changes are for a form that was sent"
    data = form.data.copy()
    for name, text in changes.items():
        data[name] = text
    return JobForm(data, team=form.team, rows_of=form)


def bound_copy(form: JobForm) -> JobForm:
    """The form as if its initial values had been posted."""
    data = QueryDict(mutable=True)
    for name, field in form.fields.items():
        value = form.initial.get(name, field.setting.default if isinstance(field, SettingField) else None)
        if isinstance(field, MixField):
            set_pairs(data, form.mix_pairs())
        elif isinstance(field, SettingManyField):
            data.setlist(name, list(value or ()))
        else:
            data[name] = to_text(value)
    return JobForm(data, team=form.team, rows_of=form)


def name_again(name: str, num_again: int) -> str:
    """The name of a job that is run again: support, support-2, support-3, ..."""
    stem, _, last = name.rpartition("-")
    if not (stem and last.isascii() and last.isdigit() and len(last) < 6):
        stem, last = name, "1"
    return f"{stem[:110]}-{int(last) + 1 + num_again}"


def next_name(team: Team, wanted: str) -> str:
    """`wanted`, or the next free one of wanted-2, wanted-3, ... among the team's jobs."""
    stem = wanted[:110]
    taken = set(Job.objects.filter(team=team, name__startswith=stem).values_list("name", flat=True))
    if wanted not in taken:
        return wanted[:120]
    number = 2
    while f"{stem}-{number}" in taken:
        number += 1
    return f"{stem}-{number}"

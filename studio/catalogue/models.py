"""The catalogue: base models, adapters and what was measured about them."""

from __future__ import annotations

from typing import Any, ClassVar

from django.conf import settings
from django.contrib.postgres.fields import ArrayField
from django.contrib.postgres.indexes import GinIndex
from django.contrib.postgres.search import SearchVector, SearchVectorField
from django.db import models
from django.urls import reverse
from django.utils.functional import cached_property

from studio.accounts.models import Team
from studio.datasets.models import Dataset, DatasetVersion
from workers.evaluations import Evaluation, choose_evaluations, evaluations
from workers.recipe import EvaluationSettings
from workers.shapes import ModelShape
from workers.verdicts import Verdict, verdict


class BaseModel(models.Model):
    """A frozen model that adapters are trained on. Shared by all teams of the studio."""

    name = models.CharField(max_length=120, unique=True)
    hub_id = models.CharField(max_length=200, blank=True, help_text="Its name on a model hub, for adapter_config.json.")
    description = models.TextField(blank=True)
    licence = models.CharField(max_length=80, blank=True)
    folder = models.TextField(help_text="Absolute folder on the workers' file system.")
    revision = models.CharField(max_length=64, help_text="sha256 over the sorted list of file names and digests.")
    files = models.JSONField(default=list, help_text="[{name, sha256, num_bytes}]")
    shape = models.JSONField(default=dict, help_text="A workers.shapes.ModelShape as JSON.")
    num_bytes = models.BigIntegerField(default=0)
    has_chat_template = models.BooleanField(default=False)
    created_by = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.SET_NULL, null=True, related_name="+")
    created_at = models.DateTimeField(auto_now_add=True)

    def __str__(self) -> str:
        return self.name

    def get_absolute_url(self) -> str:
        return reverse("catalogue:base_model", args=[self.pk])

    def model_shape(self) -> ModelShape:
        return ModelShape.model_validate(self.shape)


class AdapterState(models.TextChoices):
    """How far a version of an adapter has come towards use. Reviews move it, and an archive is only out of sight."""

    DRAFT = "draft", "Draft"
    IN_REVIEW = "in_review", "In review"
    APPROVED = "approved", "Approved"
    REJECTED = "rejected", "Rejected"
    ARCHIVED = "archived", "Archived"


class Adapter(models.Model):
    """A trained adapter: one version of the team's adapters of its name.

    Born in one place, `registering.register_adapter`, with the success of its job.
    """

    team = models.ForeignKey(Team, on_delete=models.CASCADE, related_name="adapters")
    name = models.CharField(max_length=120)
    version = models.PositiveIntegerField(default=1, help_text="Counts from 1 within the team's adapters of this name.")
    state = models.CharField(max_length=12, choices=AdapterState.choices, default=AdapterState.DRAFT)
    tags = ArrayField(models.CharField(max_length=40), default=list, blank=True)
    card = models.TextField(blank=True, help_text="The model card's text as a person edited it; empty: as generated.")
    overlap = models.JSONField(
        default=dict, help_text="workers.results.OverlapRecord; empty when it was not looked for."
    )
    suspicious = models.JSONField(
        default=list, help_text="workers.results.SuspiciousRecord, the most suspicious first."
    )
    base_model = models.ForeignKey(BaseModel, on_delete=models.PROTECT, related_name="adapters")
    dataset_version = models.ForeignKey(DatasetVersion, on_delete=models.PROTECT, related_name="adapters")
    method = models.CharField(max_length=40)
    recipe = models.JSONField()
    folder = models.TextField(help_text="Storage key of the adapter's folder.")
    files = models.JSONField(default=list, help_text="[{name, sha256, num_bytes}]")
    num_bytes = models.BigIntegerField(default=0)
    num_trainable = models.BigIntegerField(default=0)
    stopped_at_step = models.PositiveIntegerField(null=True)
    provenance = models.JSONField(default=dict, help_text="Versions, device, seconds, tokens, peak memory.")
    num_mixed = models.PositiveSmallIntegerField(default=0, help_text="Further datasets that it was trained on.")
    sources = models.JSONField(
        default=list,
        help_text="Of one of several datasets: workers.results.SourceRecord of each, the main one first.",
    )
    created_by = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.PROTECT, related_name="+")
    created_at = models.DateTimeField(auto_now_add=True)

    search = models.GeneratedField(
        expression=SearchVector("name", "card", config="simple"), output_field=SearchVectorField(), db_persist=True
    )

    class Meta:
        constraints: ClassVar = [
            models.UniqueConstraint(fields=["team", "name", "version"], name="one_adapter_per_version")
        ]
        indexes: ClassVar = [
            models.Index(fields=["team", "-created_at"], name="adapter_list"),
            # What a list can be filtered by is read out of these.
            models.Index(fields=["team", "base_model"], name="adapter_bases"),
            models.Index(fields=["team", "method"], name="adapter_methods"),
            GinIndex(fields=["search"], name="adapter_search"),
            GinIndex(fields=["tags"], name="adapter_tags"),
        ]

    def __str__(self) -> str:
        return self.name

    def get_absolute_url(self) -> str:
        return reverse("catalogue:adapter", args=[self.pk])

    @property
    def data_label(self) -> str:
        """What it was trained on, without a query."""
        return data_label(self.dataset_version, self.num_mixed)

    @cached_property
    def mixed(self) -> list[AdapterDataset]:
        """The further datasets that it was trained on; no query where there are none, or of `adapters_for_page`."""
        if not self.num_mixed:
            return []
        if (found := getattr(self, "mixed_rows", None)) is not None:
            return [AdapterDataset.from_row(self, row) for row in found]
        return list(self.mix.select_related("dataset_version__dataset"))

    def versions_of_data(self) -> list[DatasetVersion]:
        """Every dataset version that it was trained on, the main one first."""
        return [self.dataset_version, *(one.dataset_version for one in self.mixed)]

    def held_out_scores(self) -> list[Score]:
        """Its scores on the held-out rows of its training, by name of the evaluation; uses what was prefetched."""
        found = [score for score in self.scores.all() if score.test_set == TestSet.HELD_OUT]
        return sorted(found, key=lambda score: score.evaluation)


def data_label(version: DatasetVersion, num_mixed: int) -> str:
    """A dataset version and how many further ones were mixed with it."""
    return f"{version} and {num_mixed} more" if num_mixed else str(version)


class MixedVersion(models.Model):
    """A further dataset version that something is trained on, beside its main one. `place` counts from 1."""

    place = models.PositiveSmallIntegerField(help_text="In the recipe's mix, from 1; 0 would be the main dataset.")
    weight = models.FloatField(help_text="Rows of it for each row of the main dataset.")

    class Meta:
        abstract = True
        ordering: ClassVar = ["place"]


class AdapterDataset(MixedVersion):
    """A further dataset version that an adapter was trained on."""

    adapter = models.ForeignKey(Adapter, on_delete=models.CASCADE, related_name="mix")
    dataset_version = models.ForeignKey(DatasetVersion, on_delete=models.PROTECT, related_name="adapter_mixes")

    class Meta(MixedVersion.Meta):
        constraints: ClassVar = [
            models.UniqueConstraint(fields=["adapter", "place"], name="one_dataset_per_place_of_adapter"),
            models.UniqueConstraint(fields=["adapter", "dataset_version"], name="one_place_per_dataset_of_adapter"),
        ]

    ROW: ClassVar = {
        "place": "place", "weight": "weight", "version_id": "dataset_version", "number": "dataset_version__number",
        "sha256": "dataset_version__sha256", "dataset_id": "dataset_version__dataset",
        "name": "dataset_version__dataset__name",
    }  # fmt: skip
    """What a page needs of one, so that it can be read together with its adapter (lineage.adapters_for_page)."""

    def __str__(self) -> str:
        return str(self.adapter)

    def get_absolute_url(self) -> str:
        return self.adapter.get_absolute_url()

    @classmethod
    def from_row(cls, adapter: Adapter, row: dict[str, Any]) -> AdapterDataset:
        """One of an adapter's from the values of `ROW`; of the version, it knows its name and its file's digest."""
        dataset = Dataset(pk=row["dataset_id"], name=row["name"])
        version = DatasetVersion(pk=row["version_id"], dataset=dataset, number=row["number"], sha256=row["sha256"])
        return cls(adapter=adapter, dataset_version=version, place=row["place"], weight=row["weight"])


class SavedView(models.Model):
    """Filters of the list of adapters under a name: a person's own, or shared with the team."""

    team = models.ForeignKey(Team, on_delete=models.CASCADE, related_name="saved_views")
    user = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.CASCADE, related_name="+")
    name = models.CharField(max_length=60)
    query = models.CharField(max_length=1000, help_text="The query string of the list.")
    is_shared = models.BooleanField(default=False)
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        constraints: ClassVar = [models.UniqueConstraint(fields=["team", "user", "name"], name="one_view_per_name")]
        ordering: ClassVar = ["name"]

    def __str__(self) -> str:
        return self.name


class FileCheck(models.Model):
    """The last time that an adapter's files were read and compared with their checksums, and what was found."""

    adapter = models.OneToOneField(Adapter, on_delete=models.CASCADE, primary_key=True, related_name="file_check")
    checked_at = models.DateTimeField(db_index=True)
    damage = models.TextField(blank=True, help_text="What was found, for people; empty: all is whole.")

    def __str__(self) -> str:
        return f"files of {self.adapter_id}"


class BaseFileCheck(models.Model):
    """The last look at a base model's files, and what was found; `asked_at` while somebody waits for the next one."""

    base_model = models.OneToOneField(BaseModel, on_delete=models.CASCADE, primary_key=True, related_name="file_check")
    asked_at = models.DateTimeField(null=True, db_index=True)
    checked_at = models.DateTimeField(null=True, db_index=True)
    damage = models.TextField(blank=True, help_text="What was found, for people; empty: all is whole.")

    def __str__(self) -> str:
        return f"files of {self.base_model_id}"


class Alias(models.Model):
    """A name such as "champion" that points at one version of the adapters of one name, and can move."""

    team = models.ForeignKey(Team, on_delete=models.CASCADE, related_name="aliases")
    adapter_name = models.CharField(max_length=120)
    name = models.SlugField(max_length=40)
    adapter = models.ForeignKey(Adapter, on_delete=models.CASCADE, related_name="aliases")

    class Meta:
        constraints: ClassVar = [
            models.UniqueConstraint(fields=["team", "adapter_name", "name"], name="one_adapter_per_alias")
        ]

    def __str__(self) -> str:
        return f"{self.adapter_name}@{self.name}"


class AliasMove(models.Model):
    """One move of an alias: what it can be rolled back to. Rows are only ever added."""

    team = models.ForeignKey(Team, on_delete=models.CASCADE, related_name="+")
    adapter_name = models.CharField(max_length=120)
    name = models.SlugField(max_length=40)
    moved_from = models.ForeignKey(Adapter, on_delete=models.SET_NULL, null=True, related_name="+")
    moved_to = models.ForeignKey(Adapter, on_delete=models.SET_NULL, null=True, related_name="+")
    moved_by = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.SET_NULL, null=True, related_name="+")
    reason = models.CharField(max_length=200, blank=True)
    at = models.DateTimeField(auto_now_add=True)

    class Meta:
        indexes: ClassVar = [models.Index(fields=["team", "adapter_name", "name", "-at"], name="alias_history")]

    def __str__(self) -> str:
        return f"{self.adapter_name}@{self.name} to {self.moved_to_id}"


class Suite(models.Model):
    """A version of a team's benchmark: rows and what is measured on them. Never changed once made.

    The rows are those of a dataset version, or of standard tasks of the evaluation harness, which say themselves what
    is measured.
    """

    team = models.ForeignKey(Team, on_delete=models.CASCADE, related_name="suites")
    name = models.CharField(max_length=120)
    version = models.PositiveIntegerField(default=1)
    description = models.TextField(blank=True)
    dataset_version = models.ForeignKey(DatasetVersion, on_delete=models.PROTECT, null=True, related_name="suites")
    tasks = models.JSONField(default=list, help_text="Names of standard tasks; empty: the rows are a dataset's.")
    evaluation = models.JSONField(
        help_text="workers.recipe.EvaluationSettings: metrics, answers, their length; of tasks: num_fewshot, "
        "with_chat_template, definitions_sha256."
    )
    max_rows = models.PositiveIntegerField(null=True, help_text="Rows from the beginning, of each task; null: all.")
    is_guardrail = models.BooleanField(
        default=False, help_text="Run on every new adapter; a loss on it counts as forgetting."
    )
    created_by = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.SET_NULL, null=True, related_name="+")
    created_at = models.DateTimeField(auto_now_add=True)
    archived_at = models.DateTimeField(null=True)

    class Meta:
        constraints: ClassVar = [
            models.UniqueConstraint(fields=["team", "name", "version"], name="one_suite_per_version"),
            models.CheckConstraint(
                condition=models.Q(dataset_version__isnull=False, tasks=[])
                | (models.Q(dataset_version__isnull=True) & ~models.Q(tasks=[])),
                name="a_suite_has_a_dataset_or_tasks",
            ),
        ]

    def __str__(self) -> str:
        return f"{self.name} v{self.version}"

    def get_absolute_url(self) -> str:
        return reverse("catalogue:suite", args=[self.pk])

    def chosen_evaluations(self) -> list[Evaluation]:
        """What it measures; without those whose plug-ins are not installed any more. Tasks say it themselves."""
        if self.tasks:
            return []
        metrics = EvaluationSettings.model_validate(self.evaluation).metrics
        known = evaluations()
        return choose_evaluations([one for one in metrics if (one if isinstance(one, str) else one.name) in known])

    def metric_labels(self) -> list[str]:
        """What it measures, as people call it."""
        return [one.label for one in self.chosen_evaluations()]


class TestSet(models.TextChoices):
    """What rows a model was scored on."""

    HELD_OUT = "held_out", "Held-out rows"  # of the dataset that the adapter was trained on
    GENERAL = "general", "General set"  # the studio's own, the same for everybody: shows what was forgotten
    SUITE = "suite", "Suite"  # a team's benchmark

    __test__ = False  # no test case, whatever pytest makes of its name


class EvaluationRun(models.Model):
    """One scoring of an adapter beside its base, or of a base alone, on one test set.

    Two runs can be compared exactly when `test_set_sha256` and `settings_sha256` are equal: same rows, same settings.
    Rows that could not be scored are counted, and figures of an incomplete run are never averaged with others.
    """

    team = models.ForeignKey(Team, on_delete=models.CASCADE, related_name="evaluation_runs")
    adapter = models.ForeignKey(Adapter, on_delete=models.CASCADE, null=True, related_name="runs")
    base_model = models.ForeignKey(BaseModel, on_delete=models.PROTECT, related_name="runs")
    test_set = models.CharField(max_length=10, choices=TestSet.choices)
    suite = models.ForeignKey(Suite, on_delete=models.PROTECT, null=True, related_name="runs")
    test_set_sha256 = models.CharField(max_length=64, blank=True, help_text="Of the scored rows' lines and contents.")
    settings_sha256 = models.CharField(max_length=64, blank=True, help_text="Of what decides an answer and a loss.")
    num_rows = models.PositiveIntegerField(help_text="Rows that were to be scored.")
    num_scored = models.PositiveIntegerField(help_text="Rows that were.")
    folder = models.TextField(blank=True, help_text="Storage key of its rows and results; empty: the adapter's folder.")
    base_figures = models.JSONField(default=dict, help_text="Of the base: {evaluation: {value, low, high, num_rows}}.")
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        indexes: ClassVar = [models.Index(fields=["team", "-created_at"], name="evaluation_run_list")]

    def __str__(self) -> str:
        return f"{self.get_test_set_display()} of {self.adapter or self.base_model}"

    def get_absolute_url(self) -> str:
        return reverse("catalogue:run", args=[self.pk])

    def is_complete(self) -> bool:
        return self.num_scored == self.num_rows


class RowCounts(models.Model):
    """What each row of a run adds to each figure's sums (workers.evaluations.Evaluation.row_counts).

    With these, two adapters that were scored on the same rows are compared row by row, without a GPU.
    """

    run = models.OneToOneField(EvaluationRun, on_delete=models.CASCADE, primary_key=True, related_name="row_counts")
    lines = models.JSONField(help_text="The rows' lines in the dataset file, in order.")
    adapter_counts = models.JSONField(help_text="{evaluation: [[number, ...] or null, one per line]}")
    base_counts = models.JSONField(help_text="The same of the untouched base.")

    def __str__(self) -> str:
        return f"rows of {self.run}"


class RunSample(models.Model):
    """A row of a suite as the base and the adapter of a run answered it; null where no answer was asked for."""

    run = models.ForeignKey(EvaluationRun, on_delete=models.CASCADE, related_name="samples")
    line = models.PositiveBigIntegerField(help_text="In the dataset file, or among the rows of the task.")
    task = models.CharField(max_length=200, blank=True, help_text="A standard task's name; empty: a dataset's row.")
    prompt = models.TextField()
    reference = models.TextField()
    # An empty answer is an answer: only null says that none was asked for.
    base_answer = models.TextField(null=True)  # noqa: DJ001
    adapter_answer = models.TextField(null=True)  # noqa: DJ001
    figures = models.JSONField(help_text="{evaluation: [the base's figure of this row, the adapter's]}, null for none.")
    left_out = models.JSONField(default=dict, help_text="{evaluation: why the row has no part in it}")

    def __str__(self) -> str:
        return f"line {self.line} of {self.run}"


class RunComparison(models.Model):
    """How one adapter stands beside another on the same rows, kept because it is computed from thousands of resamples.

    `difference*` is that of `run` minus that of `other`, paired by row.
    """

    run = models.ForeignKey(EvaluationRun, on_delete=models.CASCADE, related_name="comparisons")
    other = models.ForeignKey(EvaluationRun, on_delete=models.CASCADE, related_name="+")
    evaluation = models.CharField(max_length=80)
    higher_is_better = models.BooleanField()
    num_rows = models.PositiveIntegerField()
    value = models.FloatField()
    other_value = models.FloatField()
    difference = models.FloatField()
    difference_low = models.FloatField()
    difference_high = models.FloatField()
    interval_method = models.CharField(max_length=200)
    p_value = models.FloatField()
    smallest_effect = models.FloatField(null=True, help_text="The smallest difference worth telling.")
    rows_needed = models.PositiveIntegerField()
    rows_recommended = models.PositiveIntegerField()

    class Meta:
        constraints: ClassVar = [
            models.UniqueConstraint(fields=["run", "other", "evaluation"], name="one_comparison_per_pair")
        ]

    def __str__(self) -> str:
        return f"{self.evaluation} of {self.run} beside {self.other}"

    def verdict(self) -> Verdict:
        """How `run` stands beside `other`, when no other comparison is read beside this one."""
        return verdict(self)


class Score(models.Model):
    """One evaluation of an adapter beside the untouched base, on the same rows of one test set.

    `low` and `high` bound the 95 % interval of `value`; `difference*` is adapter minus base, paired by row.
    """

    adapter = models.ForeignKey(Adapter, on_delete=models.CASCADE, related_name="scores")
    run = models.ForeignKey(EvaluationRun, on_delete=models.CASCADE, related_name="scores")
    test_set = models.CharField(
        max_length=10, choices=TestSet.choices, help_text="Of its run, so that lists need not look."
    )
    evaluation = models.CharField(max_length=80)
    label = models.CharField(max_length=80)
    unit = models.CharField(max_length=20, blank=True)
    higher_is_better = models.BooleanField()
    num_rows = models.PositiveIntegerField()
    value = models.FloatField()
    low = models.FloatField()
    high = models.FloatField()
    base_value = models.FloatField()
    base_low = models.FloatField()
    base_high = models.FloatField()
    difference = models.FloatField()
    difference_low = models.FloatField()
    difference_high = models.FloatField()
    interval_method = models.CharField(max_length=200)
    p_value = models.FloatField(null=True, help_text="Of the paired test; null in scores of older versions.")
    smallest_effect = models.FloatField(null=True, help_text="The smallest difference worth telling.")
    rows_needed = models.PositiveIntegerField(null=True, help_text="With fewer rows, that difference would not show.")
    rows_recommended = models.PositiveIntegerField(null=True, help_text="As many rows would surely do.")

    class Meta:
        constraints: ClassVar = [models.UniqueConstraint(fields=["run", "evaluation"], name="one_score_per_evaluation")]
        indexes: ClassVar = [
            models.Index(fields=["adapter", "test_set", "evaluation"], name="score_lookup"),
            models.Index(fields=["test_set", "evaluation", "difference"], include=["adapter"], name="score_ranking"),
        ]

    def __str__(self) -> str:
        return f"{self.label} of {self.adapter}"

    def verdict(self) -> Verdict:
        """How the adapter stands beside the base."""
        return verdict(self)

    def is_better(self) -> bool | None:
        """Whether the adapter beats the base; None when that cannot be told, or there is no difference."""
        return {Verdict.BETTER: True, Verdict.WORSE: False}.get(self.verdict())


class Sample(models.Model):
    """A held-out row as the base and the adapter answered it."""

    adapter = models.ForeignKey(Adapter, on_delete=models.CASCADE, related_name="samples")
    source = models.PositiveSmallIntegerField(default=0, help_text="Which of its recipe's datasets; 0: the main one.")
    line = models.PositiveBigIntegerField()
    prompt = models.TextField()
    reference = models.TextField()
    base_answer = models.TextField()
    adapter_answer = models.TextField()
    figure = models.CharField(
        max_length=80, blank=True, help_text="Evaluation that the row's figures are of; empty: not measured yet."
    )
    base_figure = models.FloatField(null=True, help_text="Of the base's answer; null where the row has no figure.")
    adapter_figure = models.FloatField(null=True, help_text="Of the adapter's answer.")

    class Meta:
        ordering: ClassVar = ["source", "line"]

    def __str__(self) -> str:
        return f"line {self.line} by {self.adapter}"


class Preference(models.TextChoices):
    """Which of two answers a person found better, without knowing whose they were."""

    ADAPTER = "adapter", "The adapter"
    BASE = "base", "The base"
    NEITHER = "neither", "Neither"


class SampleChoice(models.Model):
    """A person's blind choice between the two answers to a sample: made once and never changed."""

    sample = models.ForeignKey(Sample, on_delete=models.CASCADE, related_name="choices")
    user = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.CASCADE, related_name="+")
    preferred = models.CharField(max_length=10, choices=Preference.choices)
    at = models.DateTimeField(auto_now_add=True)

    class Meta:
        constraints: ClassVar = [
            models.UniqueConstraint(fields=["sample", "user"], name="one_choice_per_person_and_sample")
        ]

    def __str__(self) -> str:
        return f"{self.user} on {self.sample}: {self.preferred}"

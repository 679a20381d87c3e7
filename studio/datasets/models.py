"""Datasets and their immutable versions."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar
from uuid import uuid4

from django.conf import settings
from django.db import models
from django.urls import reverse
from django.utils import timezone

from studio.accounts.models import Team
from studio.storage import fetch_blob
from workers.carriers import CARRIER_LABELS
from workers.examples import EXAMPLE_TYPE_LABELS, ExampleType, turn_of
from workers.formats import formats
from workers.objectives import is_trainable
from workers.rules import CATALOGUE
from workers.scans import scans


class Dataset(models.Model):
    """A named line of dataset versions that a team owns."""

    team = models.ForeignKey(Team, on_delete=models.CASCADE, related_name="datasets")
    name = models.CharField(max_length=120)
    description = models.TextField(blank=True)
    licence = models.CharField(max_length=80, blank=True, help_text="As workers.licences names it; empty: unknown.")
    created_by = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.PROTECT, related_name="+")
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        constraints: ClassVar = [models.UniqueConstraint(fields=["team", "name"], name="one_dataset_per_name")]
        indexes: ClassVar = [models.Index(fields=["team", "-created_at"], name="dataset_list")]

    def __str__(self) -> str:
        return self.name

    def get_absolute_url(self) -> str:
        return reverse("datasets:detail", args=[self.pk])


class VersionState(models.TextChoices):
    """How far the inspection of a version has come."""

    INSPECTING = "inspecting", "Inspecting"
    NEEDS_MAPPING = "needs_mapping", "Needs a column mapping"
    READY = "ready", "Ready"
    UNREADABLE = "unreadable", "Unreadable"


class DatasetVersion(models.Model):
    """One uploaded file, addressed by its content. Never changes once something uses it."""

    dataset = models.ForeignKey(Dataset, on_delete=models.CASCADE, related_name="versions")
    number = models.PositiveIntegerField()
    state = models.CharField(max_length=20, choices=VersionState.choices, default=VersionState.INSPECTING)
    file_name = models.CharField(max_length=255, help_text="As the person named it, cleaned for display.")
    sha256 = models.CharField(max_length=64, db_index=True)
    num_bytes = models.BigIntegerField()
    carrier = models.CharField(max_length=10, blank=True, help_text="workers.carriers.Carrier, by the content.")
    format = models.CharField(max_length=40, blank=True, help_text="Name of the format plug-in.")
    columns = models.JSONField(default=dict, help_text="The format's fields mapped to the file's columns.")
    column_names = models.JSONField(default=list, help_text="Columns of the first rows that hold text or numbers.")
    num_rows = models.PositiveBigIntegerField(default=0)
    num_usable = models.PositiveBigIntegerField(default=0)
    num_quarantined = models.PositiveBigIntegerField(default=0)
    problem_counts = models.JSONField(default=dict, help_text="Rule -> number of problems.")
    statistics = models.JSONField(default=dict, help_text="Turns, characters and token lengths; see inspecting.py.")
    error = models.TextField(blank=True, help_text="Why the file cannot be read, for people.")
    error_next_step = models.TextField(blank=True)
    progress = models.JSONField(default=dict, help_text='How far an inspection is: {"stage": "rows", "num_rows": 12}.')
    correction = models.JSONField(default=dict, help_text="How a corrected version is made or was; see repairing.py.")
    queued_at = models.DateTimeField(default=timezone.now, help_text="When an inspection was last asked for.")
    heartbeat_at = models.DateTimeField(null=True, help_text="When the running inspection was last alive.")
    source = models.JSONField(
        default=dict,
        help_text='Where the rows came from: {"kind": "hub", "id": "..."}; empty: a person sent them.',
    )
    changes = models.JSONField(default=dict, help_text="Against the version before, once asked for; see changes.py.")
    created_by = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.PROTECT, related_name="+")
    created_at = models.DateTimeField(auto_now_add=True)

    already_stored = False
    """Set on what `receive_upload` gives back when the team had this very file before."""

    class Meta:
        constraints: ClassVar = [
            models.UniqueConstraint(fields=["dataset", "number"], name="one_version_per_number"),
            models.CheckConstraint(
                condition=models.Q(num_rows=models.F("num_usable") + models.F("num_quarantined")),
                name="usable_and_quarantined_are_all_rows",
            ),
        ]

    def __str__(self) -> str:
        return f"{self.dataset.name} v{self.number}"

    def get_absolute_url(self) -> str:
        return reverse("datasets:version", args=[self.dataset_id, self.number])

    def path(self) -> Path:
        """Where the file lies."""
        return fetch_blob(self.sha256)

    def format_label(self) -> str:
        plugin = formats().get(self.format)
        return plugin.label if plugin else "not recognised"

    def example_type(self) -> ExampleType:
        """What its rows are: conversations, preference pairs, ...; a format that is gone counts as conversations."""
        plugin = formats().get(self.format)
        return plugin.example_type if plugin else "chat"

    def example_type_label(self) -> str:
        return EXAMPLE_TYPE_LABELS[self.example_type()]

    def why_not_trainable(self) -> str:
        """Why no job can learn from its rows, as a sentence; empty when one can."""
        if is_trainable(self.example_type()):
            return ""
        return f"{self} holds {self.example_type_label()}, and no objective that learns from them is installed yet."

    def carrier_label(self) -> str:
        return CARRIER_LABELS.get(self.carrier, self.carrier)

    def is_ready(self) -> bool:
        return self.state == VersionState.READY

    def is_inspecting(self) -> bool:
        return self.state == VersionState.INSPECTING

    def num_problems(self) -> int:
        """Problems of every rule, those beyond the stored ones included."""
        return sum(self.problem_counts.values())

    def repairs(self) -> list[dict[str, Any]]:
        """What a corrected version would do: {rule, title, repair, count} of each rule that has a remedy."""
        return [
            {"rule": code, "title": CATALOGUE[code].title, "repair": CATALOGUE[code].repair, "count": count}
            for code, count in sorted(self.problem_counts.items())
            if code in CATALOGUE and CATALOGUE[code].repair
        ]

    def tokens_of(self, base_revision: str) -> dict[str, Any] | None:
        """Lengths in tokens of one base model: {num_rows, total, longest, histogram, cut, longest_rows: [[line, num]]}.

        None until counted; versions that were counted earlier have no `longest_rows`.
        """
        found: dict[str, Any] | None = self.statistics.get("tokens", {}).get(base_revision)
        return found

    def source_label(self) -> str:
        """Where the rows came from when nobody sent them, for people."""
        match self.source.get("kind"):
            case "hub":
                parts = [self.source["config"], self.source["split"]]
                which = ", ".join(part for part in parts if part)
                return f"{self.source['id']} ({which}) on the Hugging Face Hub at {self.source['revision'][:12]}"
            case "folder":
                return f"{self.source['path']} on the server"
        return ""

    def users(self) -> list[models.Model]:
        """Everything that needs this version: what a foreign key protects it for (jobs, adapters)."""
        found: list[models.Model] = []
        for relation in self._meta.related_objects:
            if relation.on_delete is models.PROTECT:
                found += relation.related_model._base_manager.filter(**{relation.field.name: self})
        return found


class DatasetProblem(models.Model):
    """Something wrong with a row, at its line. `line` is empty for a problem of the whole file."""

    version = models.ForeignKey(DatasetVersion, on_delete=models.CASCADE, related_name="problems")
    line = models.PositiveBigIntegerField(null=True)
    field = models.CharField(max_length=120, blank=True)
    rule = models.CharField(max_length=40)
    level = models.CharField(max_length=10)
    message = models.TextField()
    fix = models.TextField(blank=True)
    excerpt = models.TextField(blank=True)

    class Meta:
        indexes: ClassVar = [models.Index(fields=["version", "line"], name="problem_by_line")]

    def __str__(self) -> str:
        return f"line {self.line}: {self.rule}"

    @property
    def turn(self) -> int | None:
        """Which turn of a conversation it is in, counted from 1."""
        return turn_of(self.field)


class ScanState(models.TextChoices):
    """How far a scan of a version has come."""

    WAITING = "waiting", "Waiting"
    RUNNING = "running", "Running"
    DONE = "done", "Done"
    FAILED = "failed", "Failed"
    SKIPPED = "skipped", "Not for these rows"


class DatasetScan(models.Model):
    """One scan of a version (workers/scans): a stage of its own, after the inspection. See scanning.py."""

    version = models.ForeignKey(DatasetVersion, on_delete=models.CASCADE, related_name="scans")
    name = models.CharField(max_length=40, help_text="Name of the scan plug-in.")
    state = models.CharField(max_length=10, choices=ScanState.choices, default=ScanState.WAITING)
    attempt = models.PositiveIntegerField(default=0, help_text="Rises each time a worker takes it: the fencing token.")
    num_read = models.PositiveBigIntegerField(default=0, help_text="Rows that were read so far, in all passes.")
    num_findings = models.PositiveBigIntegerField(default=0, help_text="All of them, those that are not kept too.")
    num_rows = models.PositiveBigIntegerField(
        null=True, help_text="Rows with findings. Empty: not over, or from before these were counted."
    )
    kinds = models.JSONField(default=dict, help_text="Kind of finding -> how many.")
    notes = models.JSONField(default=list, help_text="Sentences about the whole file.")
    counts = models.JSONField(default=dict, help_text="Rows by what the scan told them to be: languages.")
    error = models.TextField(blank=True, help_text="Why it failed or was skipped, for people.")
    seconds = models.FloatField(default=0.0, help_text="What it took.")
    queued_at = models.DateTimeField(default=timezone.now, help_text="When it was last asked for.")
    heartbeat_at = models.DateTimeField(null=True, help_text="When the running scan was last alive.")

    class Meta:
        constraints: ClassVar = [models.UniqueConstraint(fields=["version", "name"], name="one_scan_per_name")]

    def __str__(self) -> str:
        return f"{self.label()} of {self.version}"

    def label(self) -> str:
        plugin = scans().get(self.name)
        return plugin.label if plugin else self.name

    def help(self) -> str:
        plugin = scans().get(self.name)
        return plugin.help if plugin else ""

    def is_over(self) -> bool:
        """Whether nothing more will come of it unless it is asked for again."""
        return self.state not in {ScanState.WAITING, ScanState.RUNNING}

    def percent(self) -> int:
        """How much of the rows is read, from 0 to 99: something is left to do until it is over."""
        plugin = scans().get(self.name)
        num_to_read = self.version.num_usable * (plugin.num_passes if plugin else 1)
        return min(99, 100 * self.num_read // num_to_read) if num_to_read else 0


class ScanFinding(models.Model):
    """Something that a scan found in a row. `place` counts a scan's findings from 0, by line."""

    scan = models.ForeignKey(DatasetScan, on_delete=models.CASCADE, related_name="findings")
    place = models.PositiveIntegerField()
    line = models.PositiveBigIntegerField()
    other_line = models.PositiveBigIntegerField(null=True, help_text="The row that it is like.")
    kind = models.CharField(max_length=60)
    message = models.TextField()
    excerpt = models.TextField(blank=True, help_text="Never a whole secret.")

    class Meta:
        constraints: ClassVar = [models.UniqueConstraint(fields=["scan", "place"], name="one_finding_per_place")]

    def __str__(self) -> str:
        return f"line {self.line}: {self.kind}"


class RowTableState(models.TextChoices):
    """How far the preparation of a version's rows has come."""

    WAITING = "waiting", "Waiting"
    RUNNING = "running", "Running"
    DONE = "done", "Done"
    FAILED = "failed", "Failed"


class RowTable(models.Model):
    """A version's rows at rest, to be looked through and filtered: a blob of its own. See row_tables.py."""

    version = models.OneToOneField(DatasetVersion, on_delete=models.CASCADE, related_name="row_table")
    state = models.CharField(max_length=10, choices=RowTableState.choices, default=RowTableState.WAITING)
    attempt = models.PositiveIntegerField(default=0, help_text="Rises each time a worker takes it: the fencing token.")
    num_read = models.PositiveBigIntegerField(default=0, help_text="Rows that were read so far.")
    sha256 = models.CharField(max_length=64, blank=True, db_index=True, help_text="Of the Parquet file; empty: none.")
    num_bytes = models.BigIntegerField(default=0, help_text="Of the Parquet file.")
    columns = models.JSONField(
        default=list,
        help_text="To filter by: {name, num_missing, values: [[value, rows], ...] of the most frequent}.",
    )
    error = models.TextField(blank=True, help_text="Why it could not be made, for people.")
    error_next_step = models.TextField(blank=True)
    seconds = models.FloatField(default=0.0, help_text="What it took.")
    queued_at = models.DateTimeField(default=timezone.now, help_text="When it was last asked for.")
    heartbeat_at = models.DateTimeField(null=True, help_text="When the worker that makes it was last alive.")

    def __str__(self) -> str:
        return f"Rows of {self.version}"

    def is_done(self) -> bool:
        return self.state == RowTableState.DONE

    def is_over(self) -> bool:
        """Whether nothing more will come of it unless it is asked for again."""
        return self.state in {RowTableState.DONE, RowTableState.FAILED}

    def percent(self) -> int:
        """How much of the rows is read, from 0 to 99: something is left to do until it is over."""
        return min(99, 100 * self.num_read // self.version.num_rows) if self.version.num_rows else 0

    def column_names(self) -> list[str]:
        return [column["name"] for column in self.columns]

    def frequent_values(self) -> list[tuple[str, str, int]]:
        """(column, value, rows) of the most frequent values that a form can offer: those that can be seen and typed."""
        return [
            (column["name"], value, rows)
            for column in self.columns
            for value, rows in column["values"]
            if value.isprintable() and value.strip()
        ]


class SplitState(models.TextChoices):
    """How far the making of a split has come."""

    WAITING = "waiting", "Waiting"
    RUNNING = "running", "Being made"
    DONE = "done", "Frozen"
    FAILED = "failed", "Failed"


class DatasetSplit(models.Model):
    """Which rows of a version are trained on, chosen on and scored. Once it is done it never changes; see splitting.py.

    Its lines lie in a file of the storage (workers/splits/frozen.py), which recipes name by its sha256.
    """

    version = models.ForeignKey(DatasetVersion, on_delete=models.CASCADE, related_name="splits")
    name = models.CharField(max_length=80)
    state = models.CharField(max_length=10, choices=SplitState.choices, default=SplitState.WAITING)
    asked = models.JSONField(help_text="workers.splits.asked.SplitRequest.")
    asked_sha256 = models.CharField(max_length=64, help_text="Of what was asked: the same question has one answer.")
    sha256 = models.CharField(max_length=64, blank=True, db_index=True, help_text="Of the file, once it is there.")
    num_bytes = models.BigIntegerField(default=0)
    num_train = models.PositiveBigIntegerField(default=0)
    num_validation = models.PositiveBigIntegerField(default=0)
    num_test = models.PositiveBigIntegerField(default=0)
    report = models.JSONField(default=dict, help_text="What is to be said of it; see workers/splits/making.py.")
    error = models.TextField(blank=True, help_text="Why it could not be made, for people.")
    is_default = models.BooleanField(default=False, help_text="Whether new jobs on the version begin with it.")
    attempt = models.PositiveIntegerField(default=0, help_text="Rises each time a worker takes it: the fencing token.")
    num_read = models.PositiveBigIntegerField(default=0, help_text="Rows that were read so far.")
    seconds = models.FloatField(default=0.0, help_text="What making it took.")
    queued_at = models.DateTimeField(default=timezone.now, help_text="When it was last asked for.")
    heartbeat_at = models.DateTimeField(null=True, help_text="When the worker that makes it was last alive.")
    created_by = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.PROTECT, related_name="+")
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        constraints: ClassVar = [
            models.UniqueConstraint(fields=["version", "name"], name="one_split_per_name"),
            models.UniqueConstraint(fields=["version", "asked_sha256"], name="one_split_per_question"),
            models.UniqueConstraint(
                fields=["version"], condition=models.Q(is_default=True), name="one_default_split_per_version"
            ),
            models.CheckConstraint(
                condition=~models.Q(state="done") | ~models.Q(sha256=""), name="a_split_that_is_done_has_its_file"
            ),
            models.CheckConstraint(
                condition=models.Q(is_default=False) | models.Q(state="done"), name="a_default_split_is_done"
            ),
        ]

    def __str__(self) -> str:
        return f"{self.name} of {self.version}"

    def get_absolute_url(self) -> str:
        return reverse("datasets:split", args=[self.version.dataset_id, self.version.number, self.pk])

    def is_done(self) -> bool:
        return self.state == SplitState.DONE

    def is_over(self) -> bool:
        """Whether nothing more will come of it."""
        return self.state in {SplitState.DONE, SplitState.FAILED}

    def percent(self) -> int:
        """How much of the rows is read, from 0 to 99: something is left to do until it is over."""
        return min(99, 100 * self.num_read // self.version.num_usable) if self.version.num_usable else 0

    def num_left_out(self) -> int:
        """Usable rows that stand in no part."""
        return int(self.report.get("num_left_out", 0))

    def reference(self) -> dict[str, Any]:
        """How a recipe names it: workers.recipe.SplitRef."""
        return {
            "name": self.name, "sha256": self.sha256, "num_train": self.num_train,
            "num_validation": self.num_validation, "num_test": self.num_test,
        }  # fmt: skip

    def path(self) -> Path:
        """Where the file lies."""
        return fetch_blob(self.sha256)


class UploadState(models.TextChoices):
    """How far a file that arrives bit by bit has come."""

    RECEIVING = "receiving", "Receiving"
    FINISHED = "finished", "Finished"
    REFUSED = "refused", "Refused"


class Upload(models.Model):
    """A file on its way to becoming a dataset version: sent by a browser in pieces, or fetched by a worker.

    Its row is the truth about how much of it is safe: `num_received` is raised after the bytes are on the disk.
    """

    id = models.UUIDField(primary_key=True, default=uuid4, editable=False)
    team = models.ForeignKey(Team, on_delete=models.CASCADE, related_name="uploads")
    dataset = models.ForeignKey(
        Dataset, null=True, on_delete=models.CASCADE, related_name="uploads", help_text="Empty: a new dataset."
    )
    state = models.CharField(max_length=12, choices=UploadState.choices, default=UploadState.RECEIVING)
    file_name = models.CharField(max_length=255, help_text="As the person named it, cleaned for display.")
    name = models.CharField(max_length=120, blank=True, help_text="The new dataset's; empty: by the file's name.")
    licence = models.CharField(max_length=80, blank=True, help_text="The new dataset's.")
    source = models.JSONField(default=dict, help_text="As DatasetVersion.source; empty: it is sent in pieces.")
    num_bytes = models.BigIntegerField(null=True, help_text="Of the whole file; empty: not known before it is there.")
    num_received = models.BigIntegerField(default=0, help_text="Bytes that are on the disk.")
    declared_sha256 = models.CharField(max_length=64, blank=True, help_text="What the sender says the file's is.")
    sha256 = models.CharField(max_length=64, blank=True, help_text="Of the whole file, once it is there.")
    version = models.ForeignKey(DatasetVersion, null=True, on_delete=models.CASCADE, related_name="uploads")
    was_stored = models.BooleanField(default=False, help_text="Whether the team had this very file before.")
    error_code = models.CharField(max_length=40, blank=True)
    error_field = models.CharField(max_length=40, blank=True)
    error = models.TextField(blank=True, help_text="Why it did not become a version, for people.")
    error_next_step = models.TextField(blank=True)
    created_by = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.PROTECT, related_name="+")
    created_at = models.DateTimeField(auto_now_add=True)
    touched_at = models.DateTimeField(default=timezone.now, help_text="When it last got on.")
    heartbeat_at = models.DateTimeField(null=True, help_text="When the worker that fetches it was last alive.")

    class Meta:
        constraints: ClassVar = [
            models.CheckConstraint(
                condition=models.Q(num_bytes=None) | models.Q(num_received__lte=models.F("num_bytes")),
                name="no_more_is_received_than_there_is",
            ),
        ]
        indexes: ClassVar = [models.Index(fields=["team", "state", "-touched_at"], name="upload_list")]

    def __str__(self) -> str:
        return self.file_name

    def get_absolute_url(self) -> str:
        return reverse("datasets:upload_item", args=[self.pk])

    def is_receiving(self) -> bool:
        return self.state == UploadState.RECEIVING

    def is_complete(self) -> bool:
        """Whether every byte is here; what is fetched says so itself."""
        return self.num_bytes is not None and self.num_received == self.num_bytes

    def percent(self) -> int:
        """How much is here, from 0 to 100."""
        return 100 * self.num_received // self.num_bytes if self.num_bytes else 0

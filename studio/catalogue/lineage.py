"""Where an adapter comes from, and whether making it again gave the same bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from django.contrib.postgres.expressions import ArraySubquery
from django.db.models import Case, Count, F, OuterRef, Prefetch, QuerySet, Subquery, TextField, When
from django.db.models.functions import Cast, Extract, JSONObject

from studio.accounts.models import Team
from studio.catalogue.models import Adapter, AdapterDataset, Alias, Preference, Sample, SampleChoice, Score
from studio.catalogue.samples import SHOWN
from studio.costs import Cost, Stretch, cost_of

MAX_VERSIONS = 50
WEIGHT_ENDINGS = (".safetensors", ".bin", ".pt")


def adapters_for_page(team: Team) -> QuerySet[Adapter]:
    """A team's adapters with all that one's page shows besides samples: two queries.

    Sets `versions`, `alias_names`, `attempts`, `repeats`, `sample_counts`, `choice_counts` and `mixed_rows`. Jobs
    belong to an app above this one and are reached by the names of their relations.
    """
    of_name = Adapter.objects.filter(team=OuterRef("team"), name=OuterRef("name")).order_by("-version")
    aliases = Alias.objects.filter(adapter=OuterRef("pk")).order_by("name")
    attempts = (
        Adapter.objects.filter(pk=OuterRef("pk"), job__attempts__isnull=False)
        .order_by("job__attempts__number")
        .values(
            json=JSONObject(
                number="job__attempts__number",
                outcome="job__attempts__outcome",
                failure_code="job__attempts__failure_code",
                from_step="job__attempts__from_step",
                last_step="job__attempts__last_step",
                device="job__attempts__worker__device",
                seconds=Extract(F("job__attempts__ended_at") - F("job__attempts__started_at"), "epoch"),
                num_gpus="job__num_gpus",
                price=Cast("job__attempts__price_per_gpu_hour", TextField()),
                currency="job__attempts__currency",
            )
        )
    )
    repeats = Adapter.objects.filter(job__parent__adapter=OuterRef("pk"), recipe=OuterRef("recipe")).order_by("pk")
    named = {name: Count("pk", filter=condition) for name, (_label, condition) in SHOWN.items() if name}
    samples = (
        Sample.objects.filter(adapter=OuterRef("pk"))
        .order_by()
        .values("adapter")
        .annotate(json=JSONObject(total=Count("pk"), unmeasured=_count_unmeasured(), **named))
        .values("json")
    )
    preferred = {name: Count(Case(When(preferred=name, then="pk"))) for name in Preference.values}
    choices = (
        SampleChoice.objects.filter(sample__adapter=OuterRef("pk"))
        .order_by()
        .values("sample__adapter")
        .annotate(json=JSONObject(people=Count("user", distinct=True), **preferred))
        .values("json")
    )
    scores = Prefetch("scores", Score.objects.select_related("run__suite"))
    return (
        team.adapters.prefetch_related(scores)
        .select_related(
            "base_model", "dataset_version__dataset", "created_by", "team", "job", "job__parent__adapter", "file_check"
        )
        .annotate(
            versions=ArraySubquery(
                of_name.values(json=JSONObject(id="pk", version="version", state="state"))[:MAX_VERSIONS]
            ),
            alias_names=ArraySubquery(aliases.values("name")),
            attempts=ArraySubquery(attempts),
            repeats=ArraySubquery(
                repeats.values(json=JSONObject(id="pk", name="name", version="version", files="files"))[:MAX_VERSIONS]
            ),
            sample_counts=Subquery(samples),
            choice_counts=Subquery(choices),
            mixed_rows=mixed_rows(),
        )
    )


def mixed_rows() -> ArraySubquery:
    """The further datasets of an adapter in their order, as the annotation `mixed_rows` that `Adapter.mixed` reads."""
    mix = AdapterDataset.objects.filter(adapter=OuterRef("pk")).order_by("place")
    return ArraySubquery(mix.values(json=JSONObject(**AdapterDataset.ROW)))


def training_cost(adapter: Adapter) -> Cost:
    """What making an adapter of `adapters_for_page` cost: every attempt of its job, those without success too."""
    attempts: list[dict[str, Any]] = adapter.attempts  # type: ignore[attr-defined]
    return cost_of(
        Stretch(
            one["seconds"], one["num_gpus"], None if one["price"] is None else Decimal(one["price"]), one["currency"]
        )
        for one in attempts
        if one["seconds"]
    )


def _count_unmeasured() -> Count:
    return Count(Case(When(figure="", then="pk")))


@dataclass(frozen=True)
class ByteComparison:
    """Whether two adapters of one recipe have the same weights, by the recorded checksums of their files."""

    adapter_id: int
    label: str
    same: list[str]
    different: list[str]

    @property
    def is_equal(self) -> bool:
        return bool(self.same) and not self.different


def compare_weights(
    files: Iterable[Mapping[str, Any]], others: Iterable[Mapping[str, Any]], *, adapter_id: int, label: str
) -> ByteComparison:
    """The weight files of two adapters side by side. Other files hold dates and seconds, which never repeat."""
    ours, theirs = _weights(files), _weights(others)
    same = sorted(name for name, digest in ours.items() if theirs.get(name) == digest)
    different = sorted({*ours, *theirs} - set(same))
    return ByteComparison(adapter_id, label, same, different)


def _weights(files: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    return {str(file["name"]): str(file["sha256"]) for file in files if str(file["name"]).endswith(WEIGHT_ENDINGS)}


def repeated_by(adapter: Adapter) -> list[ByteComparison]:
    """How the adapters compare that were made from this one's recipe again; of one from `adapters_for_page`."""
    found: list[dict[str, Any]] = adapter.repeats  # type: ignore[attr-defined]
    return [
        compare_weights(adapter.files, one["files"], adapter_id=one["id"], label=f"{one['name']} v{one['version']}")
        for one in found
    ]


def repeat_of(adapter: Adapter) -> ByteComparison | None:
    """How an adapter compares with the one whose recipe it was made from again; None for one that repeats nothing."""
    job = getattr(adapter, "job", None)
    parent = job.parent if job is not None else None
    first: Adapter | None = parent.adapter if parent is not None else None
    if first is None or first.recipe != adapter.recipe or first.team_id != adapter.team_id:
        return None
    return compare_weights(first.files, adapter.files, adapter_id=first.pk, label=f"{first.name} v{first.version}")

"""The further datasets of a job: which may be trained on together, and the rows that remember them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from django.contrib.postgres.expressions import ArraySubquery
from django.db.models import OuterRef
from django.db.models.functions import JSONObject

from jobs.models import Job, JobDataset
from studio.datasets.models import DatasetVersion
from workers.errors import RecipeProblems
from workers.recipe import Recipe


def dataset_ref(version: DatasetVersion) -> dict[str, Any]:
    """What a recipe says of a dataset version."""
    return {
        "name": str(version), "sha256": version.sha256, "format": version.format, "columns": version.columns
    }  # fmt: skip


def mix_problems(main: DatasetVersion, mixed: Sequence[DatasetVersion]) -> dict[str, str]:
    """Why versions cannot be trained on together with the main one, by the recipe's field; empty when they can."""
    found: dict[str, str] = {}
    seen = {main.pk}
    for number, version in enumerate(mixed):
        if version.dataset.team_id != main.dataset.team_id:
            found[f"mix.{number}"] = "There is no such dataset."
        elif not version.is_ready():
            state = version.get_state_display().lower()
            found[f"mix.{number}"] = f"{version} is not ready: {state}. Open the dataset to see what is missing."
        elif version.pk in seen:
            found[f"mix.{number}"] = f"{version} is chosen twice. Leave it out here and change the weights instead."
        elif version.example_type() != main.example_type():
            found[f"mix.{number}"] = (
                f"{version} holds {version.example_type_label()}, and {main} holds {main.example_type_label()}. Choose "
                "datasets of one kind."
            )
        seen.add(version.pk)
    return found


def check_mix(main: DatasetVersion, mixed: Sequence[DatasetVersion]) -> None:
    """Raises RecipeProblems with what `mix_problems` finds."""
    if problems := mix_problems(main, mixed):
        raise RecipeProblems(problems)


def mixed_rows() -> ArraySubquery:
    """A job's further datasets in their order, as an annotation of jobs: {version, dataset, number, name, weight}."""
    rows = JobDataset.objects.filter(job=OuterRef("pk")).order_by("place")
    return ArraySubquery(
        rows.values(
            json=JSONObject(
                version="dataset_version",
                dataset="dataset_version__dataset",
                number="dataset_version__number",
                name="dataset_version__dataset__name",
                weight="weight",
            )
        )
    )


def pairs_of(job: Job) -> list[tuple[int, float]]:
    """Version and weight of each of a job's further datasets; uses the annotation `mixed` where there is one."""
    if (found := getattr(job, "mixed", None)) is not None:
        return [(one["version"], one["weight"]) for one in found]
    return list(job.mix.values_list("dataset_version", "weight"))


def store_mix(job: Job, recipe: Recipe, mixed: Sequence[DatasetVersion]) -> None:
    """Remember the versions of a recipe's mix, which protects them from being deleted."""
    JobDataset.objects.bulk_create(
        JobDataset(job=job, dataset_version=version, place=place, weight=one.weight)
        for place, (version, one) in enumerate(zip(mixed, recipe.mix, strict=True), start=1)
    )

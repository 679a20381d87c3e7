"""The one place where an adapter is born: its row, its scores and its samples, from a finished folder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from django.db import connection
from django.db.models import Max

from studio.accounts.models import Team, User
from studio.catalogue.models import (
    Adapter,
    AdapterDataset,
    BaseModel,
    EvaluationRun,
    RowCounts,
    RunSample,
    Sample,
    Score,
    Suite,
    TestSet,
)
from studio.catalogue.sample_figures import figure_of, measure
from studio.datasets.models import DatasetVersion
from studio.storage import adapter_folder, file_digests
from workers.digests import damaged_file
from workers.errors import DamagedAdapterError
from workers.recipe import Recipe
from workers.results import Result, ScoreRecord


def register_adapter(
    *,
    team: Team,
    user: User,
    name: str,
    base_model: BaseModel,
    dataset_version: DatasetVersion,
    recipe: Recipe,
    folder_key: str,
    files: list[dict[str, str | int]],
    result: Result,
    mixed: Sequence[DatasetVersion] = (),
) -> Adapter:
    """The adapter whose files lie at `folder_key`, in the catalogue with its scores and samples.

    Opens no transaction: the caller's makes it one fact with the success of the job. `files` are those of
    `checked_files`, `mixed` the further datasets of the recipe's mix, in its order.
    """
    adapter = Adapter.objects.create(
        team=team,
        name=name,
        version=_next_version(team, name),
        overlap=result.overlap.model_dump(mode="json") if result.overlap else {},
        suspicious=[one.model_dump(mode="json") for one in result.suspicious],
        base_model=base_model,
        dataset_version=dataset_version,
        num_mixed=len(mixed),
        sources=[one.model_dump(mode="json") for one in result.sources],
        method=recipe.method,
        recipe=recipe.to_dict(),
        folder=folder_key,
        files=files,
        num_bytes=sum(int(file["num_bytes"]) for file in files),
        num_trainable=result.num_trainable,
        stopped_at_step=result.stopped_at_step,
        provenance=result.provenance.model_dump(mode="json"),
        created_by=user,
    )
    AdapterDataset.objects.bulk_create(
        AdapterDataset(adapter=adapter, dataset_version=version, place=place, weight=one.weight)
        for place, (version, one) in enumerate(zip(mixed, recipe.mix, strict=True), start=1)
    )
    if result.scores:
        _add_run(team, base_model, adapter, TestSet.HELD_OUT, result.scores, result)
    if result.general:
        _add_run(team, base_model, adapter, TestSet.GENERAL, result.general, result)
    samples = (Sample(adapter=adapter, **_storable(sample.model_dump())) for sample in result.samples)
    Sample.objects.bulk_create(measure(samples, figure_of(adapter.recipe)))
    return adapter


def lock_versions(team_id: int, name: str) -> None:
    """Whoever else numbers, points at or archives versions of a team's adapters of this name waits for the end of the
    caller's transaction."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_advisory_xact_lock(hashtextextended(%s, %s))", [name, team_id])


def _next_version(team: Team, name: str) -> int:
    """The number of the team's next adapter of a name. Others that ask at the same time wait for this transaction."""
    lock_versions(team.pk, name)
    newest = team.adapters.filter(name=name).aggregate(newest=Max("version"))["newest"]
    return (newest or 0) + 1


def register_run(
    *, team: Team, base_model: BaseModel, adapter: Adapter | None, suite: Suite | None, folder_key: str, result: Result
) -> EvaluationRun:
    """What an evaluation measured, in the catalogue: of an adapter beside its base, or of a base alone.

    Opens no transaction: the caller's makes it one fact with the success of the job.
    """
    return _add_run(team, base_model, adapter, TestSet.SUITE, result.scores, result, suite=suite, folder_key=folder_key)


def _add_run(
    team: Team,
    base_model: BaseModel,
    adapter: Adapter | None,
    test_set: TestSet,
    scores: Sequence[ScoreRecord],
    result: Result,
    *,
    suite: Suite | None = None,
    folder_key: str = "",
) -> EvaluationRun:
    # Results of older versions say of no set how many rows there were to score, and nobody says it of the general one.
    num_rows = max((score.num_rows for score in scores), default=0)
    is_general = test_set == TestSet.GENERAL
    run = EvaluationRun.objects.create(
        team=team, adapter=adapter, base_model=base_model, test_set=test_set, suite=suite, folder=folder_key,
        test_set_sha256="" if is_general else result.test_set_sha256,
        settings_sha256="" if is_general else result.settings_sha256,
        num_rows=num_rows if is_general else result.num_rows_to_score or num_rows,
        num_scored=num_rows if is_general else result.num_rows_scored or num_rows,
        base_figures={
            score.evaluation: {
                "label": score.label, "unit": score.unit, "higher_is_better": score.higher_is_better,
                "value": score.base_value, "low": score.base_low, "high": score.base_high, "num_rows": score.num_rows,
            }
            for score in scores
        },
    )  # fmt: skip
    if adapter is not None:
        Score.objects.bulk_create(
            Score(adapter=adapter, run=run, test_set=test_set, **score.model_dump()) for score in scores
        )
    if result.counts.lines and not is_general:
        counts = result.counts.model_dump(mode="json")
        RowCounts.objects.create(
            run=run, lines=counts["lines"], adapter_counts=counts["adapter"], base_counts=counts["base"]
        )
    RunSample.objects.bulk_create(
        (RunSample(run=run, **_storable(row.model_dump(mode="json"))) for row in result.rows), batch_size=1000
    )
    return run


def _storable(value: Any) -> Any:
    """JSON types as PostgreSQL stores them: it has no zero character, and a model can produce one."""
    if isinstance(value, str):
        return value.replace("\0", "\N{REPLACEMENT CHARACTER}")
    if isinstance(value, dict):
        return {key: _storable(one) for key, one in value.items()}
    return [_storable(one) for one in value] if isinstance(value, list) else value


def checked_files(folder_key: str) -> list[dict[str, str | int]]:
    """The files of a finished adapter with their digests; reads all of them.

    Raises:
        DamagedAdapterError: a file does not match the checksum that the trainer wrote beside it.
    """
    folder = adapter_folder(folder_key)
    files = file_digests(folder)
    # Without a list, the digests that are recorded now are the first.
    if (name := damaged_file(folder, {str(file["name"]): str(file["sha256"]) for file in files}.get)) is not None:
        raise DamagedAdapterError(
            f'"{name}" is not what the trainer wrote: its checksum differs, or it is missing.',
            next_step="Check the disk of the data folder, then run the job again.",
        )
    return files

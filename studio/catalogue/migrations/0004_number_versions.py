"""Adapters of one name become versions of it, and scores from before get the run that they were of."""

from __future__ import annotations

from typing import Any, ClassVar

from django.db import migrations
from django.db.models import Max


def number_versions(apps: Any, schema_editor: Any) -> None:
    Adapter = apps.get_model("catalogue", "Adapter")
    newest: dict[tuple[int, str], int] = {}
    for adapter in Adapter.objects.order_by("created_at", "pk").only("team_id", "name").iterator():
        key = (adapter.team_id, adapter.name)
        newest[key] = newest.get(key, 0) + 1
        Adapter.objects.filter(pk=adapter.pk).update(version=newest[key])


def make_runs(apps: Any, schema_editor: Any) -> None:
    Adapter, Run, Score = (apps.get_model("catalogue", name) for name in ("Adapter", "EvaluationRun", "Score"))
    scored = Adapter.objects.filter(scores__run=None).annotate(num_rows=Max("scores__num_rows")).distinct()
    for adapter in scored.only("team_id", "base_model_id", "created_at").iterator():
        run = Run.objects.create(
            team_id=adapter.team_id, adapter_id=adapter.pk, base_model_id=adapter.base_model_id, test_set="held_out",
            num_rows=adapter.num_rows, num_scored=adapter.num_rows,
        )  # fmt: skip
        Run.objects.filter(pk=run.pk).update(created_at=adapter.created_at)
        Score.objects.filter(adapter_id=adapter.pk, run=None).update(run=run)


class Migration(migrations.Migration):
    dependencies: ClassVar = [("catalogue", "0003_versions_suites_runs")]

    operations: ClassVar = [
        migrations.RunPython(number_versions, migrations.RunPython.noop, elidable=True),
        migrations.RunPython(make_runs, migrations.RunPython.noop, elidable=True),
    ]
